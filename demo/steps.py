"""One step of learning: forward, backward, update. On a GPU the first two are a CUDA graph.

Owns the loop that training and distillation share. The text encoder has 27 thin
layers, and a step launches thousands of small kernels: launched one by one, the GPU
waits for the host. A graph of each kind of batch is captured once and replayed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from demo.batches import Batch, Kind
from demo.learner import Learner, compiled_for
from demo.optimisers import make_optimisers
from demo.run import Average, Curve, Gradients, Run, set_lr, trapezoid

WARM_UPS = 2
"""Steps before a capture: whatever compiles, chooses or allocates must have done so."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """A batch whose pictures are in the latent space.

    Attributes:
        noise: where the way to the picture starts, if that is fixed.

    Shapes: clean, noise and each reference [B, h w, C] bfloat16.
    """

    batch: Batch
    clean: Tensor
    references: tuple[Tensor, ...]
    noise: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All that a loss reads."""
        noise = [] if self.noise is None else [self.noise]
        return [self.batch.ids, self.batch.count, self.clean, *self.references, *noise]

    def copied(self) -> Lesson:
        """The same in memory of its own."""
        batch = replace(self.batch, ids=self.batch.ids.clone(), count=self.batch.count.clone())
        noise = None if self.noise is None else self.noise.clone()
        return Lesson(batch, self.clean.clone(), tuple(r.clone() for r in self.references), noise)


Loss = Callable[[Learner, Lesson], Tensor]


class Captured:
    """Forward and backward of one kind of lesson as a CUDA graph.

    Gradients are added to what the parameters hold; the caller clears them.
    """

    def __init__(self, work: Callable[[Lesson], Tensor], lesson: Lesson, pool: object) -> None:
        self._inputs = lesson.copied()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                work(self._inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        # "thread_local": other GPUs are watched by a thread of their own, which may go on.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._loss = work(self._inputs)

    def __call__(self, lesson: Lesson) -> Tensor:
        torch._foreach_copy_(self._inputs.tensors(), lesson.tensors())
        self._graph.replay()
        return self._loss


class Steps:
    """A run's steps, from the first to the last.

    Attributes:
        step: how many were taken.
        progress: how far the run is, from 0 to 1.
        average: the networks' average, which is what is kept.
    """

    def __init__(
        self,
        learner: Learner,
        run: Run,
        loss: Loss,
        curve: Curve,
        arguments: argparse.Namespace,
    ) -> None:
        networks = learner.networks()
        self.step, self.progress = 0, 0.0
        self.average = Average(networks, arguments.average)
        self._learner, self._run, self._loss, self._curve = learner, run, loss, curve
        self._arguments = arguments
        self._optimisers = make_optimisers(networks, arguments.matrix_lr, arguments.other_lr)
        self._gradients = Gradients(networks, run, 1.0)
        self._examples = 0
        self._graphs: dict[Kind, Captured] = {}
        self._captures = arguments.graphs and run.device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._captures else None
        if arguments.compile:
            learner.compile_blocks()

    def take(self, lesson: Lesson) -> None:
        """Learn from one batch."""
        arguments, run = self._arguments, self._run
        if self.step % 20 == 0:
            self.progress = run.progress(self.step, arguments.steps, arguments.seconds)
        share = trapezoid(self.progress, self.step, arguments.warm_up, arguments.decay_from)
        set_lr(self._optimisers, share)
        loss = self._gradients_of(lesson)
        norm = self._gradients.finish()
        for optimiser in self._optimisers:
            optimiser.step()
        self.average.update()
        self._examples += len(lesson.clean) * run.world
        if self.step % 50 == 0:
            name = curve_name(lesson.batch.kind)
            self._curve.add(self.step, **{name: loss, "norm": norm, "examples": self._examples})
        self.step += 1

    def _gradients_of(self, lesson: Lesson) -> Tensor:
        """The loss, and its gradients where the parameters keep them. Shapes: -> []."""
        kind = lesson.batch.kind
        if not self._captures:
            self._gradients.clear()
            return self._forward_and_backward(lesson)
        if kind not in self._graphs:
            self._graphs[kind] = Captured(self._forward_and_backward, lesson, self._pool)
        self._gradients.clear()
        return self._graphs[kind](lesson)

    def _forward_and_backward(self, lesson: Lesson) -> Tensor:
        with compiled_for(lesson.batch.kind):
            loss = self._loss(self._learner, lesson)
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


def curve_name(kind: Kind) -> str:
    """Losses of other sizes are larger, and have a curve of their own."""
    return f"loss_{kind.task}" if (kind.width, kind.height) == (256, 256) else "loss_other_size"
