"""A pipeline without a model, slow or failing on demand, for tests of order and of failure.

The prompt says what happens: ``fail``, ``oom``, ``fault`` and ``unpackable`` go wrong in
that way; any other prompt draws a grey picture, slice by slice, while ``gate`` is open.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from app.engine import Loader, LoadStep
from fluxcore.drawn import DrawnPicture
from fluxcore.errors import (
    CheckpointNotFoundError,
    DeviceFaultError,
    InvalidParamsError,
    OutOfMemoryError,
)
from fluxcore.params import GenerationParams

WAIT_S = 30.0


@dataclass(frozen=True)
class FakeModel:
    name: str = "fake-model"
    is_bundled: bool = False
    default_side_px: int = 64
    default_steps: int = 4
    default_guidance: float | None = None


@dataclass
class FakeDevice:
    released: int = 0

    def describe(self) -> dict[str, str]:
        return {"device": "fake"}

    def memory_bytes(self) -> dict[str, int]:
        return {"host_peak": 1000, "device_allocated": 2000}

    def release_memory(self) -> None:
        self.released += 1


@dataclass
class FakeCache:
    hits: int = 0
    misses: int = 0
    bytes_used: int = 0


@dataclass(frozen=True)
class FakeResolved:
    width: int
    height: int
    steps: int
    guidance: float | None
    seeds: Sequence[int] = (0,)
    start_step: int = 0


@dataclass(frozen=True)
class FakePrepared:
    params: FakeResolved


@dataclass(frozen=True)
class FakeDenoised:
    """Its latents are a number that tells the image and the step."""

    clean: int

    def predicted_clean(self) -> int:
        return self.clean


@dataclass(frozen=True)
class FakeSlice:
    stage: str
    image_index: int
    step: int
    steps: int
    denoise_step: FakeDenoised | None = None
    has_more: bool = False


@dataclass(frozen=True)
class FakeResult:
    pictures: Sequence[DrawnPicture]
    seeds: Sequence[int]
    timings: dict[str, float]
    warnings: Sequence[str]
    params: FakeResolved
    cache_hit: bool = False
    prompt_tokens: int = 3
    peak_bytes: int = 12345


@dataclass(frozen=True)
class FakeLoadStep:
    component: str
    done_bytes: int
    total_bytes: int


# A picture that no encoder takes.
UNPACKABLE = DrawnPicture(np.zeros((64, 64), np.uint8))


def as_drawn(image: Image.Image) -> DrawnPicture:
    """An RGB image as if it had been drawn."""
    return DrawnPicture(np.asarray(image))


@dataclass
class FakePipeline:
    """See the module. ``ran``, ``ended`` and ``abandoned`` hold prompts, in order;
    ``slices`` holds (prompt, stage, image index, step) of all, ``decoded`` the previews."""

    info: FakeModel = field(default_factory=FakeModel)
    runtime: FakeDevice = field(default_factory=FakeDevice)
    conditioning_cache: FakeCache = field(default_factory=FakeCache)
    begins_ahead: bool = False
    gate: threading.Event = field(default_factory=threading.Event)
    started: threading.Event = field(default_factory=threading.Event)
    ran: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    abandoned: list[str] = field(default_factory=list)
    warmed: list[tuple[int, int]] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)
    slices: list[tuple[str, str, int, int]] = field(default_factory=list)
    decoded: list[int] = field(default_factory=list)
    undecodable: set[int] = field(default_factory=set)
    # How long each slice takes; a wide picture's four times as long as one of half its side.
    slice_s_at_512: float = 0.0

    def __post_init__(self) -> None:
        self.gate.set()

    def close_gate(self) -> None:
        """Let the next job start, and stop it there."""
        self.gate.clear()
        self.started.clear()

    def warm_up(
        self,
        sizes: Sequence[tuple[int, int]],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        for done, size in enumerate(sizes):
            if progress is not None:
                progress(done, len(sizes))
            self.warmed.append(size)

    def prepare(self, params: GenerationParams) -> FakePrepared:
        if params.prompt == "unfit":
            raise InvalidParamsError("references", "references do not fit this model")
        return FakePrepared(
            FakeResolved(
                width=params.width or self.info.default_side_px,
                height=params.height or self.info.default_side_px,
                steps=params.steps or 4,
                guidance=params.guidance,
                seeds=[(params.seed or 0) + i for i in range(params.n)],
            )
        )

    def run(
        self, params: GenerationParams, *, alone: bool = False
    ) -> Generator[FakeSlice, None, FakeResult]:
        prompt, resolved = params.prompt, self.prepare(params).params
        self.threads.add(threading.current_thread().name)
        self.ran.append(prompt)
        self.started.set()
        try:
            for done in slices_of(resolved):
                assert self.gate.wait(WAIT_S), "a test left the gate closed"
                time.sleep(self.slice_s_at_512 * (resolved.width / 512) ** 2)
                self.slices.append((prompt, done.stage, done.image_index, done.step))
                yield done
                _go_wrong(prompt)
        except GeneratorExit:
            self.abandoned.append(prompt)
            if prompt == "unclosable":
                raise RuntimeError("failed as it was abandoned") from None
            raise
        self.ended.append(prompt)
        picture = as_drawn(Image.new("RGB", (resolved.width, resolved.height), "grey"))
        return FakeResult(
            pictures=[UNPACKABLE if prompt == "unpackable" else picture] * params.n,
            seeds=resolved.seeds,
            timings={"text": 1.0, "denoise": 2.0, "decode": 3.0, "total": 6.0},
            warnings=[],
            params=resolved,
        )

    def share(self, run: object, count: int) -> float:
        """Nothing is gained by steps at once."""
        return 1.0

    def begin_together(self, runs: Sequence[object]) -> None:
        raise AssertionError("jobs that gain nothing by it were joined")

    def decode(self, latents: int, width: int, height: int) -> DrawnPicture:
        """A picture whose shade is the number."""
        self.decoded.append(latents)
        if latents in self.undecodable:
            raise DeviceFaultError("the device returned a picture of one constant colour")
        return as_drawn(Image.new("RGB", (width, height), (latents, latents, latents)))


def slices_of(resolved: FakeResolved) -> Iterator[FakeSlice]:
    """What a real pipeline yields, in its order."""
    steps = resolved.steps
    yield FakeSlice("text", 0, 0, steps)
    for image in range(len(resolved.seeds)):
        for step in range(1, steps + 1):
            yield FakeSlice("denoise", image, step, steps, FakeDenoised(100 * image + step))
        yield FakeSlice("decode", image, steps, steps)


def _go_wrong(prompt: str) -> None:
    match prompt:
        case "fail":
            raise RuntimeError("a bug in /secret/path")
        case "oom":
            raise OutOfMemoryError("the device has too little free memory for this job")
        case "fault":
            raise DeviceFaultError("the device returned a picture of one constant colour")


def loader_of(pipeline: FakePipeline) -> Loader:
    """A loader that is done at once."""

    def load(progress: Callable[[LoadStep], None]) -> FakePipeline:
        progress(FakeLoadStep("transformer", 10, 10))
        return pipeline

    return load


def slow_loader(pipeline: FakePipeline, gate: threading.Event) -> Loader:
    """A loader that stands at half until the gate opens; stops when it is told to."""

    def load(progress: Callable[[LoadStep], None]) -> FakePipeline:
        while True:
            progress(FakeLoadStep("transformer", 5, 10))
            if gate.wait(0.01):
                return pipeline

    return load


def failing_loader(progress: Callable[[LoadStep], None]) -> FakePipeline:
    """A loader that finds no checkpoint."""
    raise CheckpointNotFoundError("there is no directory missing-model; download it first")
