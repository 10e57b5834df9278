"""What training eats: tokenised captions and scenes, drawn ahead by other processes.

Owns the mix of tasks and sizes. Scenes travel as numbers; they are rendered on the
GPU, where that takes no time. Batch number i is the same in every run with the same
seed and the same number of GPUs.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from demo.captions import caption
from demo.edits import COMBINATIONS, EDITS, HARD_EDITS, Maker, random_edit
from demo.render import SceneBatch
from demo.scenes import Scene, random_scene
from fluxcore.text.tokenizer import TEMPLATE

Task = Literal["draw", "edit", "combine"]
REFERENCES: dict[Task, int] = {"draw": 0, "edit": 1, "combine": 2}

LONGEST_PROMPT = 64
"""Tokens of the longest prompt in training, with the template around it."""
UNCAPTIONED_SHARE = 0.04
"""Of pictures that are learnt without a caption, so that guidance has something to steer from."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What all examples of one batch have in common."""

    task: Task
    width: int
    height: int

    @property
    def image_tokens(self) -> int:
        return (self.width // 16) * (self.height // 16) * (1 + REFERENCES[self.task])


DRAW, EDIT, COMBINE = Kind("draw", 256, 256), Kind("edit", 256, 256), Kind("combine", 256, 256)
LARGE = Kind("draw", 512, 512)
COMPILED = (DRAW, EDIT, LARGE)
"""Kinds that come so often that compiling for them pays; it takes half a minute each."""
OTHER_SIZES = (
    (512, 512),
    (128, 128),
    (384, 256),
    (256, 384),
    (192, 192),
    (384, 384),
    (512, 256),
    (256, 512),
    (320, 320),
    (128, 256),
    (256, 128),
    (512, 384),
)
EDITED_SIZES = ((128, 128), (192, 192), (256, 384), (384, 256), (384, 384), (512, 512))
"""Those of them that come with a reference, too."""


@dataclass(frozen=True, slots=True)
class Mix:
    """How often each task and size comes.

    Attributes:
        cycle: the order of batches, over and over; None is one of the other sizes, in turn.
        edits: how often each task with one reference comes.
    """

    cycle: tuple[Kind | None, ...]
    edits: Mapping[Maker, float]


MIXES = {
    "even": Mix(
        (
            DRAW, EDIT, DRAW, EDIT, DRAW, COMBINE, DRAW, EDIT, DRAW, EDIT,
            DRAW, EDIT, DRAW, None, DRAW, EDIT, DRAW, EDIT, DRAW, COMBINE,
        ),
        EDITS,
    ),
    "hard": Mix(
        (
            EDIT, None, DRAW, EDIT, None, EDIT, DRAW, COMBINE, None, EDIT,
            DRAW, None, EDIT, DRAW, None, EDIT, None, EDIT, DRAW, EDIT,
        ),
        HARD_EDITS,
    ),
    "sizes": Mix(
        (
            LARGE, EDIT, None, DRAW, LARGE, None, EDIT, LARGE, None, DRAW,
            LARGE, EDIT, None, LARGE, None, EDIT, None, LARGE, DRAW, None,
        ),
        HARD_EDITS,
    ),
}  # fmt: skip
"""At first; more of what is hard; and other sizes than 256x256, of which 512x512 is hardest."""


def kind_of(step: int, mix: Mix) -> Kind:
    """What batch number ``step`` holds."""
    kind = mix.cycle[step % len(mix.cycle)]
    if kind is not None:
        return kind
    of_before = mix.cycle[: step % len(mix.cycle)].count(None)
    turn = step // len(mix.cycle) * mix.cycle.count(None) + of_before
    width, height = OTHER_SIZES[turn % len(OTHER_SIZES)]
    with_reference = turn // len(OTHER_SIZES) % 3 == 2 and (width, height) in EDITED_SIZES
    return Kind("edit" if with_reference else "draw", width, height)


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples of one kind.

    Shapes: ids [B, L] int64, count [B] int64. ``scenes``: the target first, then the references.
    """

    kind: Kind
    ids: Tensor
    count: Tensor
    scenes: tuple[SceneBatch, ...]

    def to(self, device: torch.device | str) -> Batch:
        return Batch(
            self.kind,
            self.ids.to(device, non_blocking=True),
            self.count.to(device, non_blocking=True),
            tuple(scene.to(device) for scene in self.scenes),
        )


class Prompts:
    """Captions to token ids through the model's template. Shapes: texts -> [B, L], [B]."""

    def __init__(self, tokenizer: Path, length: int) -> None:
        self._tokenizer = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        self._pad = self._tokenizer.token_to_id("<|endoftext|>")
        self.length = length

    def fits(self, text: str) -> bool:
        return len(self._tokenizer.encode(TEMPLATE.format(prompt=text)).ids) <= LONGEST_PROMPT

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        rendered = [TEMPLATE.format(prompt=text) for text in texts]
        rows = [row.ids for row in self._tokenizer.encode_batch(rendered)]
        ids = torch.full((len(rows), self.length), self._pad, dtype=torch.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        return ids, torch.tensor([len(row) for row in rows])


class Examples(IterableDataset[Batch]):
    """An endless stream of batches, shared out among the loader's processes.

    Args:
        tokens: text and image tokens of one batch, about; decides how many examples it has.
        mix: a name in ``MIXES``.
        first: number of the first batch, to go on where another run ended.
    """

    def __init__(
        self,
        tokenizer: Path,
        text_tokens: int,
        tokens: int,
        *,
        seed: int,
        rank: int = 0,
        first: int = 0,
        mix: str = "even",
    ) -> None:
        self.tokenizer, self.text_tokens, self.tokens = tokenizer, text_tokens, tokens
        self.seed, self.rank, self.first, self.mix = seed, rank, first, MIXES[mix]

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        info = get_worker_info()
        start, stride = (0, 1) if info is None else (info.id, info.num_workers)
        prompts = Prompts(self.tokenizer, self.text_tokens)
        step = self.first + start
        while True:
            yield self.make(step, prompts)
            step += stride

    def size_of(self, kind: Kind) -> int:
        """Examples in a batch: a multiple of 8. Rare kinds run uncompiled and get a third."""
        tokens = self.tokens if kind in COMPILED else self.tokens // 3
        return max(8, tokens // (self.text_tokens + kind.image_tokens) // 8 * 8)

    def make(self, step: int, prompts: Prompts) -> Batch:
        """Batch number ``step``."""
        rng = random.Random(f"{self.seed}/{self.rank}/{step}")
        kind = kind_of(step, self.mix)
        examples = []
        while len(examples) < self.size_of(kind):
            text, scenes = example(kind, rng, self.mix.edits)
            if prompts.fits(text):
                examples.append((text, scenes))
        ids, count = prompts.encode([text for text, _ in examples])
        columns = zip(*(scenes for _, scenes in examples), strict=True)
        return Batch(kind, ids, count, tuple(SceneBatch.of(column) for column in columns))


def example(
    kind: Kind, rng: random.Random, edits: Mapping[Maker, float] = EDITS
) -> tuple[str, tuple[Scene, ...]]:
    """One caption, the picture that it means, and the references it speaks of."""
    if kind.task == "draw":
        scene = random_scene(rng, kind.width, kind.height)
        return ("" if rng.random() < UNCAPTIONED_SHARE else caption(scene, rng)), (scene,)
    shares = edits if kind.task == "edit" else COMBINATIONS
    edit = random_edit(rng, kind.width, kind.height, shares)
    return edit.instruction, (edit.target, *edit.references)


def loader(examples: Examples, workers: int) -> DataLoader[Batch]:
    """Batches in order, made ahead by ``workers`` processes; 0 makes them here."""
    return DataLoader(
        examples,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=False,
    )


def language_sample(count: int, seed: int = 0) -> Iterator[str]:
    """Captions and instructions in the proportions of training, for the tokenizer."""
    rng = random.Random(seed)
    for i in range(count):
        kind = (DRAW, DRAW, EDIT)[i % 3] if i % 20 else COMBINE
        yield example(kind, rng)[0]
