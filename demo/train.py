"""Train text encoder and transformer together, by flow matching.

    torchrun --nproc-per-node 2 -m demo.train --out .models/training --text-tokens 64
    torchrun --nproc-per-node 2 -m demo.train --out .models/training --text-tokens 512 --resume ...

Noise is mixed into the latents of a rendered scene, and the networks learn the
velocity from picture to noise. Most of training sees texts of 64 tokens, which is
twice as fast; the last part sees 512, padded as every prompt is when drawing,
because the transformer attends to the padding, too.

Source: Flow Matching for Generative Modeling, arXiv 2210.02747.
"""

from __future__ import annotations

import argparse
import contextlib
import random
from collections import deque
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from demo.batches import DRAW, EDIT, MIXES, Batch, Examples, Prompts, loader
from demo.exam import group_of, held_out_captions, held_out_edits
from demo.judge import judge, judge_edit
from demo.learner import Learner, autocast
from demo.render import SceneBatch
from demo.run import Curve, Run, load, save
from demo.steps import Lesson, Steps

REPLAYED_BATCHES = 60


def noise_levels(count: int, device: torch.device) -> Tensor:
    """Mostly high, where a picture of four steps is decided. Shapes: -> [count] in (0, 1).

    Uniform levels, shifted towards noise as the schedule shifts them: by 1 to 8.
    """
    uniform = torch.rand(count, device=device)
    shift = 8 ** torch.rand(count, device=device)
    return shift * uniform / (1 + (shift - 1) * uniform)


class Replay:
    """Fresh batches, each followed by some that were seen before.

    Rendering and encoding a picture costs as much as learning from it, and with other
    noise it teaches something else. All processes replay the same numbers, so that none
    waits for another.
    """

    def __init__(self, learner: Learner, batches: Ahead, times: int, seed: int) -> None:
        self._learner, self._batches, self._times = learner, batches, times
        self._kept: deque[Lesson] = deque(maxlen=REPLAYED_BATCHES)
        self._rng = random.Random(seed)
        self._turn = 0

    def next(self) -> Lesson:
        self._turn += 1
        if (self._turn - 1) % self._times and len(self._kept) > 4:
            return self._kept[self._rng.randrange(len(self._kept))]
        batch = self._batches.next()
        clean, *references = self._learner.latents(batch)
        self._kept.append(Lesson(replace(batch, scenes=()), clean, tuple(references)))
        return self._kept[-1]


def flow_loss(learner: Learner, lesson: Lesson) -> Tensor:
    """Mean squared error of the velocity. Shapes: -> []."""
    clean = lesson.clean.float()
    t = noise_levels(len(clean), clean.device)
    return velocity_loss(learner, lesson, clean, torch.randn_like(clean), t)


def velocity_loss(
    learner: Learner, lesson: Lesson, clean: Tensor, noise: Tensor, t: Tensor
) -> Tensor:
    """Error of the velocity on the straight line from pictures to noise, at levels t.

    Shapes: clean and noise [B, L, C] float32, t [B] -> [].
    """
    batch, level = lesson.batch, t[:, None, None]
    noisy = (1 - level) * clean + level * noise
    with autocast(clean.device):
        txt = learner.text_tokens(batch.ids, batch.count)
        given = [reference.float() for reference in lesson.references]
        velocity = learner.velocity(noisy, given, txt, t, batch.kind)
    return (velocity.float() - (noise - clean)).square().mean()


@torch.no_grad()
def quick_judgement(
    learner: Learner, prompts: Prompts, run: Run, count: int, steps: int
) -> dict[str, float]:
    """Shares of held-out pictures that are right; each process judges its part of ``count``."""
    found: dict[str, list[float]] = {}
    generator = torch.Generator(run.device).manual_seed(run.rank)
    captions = list(held_out_captions(count))[run.rank :: run.world]
    edits = [e for e in held_out_edits(count // 2) if len(e.references) == 1]
    edits = edits[run.rank :: run.world]
    for start in range(0, len(captions), 128):
        part = captions[start : start + 128]
        ids, counts = prompts.encode([text for text, _ in part])
        batch = Batch(DRAW, ids, counts, (SceneBatch.of([s for _, s in part]),)).to(run.device)
        shape = (len(part), DRAW.image_tokens, learner.channels)
        noise = torch.randn(shape, device=run.device, generator=generator)
        latents = learner.draw(noise, (), batch.ids, batch.count, DRAW, steps)
        for picture, (_, scene) in zip(learner.decode(latents, DRAW).cpu(), part, strict=True):
            found.setdefault(group_of(scene), []).append(judge(picture, scene).is_right)
    for start in range(0, len(edits), 128):
        some = edits[start : start + 128]
        ids, counts = prompts.encode([e.instruction for e in some])
        scenes = (
            SceneBatch.of([e.target for e in some]),
            SceneBatch.of([e.references[0] for e in some]),
        )
        batch = Batch(EDIT, ids, counts, scenes).to(run.device)
        reference = learner.latents(batch)[1].float()
        noise = torch.randn(reference.shape, device=run.device, generator=generator)
        latents = learner.draw(noise, (reference,), batch.ids, batch.count, EDIT, steps)
        for picture, edit in zip(learner.decode(latents, EDIT).cpu(), some, strict=True):
            found.setdefault("edits", []).append(judge_edit(picture, edit).is_right)
    return {name: sum(rights) / len(rights) for name, rights in sorted(found.items())}


def train(arguments: argparse.Namespace) -> None:
    """The whole run."""
    run = Run.start(arguments.seed)
    learner = Learner(arguments.vae, run.device)
    transformer, text_encoder = learner.networks()
    if arguments.resume:
        load(arguments.resume, transformer=transformer, text_encoder=text_encoder)
    curve = Curve(arguments.out / f"{arguments.name}.jsonl", run)
    steps = Steps(learner, run, flow_loss, curve, arguments)
    examples = Examples(
        arguments.tokenizer,
        arguments.text_tokens,
        arguments.tokens,
        seed=arguments.seed,
        rank=run.rank,
        first=arguments.first,
        mix=arguments.mix,
    )
    prompts = Prompts(arguments.tokenizer, arguments.text_tokens)
    torch.manual_seed(arguments.seed + 1 + run.rank)
    next_judgement = 1
    with contextlib.closing(Ahead(examples, arguments.workers, run)) as batches:
        replay = Replay(learner, batches, arguments.replays, arguments.seed)
        while steps.progress < 1.0:
            steps.take(replay.next())
            if steps.progress * arguments.judgements >= next_judgement:
                next_judgement += 1
                steps.average.swap()
                shares = quick_judgement(learner, prompts, run, arguments.judged // 2, 4)
                steps.average.swap()
                curve.add(steps.step, **shares)
    steps.average.swap()
    if run.is_first:
        save(
            arguments.out / f"{arguments.name}.pt",
            transformer=transformer,
            text_encoder=text_encoder,
        )
    curve.add(steps.step, **quick_judgement(learner, prompts, run, arguments.judged, 4))
    run.end()


class Ahead:
    """Batches made by other processes, on the device one step before they are needed."""

    def __init__(self, examples: Examples, workers: int, run: Run) -> None:
        self._batches = iter(loader(examples, workers))
        self._device = run.device
        self._next = next(self._batches).to(self._device)

    def next(self) -> Batch:
        batch, self._next = self._next, next(self._batches).to(self._device)
        return batch

    def close(self) -> None:
        del self._batches


def arguments_of(description: str) -> argparse.ArgumentParser:
    """What all programs that train the two networks take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path(".models/training"))
    parser.add_argument("--vae", type=Path, default=Path(".models/training/vae.pt"))
    parser.add_argument("--tokenizer", type=Path, default=Path(".models/training/tokenizer"))
    parser.add_argument("--resume", type=Path, help="networks to go on from")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=1e9, help="end after so long")
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=100_000, help="of one batch on one GPU")
    parser.add_argument("--matrix-lr", type=float, default=3e-3)
    parser.add_argument("--other-lr", type=float, default=1.5e-3)
    parser.add_argument("--average", type=float, default=0.998)
    parser.add_argument("--warm-up", type=int, default=200)
    parser.add_argument("--decay-from", type=float, default=0.5)
    parser.add_argument("--workers", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--judged", type=int, default=400, help="captions at the end")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--mix", choices=MIXES, default="even", help="of tasks and sizes")
    return parser


def main() -> None:
    """Read the command line."""
    parser = arguments_of("Train the demo's text encoder and transformer.")
    parser.add_argument("--name", default="flow", help="of the files written")
    parser.add_argument("--judgements", type=int, default=5, help="while training")
    parser.add_argument("--replays", type=int, default=4, help="times a picture is learnt from")
    parser.add_argument("--first", type=int, default=0, help="number of the first batch")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
