"""The tokenizer that is trained on captions."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from demo.architecture import DEMO
from demo.tokenizer import main, train_tokenizer
from fluxcore.text import PromptTokenizer
from fluxcore.weights.qwen_tokenizer import ADDED_TOKENS
from tests.demo.conftest import captions

PROMPTS = (
    "a large red circle in the center on a white background",
    "Don't WE'LL  it's\n\n a\ttest 42",
    "cafe\u0301, 日本語, \U0001f469\u200d\U0001f467",
    "<|im_end|> <think>",
    "",
)


def test_a_caption_costs_a_token_a_word(demo_tokenizer: Path) -> None:
    tokenizer = Tokenizer.from_file(str(demo_tokenizer / "tokenizer.json"))
    for caption in captions():
        words = caption.replace(",", " ,").split()
        assert len(tokenizer.encode(caption).ids) == len(words), caption
    # The chat template's own words, too.
    assert tokenizer.encode("user\n").tokens == ["user", "Ċ"]
    assert tokenizer.encode("assistant\n").tokens == ["assistant", "Ċ"]
    assert tokenizer.encode("\n\n").tokens == ["ĊĊ"]


def test_transformers_reads_the_same_ids(demo_tokenizer: Path) -> None:
    ours = PromptTokenizer(demo_tokenizer)
    theirs = AutoTokenizer.from_pretrained(demo_tokenizer)
    for prompt in PROMPTS:
        text = theirs.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        padded = theirs(text, padding="max_length", truncation=True, max_length=512)
        found = ours.encode(prompt)
        assert list(found.ids) == padded["input_ids"], prompt
        assert found.count == sum(padded["attention_mask"])
    assert theirs.eos_token == "<|im_end|>"
    assert theirs.pad_token == "<|endoftext|>"


def test_sizes_and_determinism(demo_tokenizer: Path, tmp_path: Path) -> None:
    small = train_tokenizer(captions(), tmp_path / "small", 320)
    assert small.size == 320
    again = train_tokenizer(captions(), tmp_path / "again")
    assert 320 < again.size <= DEMO.text_encoder.vocab_size
    for file in sorted(demo_tokenizer.iterdir()):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name
    added = json.loads((tmp_path / "again" / "added_tokens.json").read_text())
    assert list(added) == list(ADDED_TOKENS)
    assert list(added.values()) == list(range(again.size - len(ADDED_TOKENS), again.size))
    with pytest.raises(ValueError, match="at least 282; got 281"):
        train_tokenizer(captions(), tmp_path / "none", 281)


def test_a_folder_that_exists_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tokenizer", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "name another folder with --out" in capsys.readouterr().err
