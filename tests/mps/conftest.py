"""What the audits share: a stand-in for ``torch.mps``, and one audited run per dtype policy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

from fluxcore import FluxPipeline
from tests.mps.audit import Audit
from tests.mps.pipelines import Slice, everything, pipeline_on, run_audited


@dataclass
class Waits:
    """How often the host waited for the device on purpose."""

    count: int = 0

    def synchronize(self) -> None:
        self.count += 1


class AuditedRun(NamedTuple):
    """One picture drawn under the audit, and then another.

    Attributes:
        dtype: the policy: ``float16`` (M1 and M2) or ``bfloat16``.
        pipe: for more work under an ``Audit`` that computes.
        waits: after each slice of the first picture, how often the host had waited.
        second: the slices of another prompt and seed, on the same pipeline.
    """

    dtype: str
    pipe: FluxPipeline
    audit: Audit
    picture: Image.Image
    slices: list[Slice]
    waits: list[int]
    second: list[Slice]


@pytest.fixture(scope="package", autouse=True)
def waits() -> Iterator[Waits]:
    """Count what ``torch.mps.synchronize`` would wait for; one thread for the small tensors."""
    waits, threads = Waits(), torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.mps, "synchronize", waits.synchronize)
        patch.setattr(torch.mps, "driver_allocated_memory", lambda: 0)
        yield waits
    torch.set_num_threads(threads)


@pytest.fixture(scope="package", params=["float16", "bfloat16"])
def audited(request: pytest.FixtureRequest, tiny_base_checkpoint: Path, waits: Waits) -> AuditedRun:
    counts: list[int] = []
    with Audit() as audit:
        pipe = pipeline_on(tiny_base_checkpoint, request.param)
        audit.finish("load")
        before = waits.count
        first = run_audited(pipe, everything(), audit, lambda: counts.append(waits.count - before))
        second = run_audited(pipe, everything("a longer prompt, of a dog", seed=8), audit)
    return AuditedRun(
        request.param, pipe, audit, first.picture, first.slices, counts, second.slices
    )


@pytest.fixture(scope="package")
def small_pipeline(tiny_base_checkpoint: Path) -> FluxPipeline:
    """A loaded pipeline in bfloat16, to be used under an ``Audit`` that computes."""
    with Audit():
        return pipeline_on(tiny_base_checkpoint, "bfloat16")
