"""Steps as one on a device with a clock of its own, on which all can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from fluxcore import FluxPipeline
from fluxcore.pipeline import ConditioningCache
from fluxcore.pipeline.encoded import EncodedJob
from fluxcore.pipeline.joint_steps import COUNTS, Batching, JointSteps
from tests.unit.test_pipeline import painting, params

FASTER = {2: 0.87, 4: 0.865}


@dataclass
class Device:
    """The transformer with a clock of its own, and everything that can be wrong with it.

    Attributes:
        shares: time of a call as one of so many, of its time alone.
        depends: a row's result depends on how many there are.
        full: numbers of rows that do not fit into memory.
        is_real: rows go through the network together, whatever that does to their last bits;
            otherwise one after the other.
        rows: of all calls so far.
    """

    plain: Callable[..., Tensor]
    shares: dict[int, float] = field(default_factory=lambda: dict(FASTER))
    alone_s: float = 0.01
    first_s: float = 0.01
    depends: bool = False
    full: set[int] = field(default_factory=set)
    is_real: bool = False
    rows: list[int] = field(default_factory=list)

    def velocity(self, img: Tensor, txt: Tensor, *rest: Any) -> Tensor:
        count = len(img)
        assert count == len(txt)
        self.rows.append(count)
        if count in self.full:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if self.is_real:
            return self.plain(img, txt, *rest)
        pairs = zip(img.split(1), txt.split(1), strict=True)
        found = torch.cat([self.plain(i.clone(), t.clone(), *rest) for i, t in pairs])
        return found * (1 + 1e-6 * (count - 1)) if self.depends else found

    def took_s(self, work: Callable[[], object], tries: int) -> float:
        seen = len(self.rows)
        for _ in range(tries):
            work()
        if seen == 0:
            return self.first_s
        last = self.rows[-1]
        return self.alone_s * last * self.shares.get(last, 1.0)


@pytest.fixture(scope="module")
def base_pipe(tiny_base_checkpoint: Path) -> FluxPipeline:
    return FluxPipeline.load(tiny_base_checkpoint, device="cpu", dtype="float32")


@pytest.fixture
def pipes(
    tiny_pipeline: FluxPipeline, base_pipe: FluxPipeline, monkeypatch: pytest.MonkeyPatch
) -> dict[str, FluxPipeline]:
    """A distilled and a base model, each with an empty cache of its own."""
    found = {"distilled": tiny_pipeline, "base": base_pipe}
    for pipe in found.values():
        monkeypatch.setattr(pipe, "conditioning_cache", ConditioningCache(2**28))
    return found


@pytest.fixture
def pipe(pipes: dict[str, FluxPipeline]) -> FluxPipeline:
    return pipes["distilled"]


@pytest.fixture
def joining(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Device]:
    """Turn batching on for a pipeline, on a device as described."""

    originals: dict[int, Callable[..., Tensor]] = {}

    def begin(pipe: FluxPipeline, batching: Batching = "exact", **given: Any) -> Device:
        device = Device(originals.setdefault(id(pipe), pipe._velocity_of), **given)

        def took_s(_: JointSteps, work: Callable[[], object], tries: int = 3) -> float:
            return device.took_s(work, tries)

        monkeypatch.setattr(pipe, "_velocity_of", device.velocity)
        monkeypatch.setattr(JointSteps, "_took_s", took_s)
        joint = JointSteps(lambda *args: pipe._velocity_of(*args), pipe.runtime, batching)
        monkeypatch.setattr(pipe, "joint", joint)
        return device

    return begin


def mask_of(width: int, height: int) -> Image.Image:
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (0, 0, width // 2, height))
    return mask


REQUESTS = {
    "plain": ("distilled", {}),
    "reference": ("distilled", {"references": (painting(96, 64),)}),
    "mask": (
        "distilled",
        {
            "references": (painting(64, 64),),
            "mask": mask_of(64, 64),
            "strength": 0.5,
            "steps": 3,
            "width": None,
            "height": None,
        },
    ),
    "guided": ("base", {"guidance": 3.0, "negative_prompt": "fog"}),
}


def shares_of(pipe: FluxPipeline, **fields: Any) -> dict[int, float | None]:
    """What is known of a picture's calls, by how many there are."""
    job = pipe.prepare(params(**fields))
    encoded = EncodedJob(*pipe.encode_text(job), pipe.encode_references(job))
    call = pipe.denoising(job, 0, encoded).calls()[0]
    return {count: pipe.joint.share(call, count) for count in COUNTS}
