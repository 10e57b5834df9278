"""Chat template and tokenizer of the text encoder.

Source: diffusers Flux2KleinPipeline._get_qwen3_prompt_embeds, which renders Qwen3's
chat template with one user message, a generation prompt and thinking switched off.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from fluxcore.config import TEXT_TOKENS, ConfigFile
from fluxcore.errors import CheckpointConfigError, CheckpointNotFoundError

TEMPLATE = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
MARKERS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A prompt as the encoder takes it.

    Attributes:
        ids: exactly 512 token ids, padded on the right.
        count: how many of them are real.
        cut: how many tokens did not fit and were dropped.
    """

    ids: tuple[int, ...]
    count: int
    cut: int

    @property
    def key(self) -> tuple[int, ...]:
        """The real ids, by which the prompt's embeddings are known."""
        return self.ids[: self.count]


class PromptTokenizer:
    """The checkpoint's own tokenizer, loaded from its ``tokenizer/`` directory.

    Raises:
        CheckpointNotFoundError: a file is missing.
        CheckpointConfigError: it is unreadable, or not a Qwen3 tokenizer.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise CheckpointNotFoundError(
                f"{path} is missing; the checkpoint is incomplete, download it again"
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointConfigError(
                f"{path} cannot be read ({error}); download it again"
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        absent = [m for m in MARKERS if self._tokenizer.token_to_id(m) is None]
        if absent:
            raise CheckpointConfigError(
                f"{path} lacks {', '.join(absent)}; it is not a Qwen3 tokenizer"
            )
        self.pad_id = self._pad_id(directory / "tokenizer_config.json")

    @property
    def largest_id(self) -> int:
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def encode(self, prompt: str) -> TokenizedPrompt:
        """Render, tokenize, cut to 512 tokens as the reference does, and pad.

        A cut prompt loses the template's end too, as it does in the reference.
        """
        text = TEMPLATE.format(prompt=_valid_unicode(prompt))
        found = self._tokenizer.encode(text, add_special_tokens=True).ids
        ids = found[:TEXT_TOKENS]
        padding = [self.pad_id] * (TEXT_TOKENS - len(ids))
        return TokenizedPrompt(
            ids=tuple(ids + padding), count=len(ids), cut=max(0, len(found) - TEXT_TOKENS)
        )

    def _pad_id(self, path: Path) -> int:
        """The pad token that the tokenizer's config names, as transformers finds it."""
        token = ConfigFile(path).values.get("pad_token")
        content = token.get("content") if isinstance(token, dict) else token
        pad_id = self._tokenizer.token_to_id(content) if isinstance(content, str) else None
        if pad_id is None:
            raise CheckpointConfigError(
                f"{path}: 'pad_token' must name a token of the vocabulary; got {json.dumps(token)}"
            )
        return int(pad_id)


def _valid_unicode(text: str) -> str:
    """Replace lone surrogates, which JSON can carry and no tokenizer takes."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
