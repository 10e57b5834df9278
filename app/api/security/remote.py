"""Pictures that a client names by address: refused, or fetched within bounds.

What is fetched is judged like what is sent; here is only decided whether, from where,
how much and for how long. How an address is kept from leading into the network is
``app.outbound``'s business.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Sequence

from app.api.bodies import Source
from app.engine.pictures import PictureError
from app.errors import InvalidRequestError
from app.outbound import Destinations, OutboundError, exchange
from app.settings import Settings

logger = logging.getLogger(__name__)

MAX_REDIRECTS = 3
# Pictures of all requests that are fetched at a time; bounds sockets and memory.
FETCHES = 8
ACCEPTED = "image/png, image/jpeg, image/webp"
# The look at a text must not run over megabytes of base64.
_HEAD_CHARS = 16
_REMOTE = re.compile(r"https?://", re.IGNORECASE)


class RemotePictures:
    """Fetches pictures as the settings allow."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._destinations = Destinations.of(
            settings.remote_image_hosts, settings.remote_image_networks
        )
        self._fetching = asyncio.Semaphore(FETCHES)

    async def fetch_all(
        self, references: Sequence[Source], mask: Source | None, name: str
    ) -> tuple[Sequence[Source], Source | None]:
        """The pictures of one request, addresses replaced by what was fetched from them.

        Args:
            name: what the request calls its references.

        Raises:
            InvalidRequestError: naming the picture that cannot be fetched.
        """
        left_bytes = int(self._settings.max_body_bytes)
        fetched: list[Source | None] = []
        params = [*(f"{name}[{i}]" for i in range(len(references))), "mask"]
        for param, source in zip(params, [*references, mask], strict=True):
            if isinstance(source, str) and is_remote(source):
                try:
                    source = await self.fetch(source, left_bytes)
                except PictureError as error:
                    raise InvalidRequestError(f"{param} {error}", param=param) from None
                left_bytes -= len(source)
            fetched.append(source)
        return [source for source in fetched[:-1] if source is not None], fetched[-1]

    async def fetch(self, url: str, max_bytes: int) -> bytes:
        """The file at an address.

        Raises:
            PictureError: it is not fetched, or could not be.
        """
        settings = self._settings
        if not settings.remote_images:
            raise PictureError(
                "is an address; addresses are not fetched, send the picture as base64 "
                "(the setting remote_images has them fetched)"
            )
        try:
            async with self._fetching:
                answer = await exchange(
                    "GET",
                    url,
                    self._destinations,
                    timeout_s=settings.remote_image_timeout_s,
                    max_bytes=min(max_bytes, settings.max_image_bytes),
                    headers={"Accept": ACCEPTED},
                    max_redirects=MAX_REDIRECTS,
                )
        except OutboundError as error:
            logger.info("a remote picture was not fetched: it %s", error)
            raise PictureError(str(error)) from None
        if answer.status != 200:
            raise PictureError(f"could not be fetched: its host answered {answer.status}")
        return answer.body


def is_remote(text: str) -> bool:
    """Whether a text is the address of a picture, and not a picture."""
    return _REMOTE.match(text[:_HEAD_CHARS]) is not None
