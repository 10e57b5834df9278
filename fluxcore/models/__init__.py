"""The three networks, as plain ``nn.Module``s that never ask what device they are on.

What differs per device (how attention runs, the dtype of the residual stream)
is handed in by ``fluxcore.runtime`` through ``fluxcore.kernels``.
"""

from fluxcore.models.flux2 import Flux2Transformer, Modulation
from fluxcore.models.qwen3 import Qwen3Encoder
from fluxcore.models.vae import AutoEncoder

__all__ = [
    "AutoEncoder",
    "Flux2Transformer",
    "Modulation",
    "Qwen3Encoder",
]
