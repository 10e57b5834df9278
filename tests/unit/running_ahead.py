"""A device that takes steps ahead, as seen by who waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from fluxcore import FluxPipeline
from fluxcore.pipeline.denoise import Denoising
from fluxcore.runtime import Runtime


def told_ahead(pipe: FluxPipeline, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the pipeline run ahead. Returns what is prepared, begun and waited for, as it happens."""
    told: list[str] = []
    denoising, bytes_of = pipe.denoising, pipe._bytes_of
    velocity_of, numbers = pipe._velocity_of, iter(range(1, 99))

    def velocity(*args: Any) -> Tensor:
        told.append("begun")
        return velocity_of(*args)

    def prepared(*args: Any) -> Denoising:
        told.append("prepared")
        return denoising(*args)

    def decoded(*args: Any) -> tuple[Tensor, ...]:
        told.append("decoding")
        return bytes_of(*args)

    def mark(_: Runtime) -> Callable[[], None]:
        number = next(numbers)
        return lambda: told.append(f"waited for {number}")

    monkeypatch.setattr(pipe, "denoising", prepared)
    monkeypatch.setattr(pipe, "_velocity_of", velocity)
    monkeypatch.setattr(pipe, "_bytes_of", decoded)
    monkeypatch.setattr(Runtime, "runs_ahead", True)
    monkeypatch.setattr(Runtime, "mark", mark)
    return told
