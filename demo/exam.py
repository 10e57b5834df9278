"""The exam: held-out captions and edits, drawn by a checkpoint and judged.

    python -m demo.exam [MODEL] [--captions 1000] [--edits 300] [--size 256x256]

Drawn in 4 steps with seeds 0, 1, 2 ...; prints what share is right, and as the last line JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from demo.captions import caption
from demo.edits import COMBINATIONS, EDITS, Edit, random_edit
from demo.judge import CRITERIA, Verdict, judge, judge_edit, picture_of, to_pixels
from demo.scenes import Scene, random_scene
from fluxcore import FluxPipeline, GenerationParams
from fluxcore.errors import FluxError

CAPTIONS_SEED, EDITS_SEED = 20_260_101, 20_260_102


@dataclass(slots=True)
class Tally:
    """Verdicts by group, and how often each criterion failed."""

    right: Counter[str]
    seen: Counter[str]
    failures: dict[str, Counter[str]]

    @classmethod
    def empty(cls) -> Tally:
        return cls(Counter(), Counter(), defaultdict(Counter))

    def add(self, group: str, verdict: Verdict) -> None:
        self.seen[group] += 1
        self.right[group] += verdict.is_right
        for name in CRITERIA:
            self.failures[group][name] += not getattr(verdict, name)

    def asked(self, *groups: str) -> int:
        """How many pictures some groups have."""
        return sum(self.seen[g] for g in groups)

    def share(self, *groups: str) -> float:
        """Of pictures that are right, over some groups, which have any."""
        return sum(self.right[g] for g in groups) / self.asked(*groups)

    def table(self) -> str:
        lines = [
            f"| what | pictures | right | wrong: {' / '.join(CRITERIA)} |",
            "|---|---|---|---|",
        ]
        for group in sorted(self.seen):
            wrong = " / ".join(str(self.failures[group][name]) for name in CRITERIA)
            lines.append(
                f"| {group} | {self.seen[group]} | {100 * self.share(group):.1f} % | {wrong} |"
            )
        return "\n".join(lines)


def group_of(scene: Scene) -> str:
    """The row of the table that a captioned scene counts in."""
    if len(scene.figures) == 1:
        return "one object"
    if scene.relation is not None:
        return "two objects, related"
    return "two objects, side by side or placed" if len(scene.figures) == 2 else "three objects"


def held_out_captions(
    count: int, width: int = 256, height: int = 256
) -> Iterator[tuple[str, Scene]]:
    """Always the same captions of scenes that training never saw."""
    rng = random.Random(CAPTIONS_SEED)
    for _ in range(count):
        scene = random_scene(rng, width, height, held_out=True)
        yield caption(scene, rng), scene


def held_out_edits(count: int, width: int = 256, height: int = 256) -> Iterator[Edit]:
    """Always the same tasks with references; one in six has two."""
    rng = random.Random(EDITS_SEED)
    for i in range(count):
        shares = COMBINATIONS if i % 6 == 5 else EDITS
        yield random_edit(rng, width, height, shares, held_out=True)


@dataclass(frozen=True, slots=True)
class Question:
    """One picture to draw. The seed is its number."""

    seed: int
    asked: tuple[str, Scene] | Edit

    @property
    def group(self) -> str:
        """The row of the table that it counts in."""
        asked = self.asked
        return f"edit: {asked.kind}" if isinstance(asked, Edit) else group_of(asked[1])

    @property
    def text(self) -> str:
        return self.asked.instruction if isinstance(self.asked, Edit) else self.asked[0]

    def params(self, steps: int) -> GenerationParams:
        """What to ask the model for."""
        asked = self.asked
        scene = asked.target if isinstance(asked, Edit) else asked[1]
        references = asked.references if isinstance(asked, Edit) else ()
        return GenerationParams(
            prompt=self.text,
            references=tuple(picture_of(reference) for reference in references),
            width=scene.width,
            height=scene.height,
            steps=steps,
            seed=self.seed,
        )

    def verdict(self, image: Image.Image) -> Verdict:
        """What is right about the picture that came."""
        pixels, asked = to_pixels(image), self.asked
        return judge_edit(pixels, asked) if isinstance(asked, Edit) else judge(pixels, asked[1])


Answer = tuple[str, Verdict]


def answers(
    questions: Sequence[Question], device: str, arguments: argparse.Namespace
) -> list[Answer]:
    """Draw and judge; in a process of its own where there are several."""
    pipe = FluxPipeline.load(arguments.model, device=device, dtype=arguments.dtype)
    found = []
    for question in questions:
        image = pipe.generate(question.params(arguments.steps)).images[0]
        verdict = question.verdict(image)
        found.append((question.group, verdict))
        if not verdict.is_right and arguments.wrong is not None:
            arguments.wrong.mkdir(parents=True, exist_ok=True)
            failed = "-".join(name for name in CRITERIA if not getattr(verdict, name))
            words = "".join(c if c.isalnum() else "_" for c in question.text)[:100]
            kind = "edit" if isinstance(question.asked, Edit) else "draw"
            image.save(arguments.wrong / f"{kind}-{question.seed:04d}-{failed}-{words}.png")
    return found


def examine(arguments: argparse.Namespace) -> Tally:
    """Share the questions out among the processes, and those among the GPUs."""
    captions = held_out_captions(arguments.captions, *arguments.size)
    edits = held_out_edits(arguments.edits, *arguments.size)
    questions = [Question(*numbered) for part in (captions, edits) for numbered in enumerate(part)]
    tally, count = Tally.empty(), min(arguments.processes, len(questions))
    devices = [arguments.device] * count
    if arguments.device == "auto" and torch.cuda.is_available():
        devices = [f"cuda:{i % torch.cuda.device_count()}" for i in range(count)]
    parts = [questions[i::count] for i in range(count)]
    if count == 1:
        results = [answers(parts[0], devices[0], arguments)]
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(count, mp_context=spawn) as pool:
            results = list(pool.map(answers, parts, devices, [arguments] * count))
    for group, verdict in (answer for part in results for answer in part):
        tally.add(group, verdict)
    return tally


def size_of(text: str) -> tuple[int, int]:
    """Width and height of ``384x256``."""
    numbers = text.split("x")
    sides = [int(number) for number in numbers if number.isdecimal()]
    if len(numbers) != 2 or len(sides) != 2 or any(s % 16 or not 128 <= s <= 512 for s in sides):
        raise argparse.ArgumentTypeError(
            f"must be WIDTHxHEIGHT, each a multiple of 16 from 128 to 512; got {text}"
        )
    return sides[0], sides[1]


def number_from(least: int) -> Callable[[str], int]:
    """A reader of whole numbers that are not below ``least``."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least}; got {text}")
        return int(text)

    return read


def main() -> None:
    """Examine a checkpoint and print the table and, as the last line, JSON."""
    parser = argparse.ArgumentParser(description="Examine a model that draws shapes.")
    parser.add_argument("model", type=Path, nargs="?", help="default: the bundled model")
    parser.add_argument("--captions", type=number_from(0), default=1000)
    parser.add_argument("--edits", type=number_from(0), default=300)
    parser.add_argument("--size", type=size_of, default=(256, 256))
    parser.add_argument("--steps", type=number_from(1), default=4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--processes", type=number_from(1), default=1, help="that draw at once")
    parser.add_argument("--wrong", type=Path, help="write pictures that are wrong to this folder")
    arguments = parser.parse_args()
    if arguments.captions + arguments.edits == 0:
        parser.error("nothing is asked: --captions or --edits must be above 0")
    started_s = time.monotonic()
    try:
        tally = examine(arguments)
    except FluxError as error:
        parser.error(str(error))
    print(tally.table())
    edits = [group for group in tally.seen if group.startswith("edit: ")]
    groups = {
        "one object": ["one object"],
        "two objects, related": ["two objects, related"],
        "edits": edits,
    }
    shares = {name: tally.share(*part) for name, part in groups.items() if tally.asked(*part)}
    print(json.dumps({**shares, "seconds": round(time.monotonic() - started_s, 1)}))


if __name__ == "__main__":
    main()
