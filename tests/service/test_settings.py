"""Where settings come from, which source wins, and what is refused."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from app.settings import DEFAULT_CONFIG, Settings, SettingsError, load_settings, toml_value

SHIPPED = Path(__file__).parents[2] / DEFAULT_CONFIG


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text('port = 1001\nhost = "127.0.0.2"\nqueue_limit = 7\n')
    return path


def problem(flags: dict[str, Any] | None = None, variables: dict[str, str] | None = None) -> str:
    with pytest.raises(SettingsError) as refused:
        load_settings(flags or {}, variables or {})
    return str(refused.value)


def test_flags_beat_the_environment_which_beats_the_file_which_beats_defaults(
    config: Path,
) -> None:
    variables = {"FLUXD_PORT": "1002", "FLUXD_HOST": "127.0.0.3", "PATH": "/bin"}
    loaded = load_settings({"port": 1003}, variables, config)
    assert loaded.values.port == 1003
    assert loaded.values.host == "127.0.0.3"
    assert loaded.values.queue_limit == 7
    assert loaded.values.request_timeout_s == 600.0
    assert {name: loaded.origins[name] for name in ("port", "host", "queue_limit", "dtype")} == {
        "port": "flag",
        "host": "environment FLUXD_HOST",
        "queue_limit": f"file {config}",
        "dtype": "default",
    }


def test_the_file_is_named_by_a_flag_else_by_a_variable_else_found(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.toml"
    other.write_text("port = 2001")
    variables = {"FLUXD_CONFIG": str(config)}
    assert load_settings({}, variables).values.port == 1001
    assert load_settings({}, variables, other).values.port == 2001

    monkeypatch.chdir(tmp_path)
    assert load_settings({}, {}).values.port == 7861
    (tmp_path / "config").mkdir()
    other.rename(tmp_path / "config" / "fluxd.toml")
    assert load_settings({}, {}).values.port == 2001


def test_unknown_names_are_refused_with_the_nearest_valid_one(tmp_path: Path) -> None:
    assert problem({"prot": 1}) == "unknown setting 'prot' (flag); did you mean 'port'?"
    assert problem(variables={"FLUXD_QUEUE_LIMT": "1"}) == (
        "unknown environment variable FLUXD_QUEUE_LIMT; did you mean 'FLUXD_QUEUE_LIMIT'?"
    )
    path = tmp_path / "x.toml"
    path.write_text("[server]\nport = 1")
    with pytest.raises(SettingsError, match=r"unknown setting 'server' \(file .*known names: "):
        load_settings({}, {}, path)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("port", "x", "valid integer"),
        ("port", 70_000, "less than or equal to 65535; got 70000"),
        ("port", -1, "greater than or equal to 0"),
        ("queue_limit", 0, "greater than or equal to 1"),
        ("queue_limit", 1_001, "less than or equal to 1000"),
        ("device", "gpu", "should be auto, cpu, mps, cuda or cuda:N; got 'gpu'"),
        ("device", "cuda:x", "should be auto"),
        ("dtype", "int8", "'auto', 'float32', 'bfloat16' or 'float16'"),
        ("log_level", "loud", "'debug', 'info', 'warning' or 'error'"),
        ("log_format", "xml", "'auto', 'human', 'plain' or 'json'"),
        ("default_width", 500, "multiple of 16 from 64 to 2048; got 500 (nearest: 496, 512)"),
        ("max_body_bytes", "many", "ould"),
        ("max_body_bytes", 10, "greater than or equal to 1024"),
        ("max_references", 11, "less than or equal to 10"),
        ("max_image_pixels", 10**9, "less than or equal to"),
        ("warm_up_sizes", "512", "written WIDTHxHEIGHT"),
        ("warm_up_sizes", '["512x512"', 'a list is written one,two or ["one", "two"]'),
        ("warm_up_sizes", ["512x500"], "multiple of 16"),
        ("request_timeout_s", 0, "greater than 0"),
        ("request_timeout_s", "nan", "finite"),
        ("shutdown_grace_s", -1, "greater than or equal to 0"),
        ("host", "", "at least 1 character"),
        ("data_dir", "", "at least 1 character"),
        ("webhook_hosts", "*", "name the hosts"),
        ("webhook_hosts", "http://a", "a host is NAME"),
        ("webhook_networks", "lan", "a network is ADDRESS"),
        ("job_limit", 0, "greater than or equal to 1"),
        ("job_retention_s", "inf", "finite"),
        ("job_storage_bytes", 1, "greater than or equal to"),
    ],
)
def test_values_out_of_range_say_what_is_allowed(name: str, value: Any, says: str) -> None:
    message = problem({name: value})
    assert message.startswith(f"setting {name} (flag): ")
    assert says in message


def test_all_problems_are_listed_at_once_with_their_origin() -> None:
    lines = problem({"port": -1}, {"FLUXD_QUEUE_LIMIT": "0"}).splitlines()
    assert len(lines) == 2
    assert any("queue_limit (environment FLUXD_QUEUE_LIMIT)" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "says"),
    [("port = ", "is not valid TOML"), (b"\xff\xfe", "is not valid TOML"), (None, "No such file")],
)
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, text: str | bytes | None, says: str
) -> None:
    path = tmp_path / "broken.toml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SettingsError, match=says) as refused:
        load_settings({}, {}, path)
    assert str(path) in str(refused.value)


def test_text_values_of_the_environment_become_sizes_and_bytes() -> None:
    variables = {
        "FLUXD_WARM_UP_SIZES": "64x64, 512x768",
        "FLUXD_MAX_BODY_BYTES": "2MiB",
        "FLUXD_MODEL": "/models/klein",
    }
    values = load_settings({}, variables).values
    assert values.warm_up_sizes_px == ((64, 64), (512, 768))
    assert values.max_body_bytes == 2 * 2**20
    assert values.model == Path("/models/klein")
    assert load_settings({}, {"FLUXD_WARM_UP_SIZES": ""}).values.warm_up_sizes == ()
    assert load_settings({"warm_up_sizes": "[]"}, {}).values.warm_up_sizes == ()
    assert load_settings(
        {"allowed_hosts": '["a.example", "b.example"]'}, {}
    ).values.allowed_hosts == (
        "a.example",
        "b.example",
    )


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("localhost", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.0.2.1", False),
        ("example.org", False),
    ],
)
def test_loopback_is_recognised(host: str, is_loopback: bool) -> None:
    assert Settings(host=host).is_loopback is is_loopback


def test_the_data_directory_is_one_for_each_port_or_named_or_off(tmp_path: Path) -> None:
    first, second = Settings(port=1).data_path, Settings(port=2).data_path
    assert first is not None and second is not None
    assert first.is_absolute() and first != second and first.parent.name == "fluxd"
    assert Settings(data_dir=str(tmp_path)).data_path == tmp_path
    assert Settings(data_dir="~/jobs").data_path == Path.home() / "jobs"
    assert Settings(data_dir="off").data_path is None


def test_the_printed_settings_are_a_settings_file(config: Path, tmp_path: Path) -> None:
    loaded = load_settings({"model": '/a b/"c"', "warm_up_sizes": "64x64"}, {}, config)
    printed = tmp_path / "printed.toml"
    printed.write_text(loaded.as_toml())
    assert load_settings({}, {}, printed).values == loaded.values
    assert "port = 1001  # file" in loaded.as_toml()
    for field in Settings.model_fields.values():
        assert field.description and f"# {field.description}" in loaded.as_toml()


def test_the_shipped_file_documents_every_setting_with_its_default() -> None:
    text = SHIPPED.read_text()
    assert tomllib.loads(text) == {}
    shown = dict(re.findall(r"^# ([a-z_]+) = (.+)$", text, flags=re.MULTILINE))
    defaults = Settings().model_dump()
    assert list(shown) == list(defaults)
    for name, value in shown.items():
        if defaults[name] is None:  # an example of what could stand there
            Settings(**tomllib.loads(f"{name} = {value}"))
        else:
            assert value == toml_value(defaults[name])
