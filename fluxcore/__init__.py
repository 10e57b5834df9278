"""fluxcore: FLUX.2 [klein] in plain PyTorch, from checkpoint directory to picture.

Owns the model, its weights and the generation loop. Knows nothing of HTTP, of
settings files or of the process it runs in: it never prints, exits or
configures logging.

Dimension key, used by every shape comment in this package:

    B  batch                    C  channels
    L  tokens                   h  latent rows     (image height / 16)
    D  model width              w  latent columns  (image width / 16)
    H  attention heads          K  width of one head
    S  steps

A joint sequence is always ``[txt, img]``, and references follow the image:
``[txt, img, reference 1, reference 2, ...]``.

The public names below are loaded on first use, so that ``import fluxcore``
stays cheap and does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fluxcore.version import __version__

if TYPE_CHECKING:
    from fluxcore.params import GenerationParams
    from fluxcore.pipeline import FluxPipeline, GenerationResult

__all__ = ["FluxPipeline", "GenerationParams", "GenerationResult", "__version__"]

_HOME_OF = {
    "FluxPipeline": "fluxcore.pipeline",
    "GenerationResult": "fluxcore.pipeline",
    "GenerationParams": "fluxcore.params",
}


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
