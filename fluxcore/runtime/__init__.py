"""The device and how it is treated: the only package that asks which device it is.

Owns the choice of device, dtypes, attention and residency, compiling, CUDA graphs, products in
eight bits and in AMX's tiles, the streaming of layers, memory figures, out-of-memory recognition
and stage timing. Knows nothing of prompts or pictures.
"""

from fluxcore.runtime.choosing import KernelChoice, choose_runtime
from fluxcore.runtime.compiling import Compile, keep_compiled
from fluxcore.runtime.device import Runtime
from fluxcore.runtime.dtypes import DtypePolicy
from fluxcore.runtime.memory import host_available_bytes, host_peak_bytes, translated_errors
from fluxcore.runtime.quantised import Precision
from fluxcore.runtime.residency import WAYS, Choice, Residency, choose_residency
from fluxcore.runtime.shared_memory import write_in_place
from fluxcore.runtime.streaming import LayerStream, StreamedLayer
from fluxcore.runtime.timing import StageTimes

__all__ = [
    "WAYS",
    "Choice",
    "Compile",
    "DtypePolicy",
    "KernelChoice",
    "LayerStream",
    "Precision",
    "Residency",
    "Runtime",
    "StageTimes",
    "StreamedLayer",
    "choose_residency",
    "choose_runtime",
    "host_available_bytes",
    "host_peak_bytes",
    "keep_compiled",
    "translated_errors",
    "write_in_place",
]
