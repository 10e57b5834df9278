"""The exam draws what it asks for, judges it and counts it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from demo import exam


def test_the_bundled_model_sits_a_short_exam(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One step is too few for most pictures, so that wrong ones are written, too."""
    asked = ["exam", "--captions", "3", "--edits", "2", "--size", "128x128", "--steps", "1"]
    monkeypatch.setattr(
        sys, "argv", [*asked, "--device", "cpu", "--wrong", str(tmp_path / "wrong")]
    )
    exam.main()
    *table, last = capsys.readouterr().out.splitlines()
    counted = [row.split("|") for row in table[2:]]
    assert sum(int(row[2]) for row in counted) == 5
    assert set(json.loads(last)) == {"one object", "two objects, related", "edits", "seconds"}
    right = sum(round(int(row[2]) * float(row[3].split()[0]) / 100) for row in counted)
    assert len(list((tmp_path / "wrong").iterdir())) == 5 - right > 0


def test_questions_of_other_sizes_are_of_those_sizes() -> None:
    scenes = [scene for _, scene in exam.held_out_captions(4, 384, 256)]
    scenes += [edit.target for edit in exam.held_out_edits(6, 384, 256)]
    assert {(scene.width, scene.height) for scene in scenes} == {(384, 256)}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--captions", "0", "--edits", "0"], "nothing is asked"),
        (["--captions", "-1"], "whole number from 0; got -1"),
        (["--processes", "0"], "whole number from 1; got 0"),
        (["--steps", "0"], "whole number from 1; got 0"),
        (["--size", "250x256"], "multiple of 16 from 128 to 512; got 250x256"),
        (["--size", "256"], "WIDTHxHEIGHT"),
        (["nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_asked_is_said_plainly(
    asked: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["exam", "--device", "cpu", *asked])
    with pytest.raises(SystemExit) as ended:
        exam.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
