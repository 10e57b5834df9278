"""The demo model's tokenizer: Qwen's kind, with merges learnt from the captions.

Owns the training alone; stages, added tokens, chat template and files are those of
every such tokenizer. The same captions in the same order give the same files.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers.trainers import BpeTrainer

from demo.batches import language_sample
from fluxcore.weights.qwen_tokenizer import (
    ADDED_TOKENS,
    TokenizerInfo,
    Vocabulary,
    build_tokenizer,
    byte_letters,
    write_vocabulary,
)

TEMPLATE_TEXT = "user\nassistant\n\n"
"""What the chat template adds to every prompt beside its special tokens."""


def train_tokenizer(
    captions: Iterable[str], directory: Path, vocabulary: int = 1024
) -> TokenizerInfo:
    """Learn a byte-level BPE from captions and write it as ``tokenizer/``.

    Args:
        captions: as the model will be asked; the template's own words are added.
        directory: where to; must not exist yet.
        vocabulary: token ids at most, the single bytes and the added tokens included.
            Captions of few words give fewer.

    Raises:
        ValueError: not even the bytes and the added tokens fit.
    """
    smallest = len(byte_letters()) + len(ADDED_TOKENS)
    if vocabulary < smallest:
        raise ValueError(f"vocabulary must be at least {smallest}; got {vocabulary}")
    tokenizer = build_tokenizer(Vocabulary.from_merges(()))
    trainer = BpeTrainer(
        vocab_size=vocabulary - len(ADDED_TOKENS),
        initial_alphabet=byte_letters(),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        for caption in captions:
            yield caption
            yield TEMPLATE_TEXT

    tokenizer.train_from_iterator(texts(), trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return write_vocabulary(
        directory, Vocabulary.from_merges((left, right) for left, right in merges)
    )


def main() -> None:
    """Learn the vocabulary of training's captions and instructions."""
    parser = argparse.ArgumentParser(description="Train the demo's tokenizer.")
    parser.add_argument("--out", type=Path, default=Path(".models/training/tokenizer"))
    parser.add_argument("--captions", type=int, default=30_000)
    parser.add_argument("--vocabulary", type=int, default=1024)
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists; remove it, or name another folder with --out")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    train_tokenizer(language_sample(arguments.captions), arguments.out, arguments.vocabulary)


if __name__ == "__main__":
    main()
