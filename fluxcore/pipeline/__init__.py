"""Composition: conditioning, latents, schedule, denoising, pictures."""

from fluxcore.pipeline.conditioning import Conditioning, ConditioningCache
from fluxcore.pipeline.denoise import DenoiseStep
from fluxcore.pipeline.pipeline import FluxPipeline
from fluxcore.pipeline.result import (
    GenerationResult,
    ModelInfo,
    PreparedJob,
    Progress,
    ResolvedParams,
)

__all__ = [
    "Conditioning",
    "ConditioningCache",
    "DenoiseStep",
    "FluxPipeline",
    "GenerationResult",
    "ModelInfo",
    "PreparedJob",
    "Progress",
    "ResolvedParams",
]
