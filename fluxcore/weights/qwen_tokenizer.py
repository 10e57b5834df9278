"""A tokenizer of Qwen's kind on disk: what all of them share, whatever their merges.

Owns the stages, the added tokens, the chat template and the files. Knows nothing of
where a vocabulary comes from, nor of models; its size is all that they share.

Source: huggingface/transformers src/transformers/models/qwen2/tokenization_qwen2.py;
the files of Qwen/Qwen3-4B; openai/gpt-2 src/encoder.py (bytes_to_unicode).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from fluxcore.errors import CheckpointConfigError
from fluxcore.weights.layout import write_json

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

ADDED_TOKENS = SPECIAL_TOKENS + MARKUP_TOKENS
"""The 26 tokens after those of the vocabulary, in the order of their ids."""

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


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A byte-level vocabulary without its added tokens, in the byte-to-letter spelling."""

    ids: dict[str, int]
    merges: list[tuple[str, str]]

    @classmethod
    def from_merges(cls, merges: Iterable[tuple[str, str]]) -> Vocabulary:
        """The single bytes, then what each merge makes, in order."""
        ids = {letter: i for i, letter in enumerate(sorted(byte_letters()))}
        kept = list(merges)
        for left, right in kept:
            ids.setdefault(left + right, len(ids))
        return cls(ids, kept)


@dataclass(frozen=True, slots=True)
class TokenizerInfo:
    """What the text encoder's config says of its tokenizer.

    Attributes:
        size: number of token ids, the added ones included.
    """

    size: int
    pad_token_id: int
    end_token_id: int


def write_vocabulary(directory: Path, vocabulary: Vocabulary) -> TokenizerInfo:
    """Write ``tokenizer/`` of a checkpoint."""
    first = len(vocabulary.ids)
    added = {token: first + i for i, token in enumerate(ADDED_TOKENS)}
    directory.mkdir(parents=True)
    build_tokenizer(vocabulary).save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", _tokenizer_config(added))
    write_json(directory / "special_tokens_map.json", _special_tokens_map())
    write_json(directory / "added_tokens.json", added)
    write_json(directory / "vocab.json", vocabulary.ids)
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


def build_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
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
