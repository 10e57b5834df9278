"""A web page cannot drive the service: Host, Origin, Sec-Fetch-Site, CORS, headers."""

from __future__ import annotations

from typing import Any

import pytest

from app.api.security.headers import SECURITY_HEADERS
from app.settings import SettingsError, load_settings
from tests.service.conftest import Start, StartLive, error_of
from tests.service.fake_pipeline import FakePipeline

BODY = {"prompt": "x", "width": 64, "height": 64}
EVIL = "https://evil.example"
APP = "https://app.example"


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:7861",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "evil-localhost",
        "127.1",
        "2130706433",
        "0x7f000001",
        "localhost:7861@evil.example",
        "[::1].evil.example",
        "localhost/evil",
        "localhost:123456",
        "",
        "[",
        "a" * 300,
    ],
)
def test_a_rebound_name_is_refused_before_anything_else(start: Start, host: str) -> None:
    client = start()
    for method, path in (("GET", "/health"), ("GET", "/nothing"), ("POST", "/v1/generate")):
        answer = client.request(method, path, headers={"Host": host})
        assert (answer.status_code, error_of(answer)["code"]) == (421, "host_not_allowed")
        assert "allowed_hosts" in error_of(answer)["message"]


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LocalHost:7861",
        "localhost.",
        "fluxd.localhost",
        "127.0.0.1:7861",
        "192.168.1.20",
        "[::1]:7861",
        "[fd00::1]",
        "box.lan",
        "box.lan:80",
        "a.pictures.example",
    ],
)
def test_addresses_localhost_and_names_of_the_settings_work(start: Start, host: str) -> None:
    client = start(allowed_hosts=("Box.lan", "*.pictures.example"))
    assert client.get("/health", headers={"Host": host}).status_code == 200
    assert client.get("/health", headers={"Host": "pictures.example"}).status_code == 421


def test_every_name_works_where_the_settings_say_so(start: Start) -> None:
    client = start(allowed_hosts=("*",))
    assert client.get("/health", headers={"Host": "anything.example"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": EVIL},
        {"Origin": "null"},
        {"Origin": "file://"},
        {"Origin": ""},
        {"Origin": "http://testserver.evil.example"},
        {"Origin": "http://testserver@evil.example"},
        {"Origin": "http://testserver:1234"},
        {"Origin": "http://evil.example/http://testserver"},
        {"Origin": "chrome-extension://testserver"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
        {"Origin": EVIL, "Sec-Fetch-Site": "same-origin"},
    ],
)
def test_a_page_of_another_origin_draws_nothing(start: Start, headers: dict[str, str]) -> None:
    pipeline = FakePipeline()
    answer = start(pipeline).post("/v1/generate", json=BODY, headers=headers)
    assert (answer.status_code, error_of(answer)["code"]) == (403, "origin_not_allowed")
    assert "access-control-allow-origin" not in answer.headers
    assert pipeline.ran == []


def test_a_page_of_another_origin_reads_and_embeds_nothing(start: Start) -> None:
    client = start()
    for headers in (
        {"Origin": EVIL, "Sec-Fetch-Mode": "cors"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "script"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"},
    ):
        assert client.get("/openapi.json", headers=headers).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "http://testserver"},
        {"Origin": "http://testserver:80"},
        {"Origin": "http://localhost:7861", "Host": "localhost:7861"},
        {"Origin": "http://[::1]:7861", "Host": "[::1]:7861"},
        # A proxy that ends TLS: the page is https, the request that arrives is not.
        {"Origin": "https://testserver", "Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
        {"Sec-Fetch-Site": "same-origin"},
    ],
)
def test_programs_and_pages_of_our_own_are_served(start: Start, headers: dict[str, str]) -> None:
    assert start().post("/v1/generate", json=BODY, headers=headers).status_code == 200


def test_a_link_on_another_page_may_be_followed(start: Start) -> None:
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert start().get("/", headers=headers).status_code == 200


def preflight(origin: str, **more: str) -> dict[str, str]:
    return {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
        **more,
    }


def test_a_listed_origin_may_ask_and_read_without_credentials(start: Start) -> None:
    client = start(cors_origins=(APP,))
    asked = client.options("/v1/generate", headers=preflight(APP))
    assert asked.status_code == 204 and asked.content == b""
    assert asked.headers["access-control-allow-origin"] == APP
    assert "POST" in asked.headers["access-control-allow-methods"]
    assert "authorization" in asked.headers["access-control-allow-headers"]
    assert "Origin" in asked.headers["vary"]
    headers = {"Origin": APP, "Sec-Fetch-Site": "cross-site"}
    for body, status in ((BODY, 200), ({}, 400)):
        answer = client.post("/v1/generate", json=body, headers=headers)
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == APP
        assert answer.headers["access-control-expose-headers"] == "*"
        assert "Origin" in answer.headers["vary"]
        assert "access-control-allow-credentials" not in answer.headers


def test_an_origin_that_is_not_listed_gets_no_permission(start: Start) -> None:
    client = start(cors_origins=(APP,))
    for origin in (EVIL, "null", f"{APP}.evil.example", f"{APP}:444", "http://app.example"):
        asked = client.options("/v1/generate", headers=preflight(origin))
        assert asked.status_code == 403
        assert not [name for name in asked.headers if name.startswith("access-control-")]


def test_star_never_echoes_an_origin_and_never_allows_credentials(start: Start) -> None:
    client = start(cors_origins=("*",))
    private = {"Access-Control-Request-Private-Network": "true"}
    asked = client.options("/v1/generate", headers=preflight(EVIL, **private))
    answer = client.post("/v1/generate", json=BODY, headers={"Origin": EVIL})
    for got in (asked, answer):
        assert got.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in got.headers
        assert "access-control-allow-private-network" not in got.headers
        assert EVIL not in str(got.headers)


def test_a_listed_origin_may_reach_into_the_local_network(start: Start) -> None:
    headers = preflight(APP, **{"Access-Control-Request-Private-Network": "true"})
    asked = start(cors_origins=(APP,)).options("/v1/generate", headers=headers)
    assert asked.headers["access-control-allow-private-network"] == "true"


@pytest.mark.parametrize("wanted", ["x\r\nset-cookie: a=b", "a b", "é", "x" * 3000, ","])
def test_only_names_of_headers_are_echoed(start: Start, wanted: str) -> None:
    headers: dict[str, Any] = preflight(APP)
    headers["Access-Control-Request-Headers"] = wanted.encode()
    asked = start(cors_origins=(APP,)).options("/v1/generate", headers=headers)
    assert "access-control-allow-headers" not in asked.headers


def test_a_preflight_needs_no_key_but_the_request_does(start: Start) -> None:
    client = start(cors_origins=(APP,), api_keys=(f"alice:{'0' * 64}",))
    assert client.options("/v1/generate", headers=preflight(APP)).status_code == 204
    answer = client.post("/v1/generate", json=BODY, headers={"Origin": APP})
    assert answer.status_code == 401
    # The page can read why.
    assert answer.headers["access-control-allow-origin"] == APP


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health", 200),
        ("GET", "/openapi.json", 200),
        ("GET", "/nothing", 404),
        ("DELETE", "/health", 405),
        ("POST", "/v1/generate", 415),
    ],
)
def test_every_answer_tells_browsers_to_do_nothing_with_it(
    start: Start, method: str, path: str, status: int
) -> None:
    answer = start().request(method, path)
    assert answer.status_code == status
    for name, value in SECURITY_HEADERS.items():
        assert answer.headers[name] == value
    assert "server" not in answer.headers


def test_pictures_have_the_headers_too(start: Start) -> None:
    answer = start().post("/v1/generate", json=BODY, headers={"Accept": "image/png"})
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_live_service_names_no_software(start_live: StartLive) -> None:
    with start_live().client() as client:
        assert "server" not in client.get("/health").headers


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("allowed_hosts", "box.lan:80", "without a port"),
        ("allowed_hosts", "http://box.lan", "a host is NAME"),
        ("allowed_hosts", "*.", "a host is NAME"),
        ("cors_origins", "app.example", "scheme://host"),
        ("cors_origins", "https://app.example/", "scheme://host"),
        ("cors_origins", "null", "scheme://host"),
        ("trusted_proxies", "10.0.0.1/8", "such as 10.0.0.0/8"),
        ("trusted_proxies", "proxy.lan", "a network is ADDRESS"),
    ],
)
def test_rules_that_could_not_work_are_refused_at_the_start(
    name: str, value: str, says: str
) -> None:
    with pytest.raises(SettingsError, match=name) as refused:
        load_settings({name: value}, {})
    assert says in str(refused.value)
