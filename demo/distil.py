"""Distil the trained model to 4 steps.

    torchrun --nproc-per-node 2 -m demo.distil --resume .models/training/long.pt

The model draws a pool of pictures in many small steps and keeps the noise that each
came from. A copy of it then learns to go straight from that noise to that picture, most
of the time at the very noise levels that 4 steps visit. What a caption leaves open is
decided by the noise, so nothing is left to blur.

Source: Flow Straight and Fast (rectified flow), arXiv 2209.03003.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from demo.batches import Batch, Examples, Prompts, loader
from demo.learner import Learner
from demo.run import Curve, Run, load, save
from demo.steps import Lesson, Steps
from demo.train import arguments_of, noise_levels, quick_judgement, velocity_loss
from fluxcore.pipeline.schedule import sigmas

STEPS = 4
VISITED_SHARE = 0.7
"""Of examples that stand at a noise level which a picture of 4 steps visits."""


def draw_pool(
    learner: Learner,
    batches: Iterator[Batch],
    run: Run,
    prompts: Prompts,
    arguments: argparse.Namespace,
) -> list[Lesson]:
    """Let the teacher draw; kept on the GPU in bfloat16."""
    pool: list[Lesson] = []
    drawn = 0
    empty = prompts.encode([""])
    while drawn < arguments.pool and run.elapsed_s() < arguments.pool_seconds:
        batch = next(batches).to(run.device)
        target, *references = (tokens.float() for tokens in learner.latents(batch))
        noise = torch.randn_like(target)
        clean = learner.draw(
            noise,
            references,
            batch.ids,
            batch.count,
            batch.kind,
            arguments.teacher_steps,
            arguments.guidance,
            (empty[0].to(run.device), empty[1].to(run.device)),
        )
        given = tuple(reference.bfloat16() for reference in references)
        pool.append(Lesson(replace(batch, scenes=()), clean.bfloat16(), given, noise.bfloat16()))
        drawn += len(target)
    run.say(f"{drawn} pictures by the teacher on each GPU")
    return pool


class StraightLoss:
    """Mean squared error of the velocity along the line from a noise to its picture."""

    def __init__(self) -> None:
        self._levels: dict[int, Tensor] = {}

    def __call__(self, learner: Learner, lesson: Lesson) -> Tensor:
        """Shapes: -> []."""
        assert lesson.noise is not None, "the pool keeps the noise of every picture"
        noise, clean = lesson.noise.float(), lesson.clean.float()
        count, levels = len(noise), self._visited(noise)
        visited = levels[torch.randint(len(levels), (count,), device=noise.device)]
        visits = torch.rand(count, device=noise.device) < VISITED_SHARE
        t = torch.where(visits, visited, noise_levels(count, noise.device))
        return velocity_loss(learner, lesson, clean, noise, t)

    def _visited(self, noise: Tensor) -> Tensor:
        """The levels of a picture of 4 steps; kept, since a graph cannot fetch them."""
        tokens = noise.shape[1]
        if tokens not in self._levels:
            levels = sigmas("flux", STEPS, tokens, 2.0)[:-1]
            self._levels[tokens] = torch.tensor(levels, device=noise.device)
        return self._levels[tokens]


def distil(arguments: argparse.Namespace) -> None:
    """The whole run."""
    run = Run.start(arguments.seed)
    learner = Learner(arguments.vae, run.device)
    transformer, text_encoder = learner.networks()
    load(arguments.resume, transformer=transformer, text_encoder=text_encoder)
    examples = Examples(
        arguments.tokenizer,
        arguments.text_tokens,
        arguments.tokens,
        seed=arguments.seed + 7,
        rank=run.rank,
        mix=arguments.mix,
    )
    prompts = Prompts(arguments.tokenizer, arguments.text_tokens)
    curve = Curve(arguments.out / "distilled.jsonl", run)
    torch.manual_seed(arguments.seed + 100 + run.rank)
    pool = draw_pool(learner, iter(loader(examples, arguments.workers)), run, prompts, arguments)
    steps = Steps(learner, run, StraightLoss(), curve, arguments)
    order = torch.Generator().manual_seed(arguments.seed)
    while steps.progress < 1.0:
        steps.take(pool[int(torch.randint(len(pool), (), generator=order))])
    steps.average.swap()
    if run.is_first:
        save(arguments.out / "distilled.pt", transformer=transformer, text_encoder=text_encoder)
    shares = quick_judgement(learner, prompts, run, arguments.judged, STEPS)
    curve.add(steps.step, **shares)
    run.end()


def main() -> None:
    """Read the command line."""
    parser = arguments_of("Distil the demo's model to 4 steps.")
    parser.set_defaults(
        steps=1000, text_tokens=512, matrix_lr=5e-4, other_lr=3e-4, warm_up=30, decay_from=0.2
    )
    parser.add_argument("--pool", type=int, default=60_000, help="teacher's pictures on each GPU")
    parser.add_argument("--pool-seconds", type=float, default=1e9)
    parser.add_argument("--teacher-steps", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=1.0)
    arguments = parser.parse_args()
    if arguments.resume is None:
        parser.error("--resume must name the trained networks, which are the teacher")
    distil(arguments)


if __name__ == "__main__":
    main()
