"""The systemd unit and the launchd agent against the command line, the settings and themselves."""

from __future__ import annotations

import plistlib
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

import pytest

from app.main import LAST_ANSWERS_S
from app.settings import Settings, load_settings
from tests.config.conftest import CONFIG, ROOT

UNIT = CONFIG / "fluxd.service"
AGENT = CONFIG / "local.fluxd.plist"
# What systemd 252 says of the unit, of 10; a unit without any rule has 9.6.
EXPOSURE_AT_MOST = 2.0


def read_unit(text: str) -> dict[str, dict[str, list[str]]]:
    """Sections, names and their values; a name may come more than once."""
    sections: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    section = ""
    for line in text.splitlines():
        if header := re.fullmatch(r"\[(\w+)\]", line):
            section = header[1]
        elif line and not line.startswith("#"):
            name, equals, value = line.partition("=")
            assert equals and section, line
            sections[section][name].append(value)
    return sections


SERVICE = read_unit(UNIT.read_text(encoding="utf-8"))["Service"]


def is_understood(words: list[str]) -> bool:
    """Whether the command line takes these words. Help is shown once all of them are read."""
    program, *rest = words
    assert Path(program).is_absolute()
    command = [str(Path(sys.executable).parent / Path(program).name), *rest, "--help"]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    return done.returncode == 0


def test_the_unit_starts_what_there_is() -> None:
    (line,) = SERVICE["ExecStart"]
    assert is_understood(shlex.split(line))


@pytest.mark.parametrize("words", [["/x/fluxd", "serve", "--confg", "f"], ["/x/fluxd", "serv"]])
def test_a_wrong_command_is_caught(words: list[str]) -> None:
    assert not is_understood(words)


def test_the_unit_s_environment_leads_into_its_directory() -> None:
    given = dict(line.split("=", 1) for line in SERVICE["Environment"])
    settings = load_settings({}, given, CONFIG / "fluxd.toml").values
    state = Path("/var/lib", *SERVICE["StateDirectory"])
    # Everything else that the user could write to is shut.
    assert settings.data_path == state
    assert settings.conditioning_store_path.is_relative_to(state)
    assert settings.compiled_store_path.is_relative_to(state)


def test_a_running_job_has_its_time_to_end() -> None:
    needed_s = Settings().shutdown_grace_s + LAST_ANSWERS_S
    assert int(SERVICE["TimeoutStopSec"][0]) > needed_s
    assert plistlib.loads(AGENT.read_bytes())["ExitTimeOut"] > needed_s


def test_files_suffice_for_all_connections() -> None:
    agent = plistlib.loads(AGENT.read_bytes())
    for limit in (int(SERVICE["LimitNOFILE"][0]), agent["SoftResourceLimits"]["NumberOfFiles"]):
        assert limit >= 4 * Settings().max_connections


def systemd_analyze(*arguments: str) -> str:
    """What the tool says of the unit, whose program need not be installed."""
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("systemd-analyze is not installed")
    done = subprocess.run(
        [tool, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr, done.stderr
    return done.stdout


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The unit, its program one that exists."""
    unit = tmp_path / UNIT.name
    text = UNIT.read_text(encoding="utf-8")
    unit.write_text(text.replace("/opt/fluxd/bin/fluxd", sys.executable), encoding="utf-8")
    return unit


def test_systemd_knows_every_line_of_the_unit(installed: Path) -> None:
    systemd_analyze("verify", "--man=no", str(installed))


def test_systemd_finds_little_that_the_unit_exposes(installed: Path) -> None:
    told = systemd_analyze("security", "--offline=yes", "--no-pager", str(installed))
    exposure = re.search(r"exposure level for \S+ ([0-9.]+)", told)
    assert exposure is not None
    assert float(exposure[1]) <= EXPOSURE_AT_MOST


def test_the_agent_starts_what_there_is() -> None:
    agent = plistlib.loads(AGENT.read_bytes())
    assert is_understood(agent["ProgramArguments"])
    checkout = Path(agent["WorkingDirectory"])
    for path in agent["ProgramArguments"]:
        if path.startswith("/"):
            assert Path(path).is_relative_to(checkout)
    config = Path(agent["ProgramArguments"][-1]).relative_to(checkout)
    assert (ROOT / config).is_file()
    assert f"{agent['Label']}.plist" == AGENT.name
    assert oct(agent["Umask"]) == "0o77"
    assert agent["KeepAlive"] == {"SuccessfulExit": False}
    assert agent["ProcessType"] == "Interactive"


def test_no_key_stands_twice_in_the_agent() -> None:
    for table in ET.parse(AGENT).iter("dict"):
        keys = [key.text for key in table.findall("key")]
        assert len(set(keys)) == len(keys)


def test_the_lines_that_install_the_agent_write_its_paths(tmp_path: Path) -> None:
    text = AGENT.read_text(encoding="utf-8")
    lines = re.findall(r"^  ((?:mkdir|sed) .*)$", text, re.M)
    assert len(lines) == 2
    subprocess.run(
        ["bash", "-euc", "\n".join(lines)],
        cwd=ROOT,
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        timeout=60,
        check=True,
    )
    agent = plistlib.loads((tmp_path / "Library/LaunchAgents" / AGENT.name).read_bytes())
    assert agent["WorkingDirectory"] == str(ROOT)
    assert agent["ProgramArguments"][0] == str(ROOT / ".venv/bin/fluxd")
    assert agent["StandardErrorPath"] == str(tmp_path / "Library/Logs/fluxd.log")
