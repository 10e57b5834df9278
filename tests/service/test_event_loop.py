"""The event loop's rounds are short, and nothing of the start is left to the first request."""

from __future__ import annotations

import asyncio
import os
import selectors
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator

import anyio.to_thread
import fastapi.routing
import pytest

from app.event_loop import RoundSelector, new_event_loop
from app.main import LISTEN_BACKLOG
from loadtest.clients import late_timers
from tests.service.conftest import PATIENCE_S, Start, StartLive

Pair = tuple[socket.socket, socket.socket]


def a_pair() -> Pair:
    """Two connected sockets; what is sent by the second comes to the first."""
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    return reader, writer


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = new_event_loop()
    yield made
    made.close()


@pytest.fixture
def pairs() -> Iterator[list[Pair]]:
    """Four pairs, of which each has something to read."""
    made = [a_pair() for _ in range(4)]
    for _, writer in made:
        writer.send(b"x")
    yield made
    for pair in made:
        for end in pair:
            end.close()


def run_until(loop: asyncio.AbstractEventLoop, condition: Callable[[], object]) -> None:
    async def wait() -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await asyncio.sleep(0)

    loop.run_until_complete(wait())


def test_what_is_handed_over_runs_after_one_socket_not_after_all(
    loop: asyncio.AbstractEventLoop, pairs: list[Pair]
) -> None:
    happened: list[str] = []

    def read(reader: socket.socket) -> None:
        reader.recv(1)
        happened.append("socket")
        loop.call_soon_threadsafe(happened.append, "handed over")

    for reader, _ in pairs:
        loop.add_reader(reader, read, reader)
    run_until(loop, lambda: len(happened) == 2 * len(pairs))
    assert happened == ["socket", "handed over"] * len(pairs)


def test_each_socket_is_served_once_before_any_again(
    loop: asyncio.AbstractEventLoop, pairs: list[Pair]
) -> None:
    served: list[int] = []
    for number, (reader, _) in enumerate(pairs):
        # Nothing is read, so that each stays ready.
        loop.add_reader(reader, served.append, number)
    run_until(loop, lambda: len(served) >= 3 * len(pairs))
    rounds = [sorted(served[at : at + len(pairs)]) for at in range(0, 3 * len(pairs), len(pairs))]
    assert rounds == [list(range(len(pairs)))] * 3


def test_a_number_that_was_given_to_another_socket_is_not_taken_for_the_first(
    pairs: list[Pair],
) -> None:
    with RoundSelector() as selector:
        for reader, _ in pairs:
            selector.register(reader.fileno(), selectors.EVENT_READ)
        ((first, _),) = selector.select()
        quiet = a_pair()
        gone = [reader for reader, _ in pairs if reader.fileno() != first.fileobj]
        for reader in gone:
            number = reader.fileno()
            selector.unregister(number)
            os.dup2(quiet[0].fileno(), number)
            selector.register(number, selectors.EVENT_READ)
        # Only what is ready now: the one that still has something to read.
        assert selector.select(0) == []
        assert [key.fileobj for key, _ in selector.select(0)] == [first.fileobj]
        for end in quiet:
            end.close()


def test_a_socket_whose_interest_has_changed_is_asked_for_anew(pairs: list[Pair]) -> None:
    with RoundSelector() as selector:
        for reader, _ in pairs[:2]:
            selector.register(reader, selectors.EVENT_READ)
        ((first, _),) = selector.select()
        other = next(reader for reader, _ in pairs[:2] if reader is not first.fileobj)
        selector.modify(other, selectors.EVENT_WRITE)
        found = [event for _ in range(3) for event in selector.select(0)]
    assert {events for key, events in found if key.fileobj is other} == {selectors.EVENT_WRITE}


def test_the_server_runs_on_it_and_accepts_one_connection_a_round(start_live: StartLive) -> None:
    config = start_live().server.config
    assert config.get_loop_factory() is new_event_loop
    assert config.backlog == 1


@pytest.mark.skipif(sys.platform != "linux", reason="how long the queue may be is told by Linux")
def test_many_may_wait_to_be_accepted_all_the_same(start_live: StartLive) -> None:
    (listening,) = start_live().server.servers
    (listener,) = listening.sockets
    told = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    # Of a socket that listens, tcpi_sacked is the longest that its queue may get.
    most = struct.unpack_from("=I", told, 28)[0]
    with open("/proc/sys/net/core/somaxconn") as system:
        assert most == min(LISTEN_BACKLOG, int(system.read()))


def test_routes_are_made_before_the_first_request(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = start()

    def make(*_: object, **__: object) -> None:
        raise AssertionError("a route is made while a request waits")

    monkeypatch.setattr(fastapi.routing, "get_dependant", make)
    assert client.get("/ready").status_code == 200
    assert client.get("/no/such").status_code == 404


def test_a_refusal_is_handed_to_no_thread(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    client = start()

    async def run_sync(*_: object, **__: object) -> None:
        raise AssertionError("a thread is asked for")

    monkeypatch.setattr(anyio.to_thread, "run_sync", run_sync)
    assert client.get("/no/such").status_code == 404
    assert client.post("/v1/generate", json={"prompt": 1}).status_code == 400


STARTING = """
import asyncio, sys
from app.main import create_app, create_engine
from app.settings import Settings
def load(progress):
    raise RuntimeError("no model is needed")
settings = Settings(data_dir="off")
app = create_app(settings, create_engine(settings, load))
async def begin():
    async with app.router.lifespan_context(app):
        print("anyio._backends._asyncio" in sys.modules)
asyncio.run(begin())
"""


def test_threads_for_large_answers_are_imported_before_the_first_request() -> None:
    told = run_alone(STARTING)
    assert told == "True\n"


def run_alone(program: str) -> str:
    """What a program prints, in a process that has imported nothing yet."""
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert told.returncode == 0, told.stderr
    return told.stdout


LOADING = """
import gc, sys
full = 0
def count(phase, info):
    global full
    full += phase == "start" and info["generation"] == 2
gc.callbacks.append(count)
from app.main import pipeline_loader
from app.settings import Settings
assert "torch" not in sys.modules
class Begun(Exception): pass
def begun(step):
    raise Begun
before = full
try:
    pipeline_loader(None, Settings(device="cpu"))(begun)
except Begun:
    print(full - before, gc.get_freeze_count(), gc.isenabled())
"""


def test_the_frameworks_are_imported_without_looking_for_garbage() -> None:
    full, frozen, is_enabled = run_alone(LOADING).split()
    assert int(full) == 0
    assert int(frozen) > 100_000
    assert is_enabled == "True"


def test_only_timers_of_the_run_itself_are_counted() -> None:
    def told(at_50_ms: int, at_100_ms: int, count: int) -> str:
        name = "fluxd_event_loop_lag_seconds"
        return (
            f'{name}_bucket{{le="0.05"}} {at_50_ms}\n{name}_bucket{{le="0.1"}} {at_100_ms}\n'
            f"{name}_count {count}\n"
        )

    shown = late_timers(told(90, 95, 100), told(188, 194, 200))
    assert shown == "2 timers of 100 over 50 ms late, 1 over 100 ms"
