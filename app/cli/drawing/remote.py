"""An artist elsewhere: a running service, over its public API.

Needs nothing but the standard library, so that it is there at once.
"""

from __future__ import annotations

import base64
import http.client
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from app.cli.console import UsageError
from app.cli.drawing.answers import parse_json, progress, read_event
from app.cli.drawing.contract import DrawingError, Drawn, Order, Watcher
from app.cli.drawing.event_stream import read_events
from fluxcore.version import __version__

CONNECT_TIMEOUT_S = 10.0
# The service says that it is alive every ten seconds.
SILENCE_TIMEOUT_S = 60.0
POLL_S = 0.5
# What can be cured by another order, not by another time.
WRONG_ORDER = frozenset({400, 413, 422})


@dataclass(frozen=True, slots=True)
class _Answer:
    """A status and the JSON that came with it."""

    status: int
    body: dict[str, Any]

    @property
    def message(self) -> str:
        error = self.body.get("error")
        said = error.get("message") if isinstance(error, dict) else None
        return str(said) if said else f"it answered with status {self.status}"


class RemoteArtist:
    """A service at an address.

    Args:
        url: such as ``http://127.0.0.1:7861``; without a scheme, http is meant.
        key: an API key, where the service asks for one.

    Raises:
        UsageError: the address or the key is none.
        DrawingError: nothing answers there.
    """

    def __init__(self, url: str, key: str | None) -> None:
        self._address = _address(url)
        self._headers = {"User-Agent": f"fluxd/{__version__}", "Accept": "application/json"}
        if key is not None:
            if not key.isascii() or not key.isprintable():
                raise UsageError("the key of --key holds characters that no key has")
            self._headers["Authorization"] = f"Bearer {key}"
        self._health = self._get("/health").body
        if "state" not in self._health:
            raise DrawingError(f"what answers at {self.url} is not fluxd")
        self._is_ready = False

    @property
    def url(self) -> str:
        """Where it is."""
        return self._address.geturl()

    @property
    def name(self) -> str:
        """The model and the address."""
        return f"{self._health.get('model') or 'a model'} at {self.url}"

    @property
    def note(self) -> str | None:
        """That the bundled model draws shapes, where it is the one."""
        if not self._health.get("bundled"):
            return None
        return f"{self._health['model']} draws coloured shapes, not photographs"

    @property
    def load_ms(self) -> None:
        """Nothing was loaded."""

    @property
    def standing(self) -> str | None:
        """See ``Artist``."""
        told = self._told()
        return None if told is None else f"the service is {told[0]}, {told[1]:.0%}"

    def make_ready(self, watcher: Watcher) -> None:
        """See ``Artist``."""
        while (told := self._told()) is not None:
            watcher.show(f"the service is {told[0]}", told[1])
            time.sleep(POLL_S)

    def draw(self, order: Order, watcher: Watcher) -> Drawn:
        """See ``Artist``. Leaving in the middle is what cancels the job there."""
        self.make_ready(watcher)
        watcher.show("sending")
        body = json.dumps(_request(order)).encode()
        headers = {**self._headers, "Content-Type": "application/json"}
        with self._connected() as connection:
            connection.request("POST", self._path("/v1/generate"), body, headers)
            answer = connection.getresponse()
            if answer.status != http.client.OK:
                self._refused(_read(answer))
            return _watched(answer, order.params.n, watcher)

    def close(self) -> None:
        """Nothing is held."""

    def abandon(self) -> None:
        """Nothing is held."""

    def _told(self) -> tuple[str, float] | None:
        """Stage and share of getting ready; None once that is done."""
        if self._is_ready:
            return None
        answer = self._get("/ready")
        if answer.status == http.client.OK:
            self._is_ready = True
            self._health = self._get("/health").body
            return None
        body = answer.body
        match body.get("status"):
            case "loading":
                return f"loading {body.get('stage')}", progress(body)
            case "warming_up":
                return "warming up", progress(body)
        raise DrawingError(f"{self.url}: {answer.message}")

    def _refused(self, answer: _Answer) -> None:
        if answer.status == http.client.UNAUTHORIZED:
            raise DrawingError(f"{answer.message}; give one with --key or FLUXD_KEY")
        self._is_ready = answer.status != http.client.SERVICE_UNAVAILABLE
        raise DrawingError(answer.message, is_wrong_order=answer.status in WRONG_ORDER)

    def _get(self, path: str) -> _Answer:
        with self._connected() as connection:
            connection.request("GET", self._path(path), headers=self._headers)
            return _read(connection.getresponse())

    def _path(self, path: str) -> str:
        return self._address.path + path

    @contextmanager
    def _connected(self) -> Iterator[http.client.HTTPConnection]:
        kind = (
            http.client.HTTPSConnection
            if self._address.scheme == "https"
            else http.client.HTTPConnection
        )
        host = self._address.hostname or ""
        connection = kind(host, self._address.port, timeout=CONNECT_TIMEOUT_S)
        try:
            connection.connect()
            connection.sock.settimeout(SILENCE_TIMEOUT_S)
            yield connection
        except TimeoutError:
            raise DrawingError(f"{self.url} does not answer") from None
        except http.client.HTTPException:
            raise DrawingError(f"{self.url} ended its answer in the middle; try again") from None
        except UnicodeError:
            raise UsageError(f"--server names no host; got {self.url!r}") from None
        except OSError as error:
            raise DrawingError(
                f"cannot reach {self.url}: {error.strerror or error}; is 'fluxd serve' running?"
            ) from None
        finally:
            connection.close()


def _address(url: str) -> SplitResult:
    try:
        address = urlsplit(url if "://" in url else f"http://{url}")
        is_sound = address.scheme in ("http", "https") and bool(address.hostname)
        is_sound = is_sound and (address.port is None or address.port > 0)
        is_sound = is_sound and address.username is None
    except ValueError:
        is_sound = False
    if not is_sound:
        raise UsageError(f"--server takes an address such as http://127.0.0.1:7861; got {url!r}")
    # People copy the base URL that OpenAI's clients take.
    path = address.path.rstrip("/").removesuffix("/v1")
    return address._replace(path=path, query="", fragment="")


def _request(order: Order) -> dict[str, Any]:
    """The order as the API takes it; what has its default is left out."""
    params = order.params
    body = {
        "prompt": params.prompt,
        "negative_prompt": params.negative_prompt,
        "width": params.width,
        "height": params.height,
        "steps": params.steps,
        "guidance": params.guidance,
        "seed": params.seed,
        "n": params.n,
        "schedule": params.schedule,
        "power_alpha": params.power_alpha if params.schedule == "power" else None,
        "images": [_base64(file) for file in order.reference_files] or None,
        "mask": None if order.mask_file is None else _base64(order.mask_file),
        "strength": None if order.mask_file is None else params.strength,
        "output_format": order.packing.format,
        "quality": None if order.packing.format == "png" else order.packing.quality,
        "stream": True,
        "previews": order.previews,
        "priority": "interactive",
    }
    return {name: value for name, value in body.items() if value is not None}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _read(answer: http.client.HTTPResponse) -> _Answer:
    try:
        body = parse_json(answer.read())
    except ValueError:
        body = {}
    return _Answer(answer.status, body if isinstance(body, dict) else {})


def _watched(answer: http.client.HTTPResponse, pictures: int, watcher: Watcher) -> Drawn:
    """Follow the events of a job to its end."""
    for name, text in read_events(answer):
        told = read_event(name, text, pictures)
        if isinstance(told, Drawn):
            return told
        if told is not None:
            told(watcher)
    raise DrawingError("the service ended before the picture was done; try again")
