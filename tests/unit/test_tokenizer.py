"""Prompts to ids: equal to transformers on the small and on the real vocabulary."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fluxcore.errors import CheckpointConfigError, CheckpointNotFoundError
from fluxcore.text import PromptTokenizer
from fluxcore.weights.qwen_tokenizer import MARKUP_TOKENS, SPECIAL_TOKENS
from fluxcore.weights.random_tokenizer import write_tokenizer
from tests.unit.checkpoint_copies import edit_json

HARD = [
    "a red fox",
    "",
    " ",
    "   three   spaces   ",
    "\n\n\r\n\t mixed \t\n",
    "ends with a newline\n",
    "it's we're I'LL 'tis O'Neill'S",
    "1234567890 3.14 1,000,000 12th",
    "!!! ... ??? --- *** ((( ))) <<< >>>",
    "https://example.org/?q=a&b=c#d e@f.g",
    "snake_case camelCase kebab-case",
    "{prompt} {} {0} {{nested}} %s %(x)s ${y} {% raw %} {{ messages }}",
    "back\\slash \\n \\u0041 \"quotes\" 'single'",
    "<|im_start|>system\nyou are<|im_end|>\n<|endoftext|>",
    "<think>\n\n</think> <tool_call> </tool_call> <|vision_pad|><|not_a_token|>",
    "<|im_start|<|im_end|> <think </think",
    "e\u0301 \u00e9 A\u030a \u212b \ufb01 \u1e9b\u0323 \uac00 \u1100\u1161",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea",
    "\u4e00\u53ea\u7ea2\u8272\u7684\u72d0\u72f8\u3002\u65e5\u672c\u8a9e\u306e\u6587",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22",
    "\U0001f98a \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "zero\u200bwidth\u00a0nbsp\u3000wide\u2028line\ufeffbom\u00adsoft",
    "\x00\x01\x1f\x7f\x80 control",
    "\U0010ffff \ue000 \ufffd \U000e0001",
    "x" * 700,
    "a fox " * 200,
]


@dataclass(frozen=True)
class Pair:
    """Our tokenizer and the reference's, of one directory."""

    directory: Path
    ours: PromptTokenizer
    reference: Any

    @classmethod
    def load(cls, directory: Path) -> Pair:
        return cls(
            directory,
            PromptTokenizer(directory),
            AutoTokenizer.from_pretrained(directory, local_files_only=True),
        )

    def assert_equal(self, prompt: str) -> None:
        """As diffusers' pipeline renders, cuts and pads. Source: _get_qwen3_prompt_embeds."""
        text = self.reference.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        expected = self.reference(text, padding="max_length", truncation=True, max_length=512)
        found = self.ours.encode(prompt)
        assert list(found.ids) == expected["input_ids"]
        mask = [1] * found.count + [0] * (512 - found.count)
        assert mask == expected["attention_mask"]
        assert found.cut == max(0, len(self.reference(text)["input_ids"]) - 512)


@pytest.fixture(scope="module")
def small(tiny_checkpoint: Path) -> Pair:
    return Pair.load(tiny_checkpoint / "tokenizer")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Qwen's own vocabulary of 151 669 tokens."""
    package = importlib.util.find_spec("dashscope")
    if package is None or package.origin is None:
        pytest.skip("needs the package dashscope, which carries Qwen's vocabulary")
    directory = tmp_path_factory.mktemp("real") / "tokenizer"
    write_tokenizer(directory, Path(package.origin).parent / "resources" / "qwen.tiktoken")
    return Pair.load(directory)


@pytest.fixture(params=["small", "real"])
def pair(request: pytest.FixtureRequest) -> Pair:
    found: Pair = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A tokenizer that a test may break."""
    return shutil.copytree(tiny_checkpoint / "tokenizer", tmp_path / "tokenizer")


@pytest.mark.parametrize("prompt", HARD, ids=range(len(HARD)))
def test_hard_prompts_equal_the_reference(pair: Pair, prompt: str) -> None:
    pair.assert_equal(prompt)


PROMPTS = st.lists(
    st.text(max_size=30)
    | st.sampled_from(SPECIAL_TOKENS + MARKUP_TOKENS + ("\n", " ", "  ", "'s")),
    max_size=8,
).map("".join)


@settings(max_examples=150)
@given(prompt=PROMPTS)
def test_any_prompt_equals_the_reference(small: Pair, prompt: str) -> None:
    small.assert_equal(prompt)


@settings(max_examples=150)
@given(prompt=PROMPTS)
def test_any_prompt_equals_the_reference_with_the_real_vocabulary(real: Pair, prompt: str) -> None:
    real.assert_equal(prompt)


def test_the_real_vocabulary_gives_the_published_ids(real: Pair) -> None:
    found = real.ours.encode("a red fox")
    user, assistant = [151644, 872, 198], [151644, 77091, 198, 151667, 271, 151668, 271]
    prompt = [64, 2518, 38835]
    assert list(found.ids[: found.count]) == [*user, *prompt, 151645, 198, *assistant]
    assert set(found.ids[found.count :]) == {151643}
    assert real.ours.pad_id == 151643
    assert real.ours.largest_id == 151668


def test_there_are_always_512_ids_padded_on_the_right(small: Pair) -> None:
    short = small.ours.encode("fox")
    assert len(short.ids) == 512
    assert short.cut == 0
    assert set(short.ids[short.count :]) == {small.ours.pad_id}
    assert small.ours.pad_id not in short.ids[: short.count]


def test_what_does_not_fit_is_cut_and_counted_exactly(small: Pair) -> None:
    """``~`` is one token of its own. A cut prompt loses the template's end, too."""
    around = small.ours.encode("~").count - 1
    fits = 512 - around
    whole = small.ours.encode("~" * fits)
    assert (whole.count, whole.cut) == (512, 0)
    for surplus in (1, 2, 1000):
        found = small.ours.encode("~" * (fits + surplus))
        assert (len(found.ids), found.count, found.cut) == (512, 512, surplus)
    assert len(set(found.ids[100:])) == 1


def test_lone_surrogates_become_question_marks(pair: Pair) -> None:
    """JSON can carry them; the reference raises TypeError."""
    for prompt in ("x \ud800 y", "\udfff", "\ud83d", "\udc00\ud800"):
        mended = "".join("?" if "\ud800" <= c <= "\udfff" else c for c in prompt)
        assert pair.ours.encode(prompt) == pair.ours.encode(mended)
    assert pair.ours.encode("\U0001f98a") != pair.ours.encode("?")


def test_composed_and_decomposed_letters_are_the_same(pair: Pair) -> None:
    assert pair.ours.encode("caf\u00e9") == pair.ours.encode("cafe\u0301")
    assert pair.ours.encode("\u212b") == pair.ours.encode("A\u030a")


def test_braces_are_letters_like_others(pair: Pair) -> None:
    encodings = {pair.ours.encode(text).ids for text in ("{}", "{prompt}", "{{}}", "{0!r}")}
    assert len(encodings) == 4


def test_special_tokens_in_a_prompt_are_single_ids(small: Pair) -> None:
    plain = small.ours.encode("fox").count
    for token in SPECIAL_TOKENS + MARKUP_TOKENS:
        assert small.ours.encode(f"fox{token}").count == plain + 1


def test_settings_of_the_file_for_cutting_and_padding_are_not_followed(
    copy: Path, small: Pair
) -> None:
    cut = {"direction": "Left", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    pad = {
        "strategy": {"Fixed": 9},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 3,
        "pad_type_id": 0,
        "pad_token": "#",
    }
    edit_json(copy / "tokenizer.json", {"truncation": cut, "padding": pad})
    for prompt in ("fox", "~" * 600):
        assert PromptTokenizer(copy).encode(prompt) == small.ours.encode(prompt)


def test_the_pad_token_may_be_written_with_its_flags(copy: Path, small: Pair) -> None:
    entry = {"content": "<|endoftext|>", "lstrip": False, "special": True}
    edit_json(copy / "tokenizer_config.json", {"pad_token": entry})
    assert PromptTokenizer(copy).pad_id == small.ours.pad_id


@pytest.mark.parametrize("token", [..., "<|unknown|>", "", 3, {"text": "x"}, ["<|endoftext|>"]])
def test_a_pad_token_that_is_none_is_refused(copy: Path, token: object) -> None:
    edit_json(copy / "tokenizer_config.json", {"pad_token": token})
    with pytest.raises(CheckpointConfigError, match="'pad_token' must name a token") as caught:
        PromptTokenizer(copy)
    assert str(copy / "tokenizer_config.json") in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(CheckpointNotFoundError, match="incomplete") as caught:
        PromptTokenizer(copy)
    assert str(copy / name) in str(caught.value)


def _empty(content: bytes) -> bytes:
    return content[:0]


def _half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _another(_: bytes) -> bytes:
    return json.dumps({"version": "1.0", "model": {"type": "Unheard"}}).encode()


@pytest.mark.parametrize("damage", [_empty, _half, _another])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_file_is_named(copy: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    (copy / name).write_bytes(damage((copy / name).read_bytes()))
    with pytest.raises(CheckpointConfigError) as caught:
        PromptTokenizer(copy)
    assert str(copy / name) in str(caught.value)


@pytest.mark.parametrize("marker", ["<|im_start|>", "<|im_end|>", "<think>", "</think>"])
def test_another_model_s_tokenizer_is_told_apart(copy: Path, marker: str) -> None:
    content = json.loads((copy / "tokenizer.json").read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != marker]
    (copy / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointConfigError, match=f"lacks .*{marker.strip('<|>')}"):
        PromptTokenizer(copy)
