"""Users for Locust, one kind for each way in which a service is loaded.

    locust -f loadtest/locustfile.py --host http://127.0.0.1:7861 Mixed

opens its web page on http://127.0.0.1:8089; ``loadtest/run.py`` runs all kinds in order
and writes a report. The kinds are named as in MLPerf Inference: SingleStream asks again
when it is answered; Server asks at random moments, whether it is answered or not
(Poisson arrivals); Offline keeps the queue full. Mixed asks for pictures of all sizes and
Leaving does not always wait for them. Every answer is checked: size, seed, a whole PNG.
"""

from __future__ import annotations

import base64
import io
import json
import random
import time
from typing import Any, TextIO

import gevent
import requests
from locust import HttpUser, constant, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from PIL import Image
from run import is_loopback
from urllib3 import PoolManager

ANSWER_S = 300.0
"""How long those who stay wait."""
MIXED_STEPS = (1, 2, 4, 4, 8)
MIXED_SIDES = (0.5, 1.0, 1.0, 1.5)
"""Of the side that is asked for."""
_record: TextIO | None = None


@events.init_command_line_parser.add_listener
def _(parser: LocustArgumentParser) -> None:
    parser.add_argument("--side", type=int, default=256, help="width and height in pixels")
    parser.add_argument("--steps", type=int, default=4, help="Euler steps")
    parser.add_argument("--rate", type=float, default=1.0, help="Server: arrivals a second")
    parser.add_argument("--patience", type=float, default=2.0, help="Leaving: seconds at most")
    parser.add_argument("--leave", type=float, default=0.3, help="Leaving: share that goes")
    parser.add_argument("--chance", type=int, default=0, help="seed of all that is random")
    parser.add_argument("--record", default="", help="file for one JSON line a request")


@events.test_start.add_listener
def _(environment: Environment, **_: Any) -> None:
    global _record
    if not is_loopback(environment.host or ""):
        raise SystemExit("the host must be a loopback address, such as http://127.0.0.1:7861")
    options = environment.parsed_options
    random.seed(options.chance)
    if options.record:
        _record = open(options.record, "w", encoding="utf-8")  # noqa: SIM115


@events.quitting.add_listener
def _(environment: Environment, **_: Any) -> None:
    if _record is not None:
        _record.close()


class Drawing(HttpUser):
    """Asks for one picture, checks and records the answer."""

    abstract = True
    wait_time = constant(0)
    # As many connections as there are requests at a time.
    pool_manager = PoolManager(maxsize=1000, block=False)

    def ask(
        self, side: int | None = None, steps: int | None = None, patience_s: float | None = None
    ) -> None:
        options = self.environment.parsed_options
        side, seed = side or options.side, random.randrange(2**31)
        body = {
            "prompt": f"picture {seed}",
            "width": side,
            "height": side,
            "steps": steps or options.steps,
            "seed": seed,
        }
        began_s, outcome, timings = time.time(), "left", {}
        with self.client.post(
            "/v1/generate", json=body, timeout=patience_s or ANSWER_S, catch_response=True
        ) as answer:
            if isinstance(getattr(answer, "error", None), requests.Timeout) and patience_s:
                answer.success()
            elif answer.status_code == 200:
                wrong = _wrong(answer.json(), body)
                outcome, timings = "wrong" if wrong else "answered", answer.json()["timings"]
                if wrong:
                    answer.failure(wrong)
            else:
                outcome = "refused" if answer.status_code in (429, 503) else "failed"
                answer.failure(f"{answer.status_code} {outcome}: {answer.text[:100]}")
        if _record is not None:
            seconds = time.time() - began_s
            line = {"began_s": began_s, "took_s": seconds, "outcome": outcome, "side": side}
            _record.write(json.dumps({**line, "timings": timings}) + "\n")


class SingleStream(Drawing):
    """One request at a time."""

    fixed_count = 1

    @task
    def draw(self) -> None:
        self.ask()


class Server(Drawing):
    """Arrivals as in a queue of strangers: the time between two is exponential."""

    fixed_count = 1

    def on_start(self) -> None:
        self._running: set[gevent.Greenlet] = set()

    @task
    def arrive(self) -> None:
        gevent.sleep(random.expovariate(self.environment.parsed_options.rate))
        asking = gevent.spawn(self.ask)
        self._running.add(asking)
        asking.link(self._running.discard)

    def on_stop(self) -> None:
        gevent.joinall(list(self._running), timeout=ANSWER_S)


class Offline(Drawing):
    """As many as there are users, each asking again at once."""

    @task
    def draw(self) -> None:
        self.ask()


class Mixed(Drawing):
    """Pictures of several sizes and numbers of steps."""

    @task
    def draw(self) -> None:
        factor = random.choice(MIXED_SIDES)
        side = max(64, round(self.environment.parsed_options.side * factor / 16) * 16)
        self.ask(side, random.choice(MIXED_STEPS))


class Leaving(Drawing):
    """Some of whom go before they are answered."""

    @task
    def draw(self) -> None:
        options = self.environment.parsed_options
        leaves = random.random() < options.leave
        self.ask(patience_s=random.uniform(0.01, options.patience) if leaves else None)


def _wrong(made: dict[str, Any], body: dict[str, Any]) -> str:
    """What is wrong with an answer; empty where nothing is."""
    image = made["images"][0]
    picture = Image.open(io.BytesIO(base64.b64decode(image["b64"])))
    picture.load()
    if picture.size != (body["width"], body["height"]) or image["seed"] != body["seed"]:
        return f"another picture than the one of {body}"
    return ""
