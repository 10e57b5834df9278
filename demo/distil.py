"""Distil the trained model to 4 steps.

    torchrun --nproc-per-node 2 -m demo.distil --resume .models/training/flow.pt

The model draws a pool of pictures in many small steps and keeps the noise that each
came from. A copy of it then learns to go straight from that noise to that picture, most
of the time at the very noise levels that 4 steps visit. What a caption leaves open is
decided by the noise, so nothing is left to blur.

Source: Flow Straight and Fast (rectified flow), arXiv 2209.03003.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from demo.batches import Batch, Examples, Prompts, loader
from demo.learner import Learner, compiled_for
from demo.optimisers import make_optimisers
from demo.run import Average, Curve, Gradients, Run, load, save, set_lr, trapezoid
from demo.train import (
    arguments_of,
    curve_name,
    noise_levels,
    quick_judgement,
    velocity_loss,
)
from fluxcore.pipeline.schedule import sigmas

STEPS = 4
VISITED_SHARE = 0.7
"""Of examples that stand at a noise level which a picture of 4 steps visits."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Noise and the picture that the teacher drew from it, for one batch.

    Shapes: noise, clean and each reference [B, L, C], bfloat16.
    """

    batch: Batch
    noise: Tensor
    clean: Tensor
    references: tuple[Tensor, ...]


def draw_pool(
    learner: Learner,
    batches: Iterator[Batch],
    run: Run,
    prompts: Prompts,
    arguments: argparse.Namespace,
) -> list[Pair]:
    """Let the teacher draw; kept on the GPU in bfloat16."""
    pool: list[Pair] = []
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
        small = (noise.bfloat16(), clean.bfloat16(), tuple(r.bfloat16() for r in references))
        pool.append(Pair(replace(batch, scenes=()), *small))
        drawn += len(target)
    run.say(f"{drawn} pictures by the teacher on each GPU")
    return pool


def straight_loss(learner: Learner, pair: Pair) -> Tensor:
    """Mean squared error of the velocity along the straight line. Shapes: -> []."""
    noise, clean = pair.noise.float(), pair.clean.float()
    count = len(noise)
    levels = torch.tensor(sigmas("flux", STEPS, noise.shape[1], 2.0)[:-1], device=noise.device)
    visited = levels[torch.randint(len(levels), (count,), device=noise.device)]
    visits = torch.rand(count, device=noise.device) < VISITED_SHARE
    t = torch.where(visits, visited, noise_levels(count, noise.device))
    return velocity_loss(learner, pair.batch, clean, noise, pair.references, t)


def distil(arguments: argparse.Namespace) -> None:
    """The whole run."""
    run = Run.start(arguments.seed)
    learner = Learner(arguments.vae, run.device)
    transformer, text_encoder = networks = learner.networks()
    load(arguments.resume, transformer=transformer, text_encoder=text_encoder)
    if arguments.compile:
        learner.compile_blocks()
    examples = Examples(
        arguments.tokenizer,
        arguments.text_tokens,
        arguments.tokens,
        seed=arguments.seed + 7,
        rank=run.rank,
    )
    prompts = Prompts(arguments.tokenizer, arguments.text_tokens)
    curve = Curve(arguments.out / "distilled.jsonl", run)
    torch.manual_seed(arguments.seed + 100 + run.rank)
    pool = draw_pool(learner, iter(loader(examples, arguments.workers)), run, prompts, arguments)
    optimisers = make_optimisers(networks, arguments.matrix_lr, arguments.other_lr)
    gradients, average = Gradients(networks, run, 1.0), Average(networks, arguments.average)
    order = torch.Generator().manual_seed(arguments.seed)
    step, progress = 0, 0.0
    while progress < 1.0:
        if step % 20 == 0:
            progress = run.progress(step, arguments.steps, arguments.seconds)
        set_lr(optimisers, trapezoid(progress, step, arguments.warm_up, arguments.decay_from))
        pair = pool[int(torch.randint(len(pool), (), generator=order))]
        gradients.clear()
        with compiled_for(pair.batch.kind):
            loss = straight_loss(learner, pair)
            loss.backward()
        norm = gradients.finish()
        for optimiser in optimisers:
            optimiser.step()
        average.update()
        if step % 50 == 0:
            curve.add(step, **{curve_name(pair.batch.kind): loss.detach(), "norm": norm})
        step += 1
    average.swap()
    for steps in (4, 2):
        curve.add(
            step, steps=steps, **quick_judgement(learner, prompts, run, arguments.judged, steps)
        )
    if run.is_first:
        save(arguments.out / "distilled.pt", transformer=transformer, text_encoder=text_encoder)
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
    distil(parser.parse_args())


if __name__ == "__main__":
    main()
