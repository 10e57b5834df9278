"""``fluxd doctor`` at the command line: what it prints, and its exit status."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli import cli
from fluxcore import doctor
from fluxcore.doctor import Finding, Status
from fluxcore.version import __version__


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["doctor", "--device", "cpu", *arguments])
    return done.exit_code, done.output


def block(output: str) -> list[str]:
    """The lines that are meant for a report."""
    return output.split("```")[1].strip().splitlines()


def test_a_sound_machine_ends_in_0_with_a_block_to_paste() -> None:
    status, output = run()
    assert status == 0, output
    first, *lines = block(output)
    assert first == f"fluxd {__version__} doctor"
    names = [line[8:].partition(":")[0] for line in lines]
    assert names == [name for name, _ in doctor.checks("cpu", None)]
    assert len(names) > 10
    assert all(line.startswith(("ok ", "warning ")) for line in lines)
    assert "computes what it should" in output


def test_a_fault_ends_in_1_and_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    fault = Finding(Status.FAULT, "relative error 0.7", "replace the GPU")
    warning = Finding(Status.WARNING, "old", "update")

    def two(device: str, model: object):
        yield "products", lambda: fault
        yield "versions", lambda: warning

    monkeypatch.setattr("app.cli.doctor.checks", two)
    status, output = run()
    assert status == 1
    assert "what to do: replace the GPU" in output
    assert "1 fault:" in output
    assert block(output)[1:] == ["fault   products: relative error 0.7", "warning versions: old"]


def test_warnings_alone_end_in_0(monkeypatch: pytest.MonkeyPatch) -> None:
    warning = Finding(Status.WARNING, "old", "update")
    monkeypatch.setattr("app.cli.doctor.checks", lambda *_: iter([("versions", lambda: warning)]))
    status, output = run()
    assert status == 0
    assert "what to do: update" in output


def test_a_model_that_is_not_there_is_no_fault_of_the_machine(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["doctor", "--model", str(tmp_path / "none")])
    assert done.exit_code == 1
    assert "fluxd: no checkpoint directory at" in done.stderr
    assert "```" not in done.output and "cannot be trusted" not in done.output


def test_the_block_does_not_tell_whose_machine_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    fault = Finding(Status.FAULT, f"OSError: {Path.home() / 'lib.so'} is broken", "report it")
    monkeypatch.setattr("app.cli.doctor.checks", lambda *_: iter([("products", lambda: fault)]))
    _, output = run()
    assert block(output)[1:] == [f"fault   products: OSError: {Path('~/lib.so')} is broken"]


def test_a_device_that_is_not_there_is_told_plainly() -> None:
    done = CliRunner().invoke(cli, ["doctor", "--device", "cuda:63"])
    assert done.exit_code == 1
    assert "fluxd: device cuda" in done.stderr
