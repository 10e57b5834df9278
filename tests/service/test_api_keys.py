"""API keys: made, hashed, sent in either header, refused in the one shape."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
from typer.testing import CliRunner

from app.cli import cli
from app.keys import ApiKey, KeyRing, digest_of, new_key
from app.settings import Settings, SettingsError, load_settings
from tests.service.conftest import Start, error_of

KEY = new_key()
ENTRY = ApiKey("alice", digest_of(KEY)).entry
BODY = {"prompt": "x", "width": 64, "height": 64}


def made_by_command(*arguments: str, stdin: str | None = None) -> tuple[list[str], Any]:
    done = CliRunner().invoke(cli, ["hash-key", *arguments], input=stdin)
    return done.stdout.splitlines(), done


def test_a_made_key_opens_the_service_with_the_line_that_came_with_it(start: Start) -> None:
    (key, line), _ = made_by_command("alice")
    entry = re.fullmatch(r'api_keys = \["(.+)"\]', line)
    assert entry is not None and key not in line
    client = start(api_keys=entry[1])
    answer = client.post("/v1/generate", json=BODY, headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == 200


def test_a_key_of_ones_own_is_read_from_standard_input(start: Start) -> None:
    own = "k" * 40
    (line,), _ = made_by_command("bob", "--stdin", "--per-minute", "7", stdin=f"{own}\n")
    assert line == f'api_keys = ["bob:{digest_of(own)}:7"]'
    client = start(api_keys=(line.split('"')[1],))
    assert client.post("/v1/generate", json=BODY, headers={"x-api-key": own}).status_code == 200


@pytest.mark.parametrize(
    ("arguments", "stdin", "says"),
    [
        (["bob", "--stdin"], "short\n", "must have 32 to 512 characters; got 5"),
        (["bob", "--stdin"], "", "must have 32 to 512 characters; got 0"),
        (["bob", "--stdin"], "ключ" * 20 + "\n", "ASCII characters"),
        (["bob:x"], None, "a key is written NAME:HASH"),
        ([""], None, "a key is written NAME:HASH"),
    ],
)
def test_what_cannot_be_a_key_or_a_name_is_refused(
    arguments: list[str], stdin: str | None, says: str
) -> None:
    _, done = made_by_command(*arguments, stdin=stdin)
    assert done.exit_code == 2 and says in done.stderr


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": KEY},
        {"Authorization": "Bearer "},
        {"Authorization": f"Bearer {digest_of(KEY)}"},
        {"x-api-key": "x"},
        {"x-api-key": ""},
        {"Authorization": b"Bearer \xff\xfe"},
    ],
)
def test_without_the_key_nothing_is_drawn(start: Start, headers: dict[str, Any]) -> None:
    client = start(api_keys=(ENTRY,))
    answer = client.post("/v1/generate", json=BODY, headers=headers)
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (401, "invalid_api_key")
    assert error["type"] == "invalid_request_error"
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert answer.headers["x-should-retry"] == "false"
    assert KEY[:-1] not in answer.text


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer  {KEY}"},
        {"x-api-key": KEY},
        {"Authorization": "Basic eDp5", "x-api-key": KEY},
    ],
)
def test_the_key_is_taken_from_either_header(start: Start, headers: dict[str, str]) -> None:
    client = start(api_keys=(ENTRY,))
    assert client.post("/v1/generate", json=BODY, headers=headers).status_code == 200


def test_a_key_is_needed_for_addresses_that_do_not_exist_but_not_by_probes(start: Start) -> None:
    client = start(api_keys=(ENTRY,))
    for path in ("/v1/generate", "/v1/nothing", "/metrics", "/health/", "/HEALTH"):
        assert client.get(path).status_code == 401, path
    for path in ("/health", "/ready", "/", "/openapi.json"):
        assert client.get(path).status_code == 200, path


def test_without_keys_in_the_settings_any_key_is_fine(start: Start) -> None:
    headers = {"Authorization": "Bearer sk-anything"}
    assert start().post("/v1/generate", json=BODY, headers=headers).status_code == 200


def test_no_key_is_ever_logged(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    client = start(api_keys=(ENTRY,))
    client.post("/v1/generate", json=BODY, headers={"x-api-key": KEY})
    client.post("/v1/generate", json=BODY, headers={"x-api-key": "a-wrong-key"})
    assert "invalid_api_key" in caplog.text
    assert KEY not in caplog.text and "a-wrong-key" not in caplog.text


def test_each_key_is_found_under_its_own_name() -> None:
    keys = [new_key() for _ in range(20)]
    ring = KeyRing(f"client-{i}:{digest_of(key)}" for i, key in enumerate(keys))
    for i, key in enumerate(keys):
        found = ring.find(key)
        assert found is not None and found.name == f"client-{i}"
    assert ring.find(new_key()) is None
    assert len(set(keys)) == 20 and all(len(key) > 50 for key in keys)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (KEY, "a key is written NAME:HASH"),
        (f"alice:{KEY}", "the 64 hexadecimal digits of its hash, never the key itself"),
        (f"alice:{digest_of(KEY).upper()}", "64 hexadecimal digits"),
        (f"alice:{digest_of(KEY)}:fast", "must be a number of requests a minute"),
        (f"a b:{digest_of(KEY)}", "a key is written NAME:HASH"),
        (f"{ENTRY},{ENTRY}", "two keys are named 'alice'"),
    ],
    ids=["a key alone", "a key for its hash", "capitals", "no rate", "a blank", "a name twice"],
)
def test_a_malformed_entry_is_refused_without_telling_a_key(entry: str, says: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(says)) as refused:
        load_settings({"api_keys": entry}, {})
    assert KEY not in str(refused.value)


def test_keys_of_the_environment_are_a_list() -> None:
    other = ApiKey("bob", digest_of(new_key()), 5).entry
    values = load_settings({}, {"FLUXD_API_KEYS": f"{ENTRY}, {other}"}).values
    assert values.api_keys == (ENTRY, other)
    assert Settings().api_keys == ()
