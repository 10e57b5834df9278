"""From a checkpoint directory to placed, fused, ready networks.

Owns finding the files, checking them against the architecture, renaming,
fusing and placing. Nothing outside this package knows a published tensor name.
"""

from fluxcore.weights.identity import component_identity
from fluxcore.weights.load import (
    LoadProgress,
    LoadReport,
    Placement,
    check_component,
    load_component,
    weight_plan,
)
from fluxcore.weights.plan import Source, WeightPlan
from fluxcore.weights.streaming import stored_embedding, streamed_layers

__all__ = [
    "LoadProgress",
    "LoadReport",
    "Placement",
    "Source",
    "WeightPlan",
    "check_component",
    "component_identity",
    "load_component",
    "stored_embedding",
    "streamed_layers",
    "weight_plan",
]
