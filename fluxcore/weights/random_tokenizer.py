"""The tokenizer files of a random checkpoint: Qwen's kind of tokenizer, small or real.

Owns the vocabulary, the merges, the special tokens and the chat template. Knows
nothing of models and weights; the size of the vocabulary is all they share.

The small tokenizer knows single bytes and a few English words, so a prompt costs
more tokens than with the real one, and nothing else differs. The real one is
rebuilt from Qwen's list of ranks (``qwen.tiktoken``, Apache-2.0).

Source: huggingface/transformers src/transformers/models/qwen2/tokenization_qwen2.py;
the files of Qwen/Qwen3-4B; openai/gpt-2 src/encoder.py (bytes_to_unicode).
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from fluxcore.errors import CheckpointConfigError, CheckpointFileError, CheckpointNotFoundError

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
MARKUP_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
"""One token each, as the special ones are, but not dropped when text is decoded."""

PAD_TOKEN = "<|endoftext|>"
END_TOKEN = "<|im_end|>"

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

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


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A byte-level vocabulary without its added tokens, in the byte-to-letter spelling."""

    ids: dict[str, int]
    merges: list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class TokenizerInfo:
    """What the text encoder's config says of its tokenizer.

    Attributes:
        size: number of token ids, the added ones included.
    """

    size: int
    pad_token_id: int
    end_token_id: int


def write_tokenizer(directory: Path, ranks: Path | None = None) -> TokenizerInfo:
    """Write ``tokenizer/`` of a checkpoint: the small tokenizer, or the real one from ``ranks``.

    Raises:
        CheckpointNotFoundError: ``ranks`` is not there.
        CheckpointFileError: ``ranks`` is not a list of Qwen's kind.
    """
    vocabulary = _small_vocabulary() if ranks is None else _vocabulary_from_ranks(ranks)
    tokenizer = _build(vocabulary)
    first = len(vocabulary.ids)
    added = {token: first + i for i, token in enumerate(SPECIAL_TOKENS + MARKUP_TOKENS)}
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(directory / "tokenizer_config.json", _tokenizer_config(added))
    _write_json(directory / "special_tokens_map.json", _special_tokens_map())
    _write_json(directory / "added_tokens.json", added)
    _write_json(directory / "vocab.json", vocabulary.ids)
    merges = "".join(f"{left} {right}\n" for left, right in vocabulary.merges)
    (directory / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return TokenizerInfo(
        size=first + len(added),
        pad_token_id=added[PAD_TOKEN],
        end_token_id=added[END_TOKEN],
    )


def check_fits(info: TokenizerInfo, vocab_size: int) -> None:
    """Check that the text encoder has an embedding for every token.

    Raises:
        CheckpointConfigError: it has too few.
    """
    if info.size > vocab_size:
        raise CheckpointConfigError(
            f"vocab_size must be at least {info.size}, the size of the tokenizer; got {vocab_size}"
        )


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte, by byte value.

    Source: openai/gpt-2 src/encoder.py, bytes_to_unicode: printable Latin-1 letters
    stand for themselves, the other bytes take the letters from U+0100 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters = []
    spare = 0x100
    for byte in range(256):
        if byte in printable:
            letters.append(chr(byte))
        else:
            letters.append(chr(spare))
            spare += 1
    return letters


def _small_vocabulary() -> Vocabulary:
    letters = byte_letters()
    ids = {letter: i for i, letter in enumerate(sorted(letters))}
    merges = []
    space = letters[ord(" ")]
    first, second, *rest = WORDS.split()
    for word in (first, second, *(space + word for word in rest)):
        for end in range(2, len(word) + 1):
            if word[:end] not in ids:
                merges.append((word[: end - 1], word[end - 1]))
                ids[word[:end]] = len(ids)
    return Vocabulary(ids, merges)


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


def _build(vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer's stages as Qwen's. Source: transformers Qwen2Tokenizer."""
    tokenizer = Tokenizer(BPE(vocab=vocabulary.ids, merges=vocabulary.merges, fuse_unk=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKUP_TOKENS])
    return tokenizer


def _tokenizer_config(added: dict[str, int]) -> dict[str, Any]:
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token_id): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": token in SPECIAL_TOKENS,
            }
            for token, token_id in added.items()
        },
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_TOKEN,
        "errors": "replace",
        "model_max_length": 131_072,
        "pad_token": PAD_TOKEN,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _special_tokens_map() -> dict[str, Any]:
    def entry(token: str) -> dict[str, Any]:
        flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
        return {"content": token, **flags}

    return {
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "eos_token": entry(END_TOKEN),
        "pad_token": entry(PAD_TOKEN),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
