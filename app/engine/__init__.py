"""Jobs, their order, the one thread that owns the pipeline, and image bytes.

Knows nothing of HTTP. The pipeline comes in from outside through ``contract``,
so that nothing here imports a framework.
"""

from app.engine.admission import Limits
from app.engine.contract import Loader, LoadStep, Pipeline
from app.engine.engine import Engine, EngineStatus
from app.engine.events import JobEvent, Preview, Queued, Settled, Started, StepDone
from app.engine.jobs import Job, JobOptions, JobOutcome, Priority
from app.engine.packing import PackedPicture, Packing, PictureFormat

__all__ = [
    "Engine",
    "EngineStatus",
    "Job",
    "JobEvent",
    "JobOptions",
    "JobOutcome",
    "Limits",
    "LoadStep",
    "Loader",
    "PackedPicture",
    "Packing",
    "PictureFormat",
    "Pipeline",
    "Preview",
    "Priority",
    "Queued",
    "Settled",
    "Started",
    "StepDone",
]
