"""The device and how it is treated: the only package that asks which device it is.

Owns the choice of device, dtypes and attention, memory figures, out-of-memory
recognition and stage timing. Knows nothing of prompts or pictures.
"""

from fluxcore.runtime.device import Runtime, choose_runtime
from fluxcore.runtime.dtypes import DtypePolicy
from fluxcore.runtime.memory import host_peak_bytes, translated_errors
from fluxcore.runtime.timing import StageTimes

__all__ = [
    "DtypePolicy",
    "Runtime",
    "StageTimes",
    "choose_runtime",
    "host_peak_bytes",
    "translated_errors",
]
