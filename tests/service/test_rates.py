"""How often one client may ask, and who one client is."""

from __future__ import annotations

import pytest
from fastapi import FastAPI, Request
from starlette.testclient import TestClient

from app.api.security.proxies import TrustedProxies, client_address
from app.api.security.rates import RateLimiter
from app.keys import ApiKey, digest_of, new_key
from app.main import create_app, create_engine
from tests.service.conftest import Start, error_of, settings_for_tests
from tests.service.fake_pipeline import FakePipeline, loader_of

WRONG = {"prompt": ""}
ALICE, BOB = new_key(), new_key()


def test_a_bucket_serves_a_burst_and_then_fills_up_evenly() -> None:
    now_s = 100.0
    limiter = RateLimiter(lambda: now_s)
    taken = [limiter.take("a", 6) for _ in range(7)]
    assert [t.is_allowed for t in taken] == [True] * 6 + [False]
    assert [t.remaining for t in taken] == [5, 4, 3, 2, 1, 0, 0]
    assert taken[-1].retry_s == pytest.approx(10) and taken[-1].reset_s == pytest.approx(60)
    # A refused request costs nothing, so that asking again and again does not lock one out.
    now_s += 10.001
    assert limiter.take("a", 6).is_allowed
    assert not limiter.take("a", 6).is_allowed
    assert limiter.take("b", 6).is_allowed
    now_s += 1000
    assert limiter.take("a", 6).remaining == 5


def test_clients_that_are_remembered_are_bounded() -> None:
    limiter = RateLimiter(lambda: 0.0, max_clients=10)
    for i in range(1000):
        limiter.take(str(i), 1)
    assert len(limiter._buckets) == 10
    assert not limiter.take("999", 1).is_allowed


def test_too_many_requests_are_refused_until_the_time_that_is_told(start: Start) -> None:
    client = start(rate_limit_per_minute=2)
    for remaining in ("1", "0"):
        answer = client.post("/v1/generate", json=WRONG)
        assert answer.status_code == 400
        assert answer.headers["x-ratelimit-limit-requests"] == "2"
        assert answer.headers["x-ratelimit-remaining-requests"] == remaining
    answer = client.post("/v1/generate", json=WRONG)
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (429, "rate_limit_exceeded")
    assert error["type"] == "rate_limit_error"
    assert 1 <= int(answer.headers["retry-after"]) <= 30
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    # Looking is free.
    assert client.get("/health").status_code == 200


def test_each_key_has_its_own_count_and_may_have_its_own_limit(start: Start) -> None:
    entries = (
        ApiKey("alice", digest_of(ALICE), 1).entry,
        ApiKey("bob", digest_of(BOB)).entry,
        ApiKey("carol", digest_of("c" * 40), 0).entry,
    )
    client = start(api_keys=entries, rate_limit_per_minute=2)

    def statuses(key: str, count: int) -> list[int]:
        headers = {"x-api-key": key}
        asked = [client.post("/v1/generate", json=WRONG, headers=headers) for _ in range(count)]
        return [answer.status_code for answer in asked]

    assert statuses(ALICE, 2) == [400, 429]
    assert statuses(BOB, 3) == [400, 400, 429]
    assert statuses("c" * 40, 5) == [400] * 5
    # Who has no key uses up nobody's share.
    assert statuses("wrong", 3) == [401] * 3


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("10.0.0.9", "203.0.113.5", "203.0.113.5"),
        # Hops that the client made up stand before the one that the proxy saw.
        ("10.0.0.9", "1.1.1.1, 203.0.113.5", "203.0.113.5"),
        ("10.0.0.9", "203.0.113.5, 10.0.0.7", "203.0.113.5"),
        ("10.0.0.9", "garbage", "10.0.0.9"),
        ("10.0.0.9", "203.0.113.5, garbage", "10.0.0.9"),
        ("10.0.0.9", "", "10.0.0.9"),
        ("10.0.0.9", "2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("::ffff:10.0.0.9", "203.0.113.5", "203.0.113.5"),
        ("192.0.2.1", "203.0.113.5", "192.0.2.1"),
        ("::1", "203.0.113.5", "::1"),
        ("testclient", "203.0.113.5", "unknown"),
    ],
)
def test_forwarded_addresses_are_believed_of_trusted_proxies_only(
    peer: str, forwarded: str, client: str
) -> None:
    scope = {
        "client": (peer, 1),
        "scheme": "http",
        "headers": [
            (b"host", b"inner"),
            (b"x-forwarded-for", forwarded.encode()),
            (b"x-forwarded-proto", b"https"),
            (b"x-forwarded-host", b"draw.example"),
        ],
    }
    TrustedProxies(["10.0.0.0/8"]).apply(scope)
    assert client_address(scope) == client
    is_proxy = "10.0.0.9" in peer
    assert scope["scheme"] == ("https" if is_proxy else "http")
    assert (b"host", b"draw.example" if is_proxy else b"inner") in scope["headers"]


def test_a_forwarded_host_is_checked_like_any_other() -> None:
    settings = settings_for_tests(trusted_proxies=("127.0.0.1",), allowed_hosts=("draw.example",))
    engine = create_engine(settings, loader_of(FakePipeline()))
    app = create_app(settings, engine)
    with TestClient(app, base_url="http://localhost", client=("127.0.0.1", 1)) as client:
        for host, status in (("draw.example", 200), ("evil.example", 421)):
            answer = client.get("/health", headers={"x-forwarded-host": host})
            assert answer.status_code == status


def test_the_client_is_told_to_the_routes(start: Start) -> None:
    entry = ApiKey("alice", digest_of(ALICE)).entry
    for keys, headers, name in (
        ((entry,), {"x-api-key": ALICE}, "alice"),
        ((), {}, "192.0.2.7"),
    ):
        settings = settings_for_tests(api_keys=keys)
        app = create_app(settings, create_engine(settings, loader_of(FakePipeline())))
        seen = _told_by(app)
        with TestClient(app, client=("192.0.2.7", 1)) as client:
            assert client.get("/v1/who", headers=headers).status_code == 200
        assert seen == [name]


def _told_by(app: FastAPI) -> list[str]:
    """Add a route; what it is told comes into the list."""
    seen: list[str] = []

    @app.get("/v1/who")
    async def who(request: Request) -> None:
        seen.append(request.state.client)

    return seen
