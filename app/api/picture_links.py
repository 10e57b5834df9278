"""Finished pictures that are fetched by address, for clients that ask for ``url``.

Owns the store, which is bounded in bytes and in time, and the addresses. An address
cannot be guessed and is the only key that is asked for: whoever has it may fetch.
"""

from __future__ import annotations

import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from fastapi import APIRouter, Request, Response

from app.api.documents import errors, pictures_content
from app.engine import PackedPicture, PictureFormat
from app.errors import NotFoundError

# Served without a key, so that a browser or a chat application can show it.
LINK_PATH = "/files"
TOKEN_BYTES = 24

_ENDINGS: dict[PictureFormat, str] = {"png": "png", "jpeg": "jpg", "webp": "webp"}


@dataclass(frozen=True, slots=True)
class _Kept:
    data: bytes
    format: PictureFormat
    expires_s: float


class PictureLinks:
    """Pictures by name, the oldest dropped first.

    Args:
        limit_bytes: most bytes that are kept; the newest picture always is.
        lifetime_s: how long an address works, in seconds.
        clock: seconds, only ever rising.
    """

    def __init__(
        self, limit_bytes: int, lifetime_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit_bytes = limit_bytes
        self._lifetime_s = lifetime_s
        self._clock = clock
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._bytes = 0

    @property
    def kept_bytes(self) -> int:
        """What all pictures hold."""
        return self._bytes

    def keep(self, picture: PackedPicture) -> str:
        """Keep a picture; returns its name, which ends as files of its format do."""
        name = f"{secrets.token_urlsafe(TOKEN_BYTES)}.{_ENDINGS[picture.format]}"
        now_s = self._clock()
        self._kept[name] = _Kept(picture.data, picture.format, now_s + self._lifetime_s)
        self._bytes += len(picture.data)
        self._drop(now_s)
        return name

    def find(self, name: str) -> tuple[bytes, PictureFormat, float]:
        """A picture's bytes, their format and for how many seconds they stay.

        Raises:
            NotFoundError: there is none of that name, or none any more.
        """
        now_s = self._clock()
        self._drop(now_s)
        kept = self._kept.get(name)
        if kept is None:
            raise NotFoundError(
                f"there is no such picture, or no longer: addresses work for "
                f"{self._lifetime_s:g} s, and the oldest go first when many are made"
            )
        return kept.data, kept.format, kept.expires_s - now_s

    def has(self, name: str) -> bool:
        """Whether a picture can be fetched."""
        self._drop(self._clock())
        return name in self._kept

    def _drop(self, now_s: float) -> None:
        """Drop what has expired, then the oldest until the rest fits."""
        while self._kept:
            name, oldest = next(iter(self._kept.items()))
            is_over = self._bytes > self._limit_bytes and len(self._kept) > 1
            if oldest.expires_s > now_s and not is_over:
                return
            del self._kept[name]
            self._bytes -= len(oldest.data)


def link_routes(links: PictureLinks) -> APIRouter:
    """The route that serves them."""
    router = APIRouter()

    async def picture(request: Request) -> Response:
        """A picture of an answer that was asked for as ``url``."""
        data, picture_format, left_s = links.find(request.path_params["name"])
        return Response(
            data,
            media_type=f"image/{picture_format}",
            headers={
                "Cache-Control": f"private, immutable, max-age={math.floor(left_s)}",
                "Content-Disposition": "inline",
                # Any page may show it; that is what its address is for.
                "Cross-Origin-Resource-Policy": "cross-origin",
            },
        )

    path = f"{LINK_PATH}/{{name}}"
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    router.add_api_route(
        path,
        picture,
        methods=["GET"],
        responses={
            200: {"description": "The picture.", "content": pictures_content()},
            **errors(404),
        },
        openapi_extra={"parameters": [name]},
        response_class=Response,
    )
    return router


def address_of(request: Request, name: str) -> str:
    """The address under which the client that asks can fetch a picture.

    It begins as the client began its own, or as the one that a trusted proxy tells of.
    A client that lies about its Host misleads nobody but itself.
    """
    return f"{base_address(request)}{LINK_PATH}/{name}"


def base_address(request: Request) -> str:
    """What stands before the path; see ``address_of``."""
    host = request.headers.get("host") or _own_address(request)
    return f"{request.url.scheme}://{host}"


def _own_address(request: Request) -> str:
    """For a client of HTTP/1.0, which names no host."""
    host, port = request.scope.get("server") or ("127.0.0.1", None)
    shown = f"[{host}]" if ":" in host else host
    return shown if port is None else f"{shown}:{port}"
