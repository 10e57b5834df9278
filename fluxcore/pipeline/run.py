"""One job from its prompt to its pictures, slice by slice.

Owns the order of a job's slices, the pictures in the making and the second try of one that came
out broken. Between two slices any other job's may run. The stages themselves are the pipeline's.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, NamedTuple

import torch

from fluxcore.errors import DeviceFaultError
from fluxcore.params import GenerationParams
from fluxcore.pipeline.conditioning import Conditioning
from fluxcore.pipeline.denoise import DenoiseStep, Denoising, Velocity, step_together
from fluxcore.pipeline.encoded import NO_REFERENCES, EncodedJob, EncodedReferences
from fluxcore.pipeline.joint_steps import COUNTS, worthwhile
from fluxcore.pipeline.result import GenerationResult, Progress, Stage
from fluxcore.runtime import StageTimes, translated_errors

if TYPE_CHECKING:
    from torch import Tensor

    from fluxcore.drawn import DrawnPicture
    from fluxcore.pipeline.pipeline import FluxPipeline

QUICK_CHARS = 4096
"""A longer prompt is not read while somebody waits for another job's picture. So many took 2.5 ms
on two cores of an AMD EPYC, 32,000 took 20."""
QUICK_PIXELS = 1024 * 1024
"""A larger picture's noise is not drawn meanwhile, either: that of so many takes 3.5 ms on the host
of an H200."""
ATTEMPTS = 2
"""Tries per picture; GPU faults that leave no error behind are rare and rarely repeat."""


class Begun(NamedTuple):
    """A step of each picture in the making, and what waits for its end."""

    steps: list[DenoiseStep]
    wait: Callable[[], None]


class BegunText(NamedTuple):
    """A job's prompts, which the device may still be at, and what waits for them.

    Attributes:
        faults: as many as the pipeline knew of when this was begun.
    """

    positive: Conditioning
    negative: Conditioning | None
    wait: Callable[[], None]
    faults: int


def begin_ahead(runs: Sequence[Run], most: int = 2) -> None:
    """Begin the next step of one job, or of several that are alike, as one.

    A GPU gets the one after it, too, so that it does not stand still while the host looks at
    what else there is to do.

    Args:
        most: steps that are begun and not shown yet.
    """
    pipe, first = runs[0].pipe, runs[0]
    depth = most if pipe.runtime.runs_ahead else 1
    with torch.inference_mode(), translated_errors():
        pictures = [run.ready() for run in runs]
        while len(first.begun) < depth and not first.ready()[0].is_over:
            steps = iter(step_together(list(chain(*pictures)), pipe.joint.velocities))
            wait = pipe.runtime.mark()
            for run, own in zip(runs, pictures, strict=True):
                run.begun.append(Begun(list(islice(steps, len(own))), wait))


def begin_together(runs: Sequence[Run]) -> bool:
    """Take one step of several jobs as one and wait for it; the next slice of each shows it.

    Returns:
        False where they are not alike, and were left as they are: each takes its own.
    """
    began_s = time.perf_counter()
    with torch.inference_mode(), translated_errors():
        are_alike = len({(run.ready()[0].alike, len(run.begun)) for run in runs}) == 1
    if not are_alike:
        return False
    begin_ahead(runs)
    runs[0].begun[0].wait()
    for run in runs:
        run.times.add("denoise", time.perf_counter() - began_s)
    return True


class Run(Iterator[Progress]):
    """Yields after every slice; ``StopIteration`` carries the ``GenerationResult``.

    A picture that comes out broken is drawn once more before ``DeviceFaultError`` is raised.
    Small pictures of one job are drawn side by side where that was measured to be faster.

    Args:
        alone: as ``FluxPipeline.run`` takes it.

    Attributes:
        times: of its stages so far.
        begun: steps that are not yet shown, in their order.

    Raises:
        InvalidParamsError: the request does not fit the model.
    """

    def __init__(self, pipe: FluxPipeline, params: GenerationParams, *, alone: bool) -> None:
        self.pipe = pipe
        self._alone = alone
        self.times = StageTimes(pipe.runtime.synchronize)
        self.begun: deque[Begun] = deque()
        self._job = pipe.prepare(params)
        self._text: BegunText | None = None
        self._encoded: EncodedJob | None = None
        self._drawn: list[DrawnPicture] = []
        # Those in the making, side by side.
        self._pictures: list[Denoising] = []
        # One that was prepared ahead, or to see what its calls are like, and the first of these:
        # all others of the job have its size.
        self._next: Denoising | None = None
        self._like: Velocity | None = None
        # Of a picture whose last step is not waited for yet.
        self._decoding: Callable[[], DrawnPicture] | None = None
        self._meanwhile: Callable[[], None] = lambda: None
        self._slices = self._work()

    def __next__(self) -> Progress:
        return next(self._slices)

    def close(self) -> None:
        """Abandon the job."""
        self._slices.close()
        self._pictures.clear()
        self.begun.clear()
        self._next = self._like = self._text = self._encoded = self._decoding = None
        self._meanwhile = lambda: None

    def begin(self) -> None:
        """Queue the prompt, and the first step, behind another job's work, before the first slice.

        It waits for nothing, and leaves out what takes the host so long that the other job would be
        answered later.
        """
        params = self._job.params
        if len(params.prompt) + len(params.negative_prompt or "") > QUICK_CHARS:
            return
        with self.times.stage("text", waits=False):
            text = self._begun_text()
            if params.width * params.height <= QUICK_PIXELS:
                self._begin_behind_the_text(text, is_meanwhile=True)

    def meanwhile(self, work: Callable[[], None]) -> None:
        """Have something done when all of the job is queued, before the last of it is waited for.

        It must not raise. It is done again where the last picture is drawn once more.
        """
        self._meanwhile = work

    def ready(self) -> list[Denoising]:
        """The pictures whose steps come next. Only once prompt and references are encoded."""
        if not self._pictures:
            first, wanted = len(self._drawn), len(self._job.params.seeds)
            call = self._call()
            most = self._passes * (wanted - first)
            count = self.pipe.joint.best(call, most) // self._passes
            more = range(first + 1, first + count)
            picture, self._next = self._next or self._denoising(first), None
            self._pictures = [picture, *(self._denoising(index) for index in more)]
            if len({picture.alike for picture in self._pictures}) > 1:
                # Tables of positions were made anew since the first was prepared.
                self._pictures[0] = self._denoising(first)
        return self._pictures

    def try_joining(self, count: int) -> bool:
        """Find out whether so many pictures like this one are better drawn side by side.

        Returns:
            False where that was known.
        """
        joint, most = self.pipe.joint, self._passes * count
        with torch.inference_mode(), translated_errors():
            call = self._call()
            if not joint.is_untried(call, most):
                return False
            began_s = time.perf_counter()
            joint.trial(call, most)
        self.times.add("trial", time.perf_counter() - began_s)
        return True

    def share(self, count: int) -> float:
        """Time of one of so many pictures like this one, drawn together, of its time alone.

        1 where it is not known to be less.
        """
        joint, passes = self.pipe.joint, self._passes
        with torch.inference_mode(), translated_errors():
            call = self._call()
        return worthwhile(joint.taken(call, count * passes) / count / joint.taken(call, passes))

    def _work(self) -> Generator[Progress, None, GenerationResult]:
        pipe, job, times = self.pipe, self._job, self.times
        resolved = job.params
        pipe.runtime.reset_peak()
        with times.stage("text", waits=False):
            text = self._begun_text()
            positive, negative = text.positive, text.negative
            # Before control is handed back: the first step may be taken together with another's.
            self._encoded = EncodedJob(positive, negative, NO_REFERENCES)
            if not positive.cache_hit:  # else the device has nothing to do meanwhile
                self._begin_behind_the_text(text)
            text.wait()
        self._warn_of_cuts(positive, negative)
        yield self._progress("text")

        pieces = []
        for index in range(len(job.request.references)):
            with times.stage("references"):
                pieces.append(pipe.encode_reference(job, index))
            self._encoded = EncodedJob(positive, negative, EncodedReferences.joined(pieces))
            yield self._progress("references")

        wanted = len(resolved.seeds)
        if (wanted > 1 or negative is not None) and self.try_joining(wanted):
            yield self._progress("trial")
        while len(self._drawn) < wanted:
            yield from self._draw()
        return GenerationResult(
            pictures=self._drawn,
            seeds=list(resolved.seeds),
            timings={**times.milliseconds, "total": times.total()},
            warnings=job.warnings,
            params=resolved,
            cache_hit=positive.cache_hit,
            prompt_tokens=positive.token_count,
            peak_bytes=pipe.runtime.peak_bytes(),
        )

    def _draw(self) -> Generator[Progress, None, None]:
        """The next pictures, as many as are drawn side by side."""
        denoised = yield from self._denoised()
        params, after = self._job.params, len(self._drawn) + len(denoised)
        for latents in denoised:
            self._drawn.append((yield from self._decoded(latents, after)))
            done = len(self._drawn)
            is_last = done == len(params.seeds)
            yield Progress("decode", done - 1, params.steps, params.steps, has_more=is_last)

    def _decoded(self, latents: Tensor, after: int) -> Generator[Progress, None, DrawnPicture]:
        """One picture; drawn again once, alone, when the device returns none.

        Args:
            after: index of the first picture that is not in the making yet.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with self.times.stage("decode", waits=False):
                    picture = self._decoding or self._begun_decoding(latents)
                    self._decoding = None
                    if len(self._drawn) + 1 == after:
                        self._prepare_ahead(after)
                    return picture()
            except DeviceFaultError:
                # The fault may lie in what was kept for reuse: none of that may reach
                # the next try, nor the next job.
                self.pipe.forget()
                if attempt == ATTEMPTS:
                    raise
            self._encode_again()
            self._pictures = [self._denoising(len(self._drawn))]
            (latents,) = yield from self._denoised()
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _denoised(self) -> Generator[Progress, None, list[Tensor]]:
        """The final latents of the pictures in the making."""
        first, steps = len(self._drawn), self._job.params.steps
        latents: list[Tensor] = []
        for begun in self._steps():
            latents = [step.latents for step in begun]
            for offset, step in enumerate(begun):
                has_more = offset + 1 < len(begun)
                index = first + offset
                yield Progress("denoise", index, step.index, steps, step, has_more=has_more)
        assert latents, "a schedule has at least one step"
        self._pictures = []
        return latents

    def _steps(self) -> Iterator[list[DenoiseStep]]:
        """Each step once it is done."""
        is_over = False
        while not is_over:
            with self.times.stage("denoise", waits=False):
                begin_ahead((self,))
                steps, wait = self.begun.popleft()
                is_over = not self.begun and self._pictures[0].is_over
                if is_over and self.pipe.runtime.runs_ahead:
                    self._decoding = self._begun_decoding(steps[0].latents)
                wait()
            yield steps

    def _begun_decoding(self, latents: Tensor) -> Callable[[], DrawnPicture]:
        """Of the first picture that is not drawn yet."""
        params = self._job.params
        decoding = self.pipe.begin_decode(latents, params.width, params.height)
        if len(self._drawn) + 1 == len(params.seeds):
            self._meanwhile()
        return decoding

    def _progress(self, stage: Stage) -> Progress:
        return Progress(stage, 0, 0, self._job.params.steps)

    def _begun_text(self) -> BegunText:
        """The prompts, queued if they are not. Not those of before a fault that came to light."""
        pipe = self.pipe
        if self._text is None or self._text.faults != pipe.faults:
            self._next = self._like = None
            self._pictures.clear()
            self.begun.clear()
            positive, negative = pipe.encode_text(self._job)
            self._text = BegunText(positive, negative, pipe.runtime.mark(), pipe.faults)
        return self._text

    def _begin_behind_the_text(self, text: BegunText, *, is_meanwhile: bool = False) -> None:
        """Queue the first step, or what it needs, while the device is at what comes before it.

        A step only where no trial comes before it, and none could be taken as one with it.

        Args:
            is_meanwhile: somebody waits for another job's picture, and must not for a step that has
                to be recorded.
        """
        if self._pictures or self._job.request.references:
            return
        self._encoded = EncodedJob(text.positive, text.negative, NO_REFERENCES)
        if self._next is None:
            self._prepare_ahead(0)
        params, pipe = self._job.params, self.pipe
        is_simple = len(params.seeds) == 1 and params.guidance is None
        if not (pipe.runtime.runs_ahead and is_simple and (self._alone or self._goes_alone)):
            return
        if not is_meanwhile or pipe.is_recorded(self._call()):
            begin_ahead((self,), most=1)

    def _prepare_ahead(self, index: int) -> None:
        """Noise and the like of a picture, while the device is busy with what comes before it."""
        if self.pipe.runtime.runs_ahead and index < len(self._job.params.seeds):
            with torch.inference_mode(), translated_errors():
                self._next = self._denoising(index)

    @property
    def _passes(self) -> int:
        """Calls of the transformer in each step of a picture."""
        return 1 if self._job.params.guidance is None else 2

    @property
    def _goes_alone(self) -> bool:
        """Whether it is known that steps like its own are never joined."""
        with torch.inference_mode(), translated_errors():
            call, most = self._call(), max(COUNTS)
            joint = self.pipe.joint
            return not joint.is_untried(call, most) and joint.best(call, most) == 1

    def _call(self) -> Velocity:
        """A call as every step of this job makes them."""
        if self._like is None:
            self._next = self._next or self._denoising(len(self._drawn))
            self._like = self._next.calls()[0]
        return self._like

    def _denoising(self, index: int) -> Denoising:
        assert self._encoded is not None, "prompt and references come first"
        return self.pipe.denoising(self._job, index, self._encoded)

    def _encode_again(self) -> None:
        """Prompt and references once more, in one go."""
        self._like = None
        with self.times.stage("text"):
            positive, negative = self.pipe.encode_text(self._job)
        references = NO_REFERENCES
        if self._job.request.references:
            with self.times.stage("references"):
                references = self.pipe.encode_references(self._job)
        self._encoded = EncodedJob(positive, negative, references)

    def _warn_of_cuts(self, positive: Conditioning, negative: Conditioning | None) -> None:
        for name, encoded in (("prompt", positive), ("negative_prompt", negative)):
            if encoded is not None and encoded.truncated_tokens:
                self._job.warnings.append(
                    f"the {name} is too long: its last {encoded.truncated_tokens} tokens "
                    "were not used"
                )
