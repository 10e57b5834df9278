"""The tokenizer files of a random checkpoint: Qwen's kind of tokenizer, small or real.

Owns where the vocabulary and the merges come from. The small tokenizer knows single
bytes and a few English words, so a prompt costs more tokens than with the real one,
and nothing else differs. The real one is rebuilt from Qwen's list of ranks
(``qwen.tiktoken``, Apache-2.0).
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from fluxcore.errors import CheckpointFileError, CheckpointNotFoundError
from fluxcore.weights.qwen_tokenizer import (
    TokenizerInfo,
    Vocabulary,
    byte_letters,
    write_vocabulary,
)

WORDS = (
    "user assistant"
    " the and with from under over near into of in on at by to is are"
    " red green blue white black yellow bright dark light soft golden"
    " fox cat dog bird horse fish tree forest flower garden mountain river lake sea sky"
    " sun moon star snow rain cloud house street city room window table chair book lamp"
    " man woman child face hand photo painting drawing picture style portrait landscape"
)
"""What the small tokenizer has merges for: ``user``, ``assistant``, and the others as
words after a space."""


def write_tokenizer(directory: Path, ranks: Path | None = None) -> TokenizerInfo:
    """Write ``tokenizer/`` of a checkpoint: the small tokenizer, or the real one from ``ranks``.

    Raises:
        CheckpointNotFoundError: ``ranks`` is not there.
        CheckpointFileError: ``ranks`` is not a list of Qwen's kind.
    """
    vocabulary = _small_vocabulary() if ranks is None else _vocabulary_from_ranks(ranks)
    return write_vocabulary(directory, vocabulary)


def _small_vocabulary() -> Vocabulary:
    space = byte_letters()[ord(" ")]
    first, second, *rest = WORDS.split()
    words = (first, second, *(space + word for word in rest))
    merges = ((word[: end - 1], word[end - 1]) for word in words for end in range(2, len(word) + 1))
    return Vocabulary.from_merges(dict.fromkeys(merges))


def _vocabulary_from_ranks(path: Path) -> Vocabulary:
    """Byte-pair merges from a list of byte strings and their ranks, one a line.

    A token's merge is the last one made when its own bytes are merged by the lower
    ranks alone. Source: openai/tiktoken tiktoken/_educational.py and the conversion
    in huggingface/transformers src/transformers/convert_slow_tokenizer.py.
    """
    ranks = _read_ranks(path)
    letters = byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token, rank in ranks.items():
        if len(token) > 1:
            parts = _merge(ranks, token, rank)
            if len(parts) != 2:
                raise CheckpointFileError(
                    f"{path}: the token of rank {rank} is not a merge of two others; "
                    "use the qwen.tiktoken file of the dashscope package"
                )
            merges.append((spell(parts[0]), spell(parts[1])))
    return Vocabulary({spell(token): rank for token, rank in ranks.items()}, merges)


def _read_ranks(path: Path) -> dict[bytes, int]:
    if not path.is_file():
        raise CheckpointNotFoundError(f"no list of token ranks at {path}")
    ranks = {}
    try:
        for line in path.read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error) as error:
        raise CheckpointFileError(
            f"{path} is not a list of base64 tokens and ranks ({error})"
        ) from error
    singles = sum(len(token) == 1 for token in ranks)
    if list(ranks.values()) != list(range(len(ranks))) or singles != 256:
        raise CheckpointFileError(
            f"{path} must list ranks 0, 1, 2 ... in order and all 256 single bytes; "
            f"got {len(ranks)} tokens, {singles} of one byte"
        )
    return ranks


def _merge(ranks: dict[bytes, int], token: bytes, below: int) -> list[bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best, at = below, -1
        for i in range(len(parts) - 1):
            rank = ranks.get(parts[i] + parts[i + 1], below)
            if rank < best:
                best, at = rank, i
        if at < 0:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts
