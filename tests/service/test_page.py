"""The page's files: what browsers get, what they may do with it, and that it is all there."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

from app.api.page import MEDIA_TYPES, PAGE_HEADERS, WEB
from app.keys import ApiKey, digest_of, new_key
from tests.service.conftest import Start, StartLive, error_of, wait_until
from tests.service.fake_pipeline import FakePipeline, slow_loader
from tests.service.processes import ROOT

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
FILES = sorted(path.name for path in WEB.iterdir() if path.name != "index.html")
MOST_BYTES = 150_000
INDEX = (WEB / "index.html").read_text(encoding="utf-8")


def test_browsers_get_the_page_and_programs_the_routes(start: Start) -> None:
    client = start()
    page = client.get("/", headers=BROWSER)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.text == INDEX
    for accept in ("*/*", "application/json", None):
        headers = {} if accept is None else {"Accept": accept}
        index = client.get("/", headers=headers)
        assert "GET /health" in index.json()["routes"]
        assert index.headers["vary"] == page.headers["vary"] == "Accept"


@pytest.mark.parametrize("name", FILES)
def test_every_file_comes_with_its_type_and_once_only(start: Start, name: str) -> None:
    client = start()
    first = client.get(f"/page/{name}")
    assert first.status_code == 200
    assert first.content == (WEB / name).read_bytes()
    assert first.headers["content-type"] == MEDIA_TYPES[Path(name).suffix]
    for header, value in PAGE_HEADERS.items():
        assert first.headers[header] == value
    assert first.headers["x-content-type-options"] == "nosniff"
    tag = first.headers["etag"]
    for known in (tag, f'"other", W/{tag}'):
        again = client.get(f"/page/{name}", headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert client.get(f"/page/{name}", headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "path",
    ["/page/", "/page/none.js", "/page/index.html", "/page/..%2fmain.py", "/page/web"],
)
def test_there_is_nothing_else(start: Start, path: str) -> None:
    answer = start().get(path)
    assert (answer.status_code, error_of(answer)["code"]) == (404, "not_found")


def test_the_page_may_do_little_and_fetches_nothing_from_elsewhere() -> None:
    policy = PAGE_HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
    for path in WEB.iterdir():
        text = path.read_text(encoding="utf-8")
        assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)|[\"'(]//", text) == [], path.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|\beval\b", text), path.name
    # The policy would stop them silently.
    assert not re.search(r"<script>|<style|\sstyle=|\son[a-z]+=", INDEX)


def test_the_page_is_small() -> None:
    assert sum(path.stat().st_size for path in WEB.iterdir()) < MOST_BYTES


def test_every_module_is_loaded_at_once_and_every_import_is_there() -> None:
    modules = {name for name in FILES if name.endswith(".js")} - {"theme.js"}
    loaded = set(re.findall(r'<link rel="modulepreload" href="page/([a-z]+\.js)">', INDEX))
    assert loaded | {"app.js"} == modules
    imported = {
        name
        for module in modules
        for name in re.findall(r'from "\./([a-z]+\.js)"', (WEB / module).read_text())
    }
    assert imported == modules - {"app.js"}
    for name in re.findall(r'(?:href|src)="page/([^"]+)"', INDEX):
        assert name in FILES


def test_the_page_needs_no_key_but_what_it_asks_does(start: Start) -> None:
    client = start(api_keys=(ApiKey("alice", digest_of(new_key())).entry,))
    assert client.get("/", headers=BROWSER).status_code == 200
    assert client.get("/page/app.js").status_code == 200
    assert client.get("/v1/jobs").status_code == 401


def test_pages_of_others_can_neither_embed_nor_read_it(start: Start) -> None:
    client = start()
    for headers in (
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
        {"Origin": "https://evil.example"},
    ):
        assert client.get("/page/app.js", headers=headers).status_code == 403
    assert client.get("/", headers=BROWSER).headers["x-frame-options"] == "DENY"


def test_the_page_is_there_while_the_model_is_loaded(start_live: StartLive) -> None:
    gate, fake = threading.Event(), FakePipeline()
    live = start_live(fake, slow_loader(fake, gate), until_ready=False)
    wait_until(lambda: live.engine.status().startup.stage == "transformer")
    with live.client() as client:
        assert client.get("/", headers=BROWSER).text == INDEX
        assert client.get("/page/app.js").status_code == 200
        health = client.get("/health").json()
    told = (health["state"], health["stage"], health["progress"], health["defaults"])
    assert told == ("loading", "transformer", 0.5, None)
    gate.set()


def test_health_tells_what_is_drawn_by_itself(start: Start) -> None:
    assert start().get("/health").json()["defaults"] == {
        "width": 64,
        "height": 64,
        "steps": 4,
        "guidance": None,
    }
    defaults = start(default_width=128).get("/health").json()["defaults"]
    assert (defaults["width"], defaults["height"]) == (128, 64)


def test_the_package_holds_the_page() -> None:
    builder = WheelBuilder(str(ROOT))
    packed = {file.distribution_path for file in builder.recurse_included_files()}
    assert {f"app/web/{name}" for name in (*FILES, "index.html")} <= packed
