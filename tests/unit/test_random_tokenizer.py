"""The tokenizer of random checkpoints: Qwen's kind, small or rebuilt from its ranks."""

from __future__ import annotations

import base64
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from fluxcore.errors import CheckpointFileError, CheckpointNotFoundError
from fluxcore.weights.qwen_tokenizer import SPLIT_PATTERN, byte_letters
from fluxcore.weights.random_checkpoint import write_random_checkpoint
from fluxcore.weights.random_tokenizer import write_tokenizer

PROMPT = "a red fox in the snow, golden light"
TEXTS = (
    PROMPT,
    "",
    "Don't WE'LL  it's   a test\n\n\tfoo \r\n bar ",
    "cafe\u0301 nai\u0308ve \u212bngstr\u00f6m",
    "1234567 3.14 -- (x+y)*z!!",
    "\ufb01ne \u00bd m\u00b2 \uff21",
    "日本語のテキスト、混ぜる",
    "\U0001f469\u200d\U0001f467 emoji",
    "<|im_start|>user\n<think> </think><|im_end|><|endoftext|>",
)


@pytest.fixture
def tiny(tiny_checkpoint: Path) -> Path:
    return tiny_checkpoint


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


class TestTokenizer:
    def test_transformers_and_tokenizers_agree(self, tiny: Path) -> None:
        theirs = AutoTokenizer.from_pretrained(tiny / "tokenizer")
        raw = Tokenizer.from_file(str(tiny / "tokenizer" / "tokenizer.json"))
        config = read_json(tiny / "text_encoder" / "config.json")
        assert len(theirs) == raw.get_vocab_size() <= config["vocab_size"]
        for text in TEXTS:
            ids = raw.encode(text).ids
            assert theirs(text)["input_ids"] == ids
            assert max(ids, default=0) < config["vocab_size"]
        assert SPLIT_PATTERN == PRETOKENIZE_REGEX
        assert raw.encode("cafe\u0301").ids == raw.encode("caf\u00e9").ids
        assert raw.token_to_id("\u0120fox") in raw.encode("a fox").ids

    def test_special_tokens_and_chat_template(self, tiny: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(tiny / "tokenizer")
        message = [{"role": "user", "content": PROMPT}]
        text = tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        assert text == (
            f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        )
        open_ended = tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True
        )
        assert text == open_ended + "<think>\n\n</think>\n\n"
        padded = tokenizer(text, padding="max_length", truncation=True, max_length=512)
        count = sum(padded["attention_mask"])
        assert padded["attention_mask"] == [1] * count + [0] * (512 - count)
        pad = tokenizer.convert_tokens_to_ids("<|endoftext|>")
        assert padded["input_ids"][count:] == [pad] * (512 - count)
        config = read_json(tiny / "text_encoder" / "config.json")
        assert config["bos_token_id"] == pad == tokenizer.pad_token_id
        assert config["eos_token_id"] == tokenizer.eos_token_id
        assert tokenizer.eos_token == "<|im_end|>"
        kept = tokenizer.decode(padded["input_ids"], skip_special_tokens=True)
        assert kept == f"user\n{PROMPT}\nassistant\n<think>\n\n</think>\n\n"

    def test_rebuilt_from_ranks(self, tmp_path: Path) -> None:
        tokens = [*single_bytes(), b"ab", b"cd", b"bc", b"abcd", b"abc", b"dd", b"abcdd"]
        ranks = rank_file(tmp_path / "ranks", tokens)
        info = write_tokenizer(tmp_path / "tokenizer", ranks)
        assert (info.size, info.pad_token_id, info.end_token_id) == (289, 263, 265)
        merges = (tmp_path / "tokenizer" / "merges.txt").read_text().splitlines()[1:]
        assert merges == ["a b", "c d", "b c", "ab cd", "ab c", "d d", "abcd d"]
        tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
        assert [tokenizer.token_to_id(t) for t in ("<think>", "</think>")] == [287, 288]
        expected = {"abcdd": [b"abcdd"], "abccd": [b"abc", b"cd"], "bcabc": [b"bc", b"abc"]}
        for text, parts in expected.items():
            assert tokenizer.encode(text).ids == [tokens.index(part) for part in parts]

    def test_qwens_own_ranks_give_qwens_own_ids(self, tmp_path: Path) -> None:
        package = importlib.util.find_spec("dashscope")  # found, not imported: it is heavy
        if package is None or package.origin is None:
            pytest.skip("the dashscope package, which holds the ranks, is not installed")
        ranks = Path(package.origin).parent / "resources" / "qwen.tiktoken"
        info = write_tokenizer(tmp_path / "tokenizer", ranks)
        assert (info.size, info.pad_token_id, info.end_token_id) == (151_669, 151_643, 151_645)
        merges = (tmp_path / "tokenizer" / "merges.txt").read_text(encoding="utf-8")
        assert len(merges.splitlines()) == 1 + 151_387  # as Qwen publishes them
        tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
        text = "<|im_start|>user\na fox<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        head = [151_644, 872, 198, 64, 38_835, 151_645, 198]
        tail = [151_644, 77_091, 198, 151_667, 271, 151_668, 271]
        assert tokenizer.encode(text).ids == head + tail

    def test_ranks_that_cannot_be_used(self, tmp_path: Path) -> None:
        def refused(path: Path, error: type[Exception], message: str) -> None:
            with pytest.raises(error, match=message):
                write_random_checkpoint(tmp_path / "x", tokenizer_ranks=path)
            assert not (tmp_path / "x").exists()

        refused(tmp_path / "none", CheckpointNotFoundError, "no list of token ranks")
        garbage = tmp_path / "garbage"
        garbage.write_bytes(b"\x00\x01\n")
        refused(garbage, CheckpointFileError, "is not a list of base64 tokens")
        refused(rank_file(tmp_path / "few", [b"a"]), CheckpointFileError, "all 256 single bytes")
        orphan = rank_file(tmp_path / "orphan", [*single_bytes(), b"ab", b"abcde"])
        refused(orphan, CheckpointFileError, "rank 257 is not a merge of two others")


def single_bytes() -> list[bytes]:
    letters = byte_letters()
    return [bytes([byte]) for byte in sorted(range(256), key=letters.__getitem__)]


def rank_file(path: Path, tokens: list[bytes]) -> Path:
    lines = [b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens)]
    path.write_bytes(b"".join(lines))
    return path
