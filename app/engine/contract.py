"""What the engine asks of a pipeline: the part of ``FluxPipeline`` that it calls.

Owns no behaviour. It is here so that this package needs no framework to be
imported, and so that a slow or failing pipeline can stand in for scheduling tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from fluxcore.drawn import DrawnPicture
from fluxcore.params import GenerationParams


class LoadStep(Protocol):
    """How far one component has been read."""

    @property
    def component(self) -> str: ...
    @property
    def done_bytes(self) -> int: ...
    @property
    def total_bytes(self) -> int: ...


class Model(Protocol):
    """What was loaded."""

    @property
    def name(self) -> str: ...
    @property
    def is_bundled(self) -> bool: ...
    @property
    def default_side_px(self) -> int: ...
    @property
    def default_steps(self) -> int: ...
    @property
    def default_guidance(self) -> float | None: ...


class Device(Protocol):
    """Where it runs."""

    def describe(self) -> dict[str, str]: ...
    def memory_bytes(self) -> Mapping[str, int]: ...
    def release_memory(self) -> None: ...


class Cache(Protocol):
    """The memory of recent prompts. Its counters may be read from any thread."""

    @property
    def hits(self) -> int: ...
    @property
    def misses(self) -> int: ...
    @property
    def bytes_used(self) -> int: ...


class Resolved(Protocol):
    """A request with every default filled in. Units: pixels."""

    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def guidance(self) -> float | None: ...
    @property
    def seeds(self) -> Sequence[int]: ...
    @property
    def start_step(self) -> int: ...


class Prepared(Protocol):
    """A request that fits the model."""

    @property
    def params(self) -> Resolved: ...


class Result(Protocol):
    """Finished pictures. Units: timings in milliseconds per stage."""

    @property
    def pictures(self) -> Sequence[DrawnPicture]: ...
    @property
    def seeds(self) -> Sequence[int]: ...
    @property
    def timings(self) -> Mapping[str, float]: ...
    @property
    def warnings(self) -> Sequence[str]: ...
    @property
    def params(self) -> Resolved: ...
    @property
    def cache_hit(self) -> bool: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def peak_bytes(self) -> int: ...


class Denoised(Protocol):
    """The latents after one Euler step."""

    def predicted_clean(self) -> Any: ...


class Slice(Protocol):
    """One slice of a job that is done, after which the job may be abandoned.

    ``denoise_step`` is None in stages other than denoising. With ``has_more``, what comes next
    takes no work: the next picture's step, which the same slice took, or the result.
    """

    @property
    def stage(self) -> str: ...
    @property
    def image_index(self) -> int: ...
    @property
    def step(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def denoise_step(self) -> Denoised | None: ...
    @property
    def has_more(self) -> bool: ...


class Run(Protocol):
    """A job's slices; ``StopIteration`` carries the ``Result``.

    Where a pipeline ``begins_ahead``, a run does other work ``meanwhile`` when all of its own is
    queued. Another may then ``begin``, which waits for nothing, before its first slice.
    """

    def meanwhile(self, work: Callable[[], None]) -> None: ...
    def begin(self) -> None: ...
    def __next__(self) -> Slice: ...
    def close(self) -> None: ...


class Pipeline(Protocol):
    """A loaded model. Methods other than ``prepare`` are called from the worker thread only."""

    @property
    def info(self) -> Model: ...
    @property
    def runtime(self) -> Device: ...
    @property
    def conditioning_cache(self) -> Cache: ...
    @property
    def begins_ahead(self) -> bool: ...

    def warm_up(
        self,
        sizes: Sequence[tuple[int, int]],
        progress: Callable[[int, int], None] | None = None,
    ) -> None: ...

    def prepare(self, params: GenerationParams) -> Prepared: ...

    def run(self, params: GenerationParams, *, alone: bool = False) -> Run:
        """A job's slices. One that is alone may begin to draw before its prompt is waited for."""

    def share(self, run: Any, count: int) -> float:
        """Time of a step of one of so many jobs like this one, taken as one, of its time alone.

        Measured where it is not known. 1 where they are better taken one by one.
        """

    def begin_together(self, runs: Sequence[Any]) -> bool:
        """Take a step of several jobs as one; the next slice of each shows it.

        False where they differ after all, and were left as they are.
        """

    def decode(self, latents: Any, width: int, height: int) -> DrawnPicture: ...


# Loads the pipeline on the thread that calls it, reporting after every tensor.
Loader = Callable[[Callable[[LoadStep], None]], Pipeline]
