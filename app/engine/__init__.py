"""Jobs, their order, the one thread that owns the pipeline, and image bytes.

Knows nothing of HTTP. The pipeline comes in from outside through ``contract``,
so that nothing here imports a framework.
"""

from app.engine.contract import Loader, LoadStep, Pipeline
from app.engine.engine import Engine, EngineStatus
from app.engine.jobs import Job, JobOutcome
from app.engine.packing import PackedPicture, Packing, PictureFormat

__all__ = [
    "Engine",
    "EngineStatus",
    "Job",
    "JobOutcome",
    "LoadStep",
    "Loader",
    "PackedPicture",
    "Packing",
    "PictureFormat",
    "Pipeline",
]
