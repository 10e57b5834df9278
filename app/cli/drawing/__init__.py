"""Where the command line's pictures come from: this process, or a service.

``contract`` says what both have in common; ``local`` loads a model, ``remote`` asks
a service over its public API, whose words ``answers`` reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from app.cli.drawing.contract import (
    MOST_PREVIEWS,
    Artist,
    DrawingError,
    Drawn,
    Order,
    Watcher,
)
from app.settings import Settings

__all__ = [
    "MOST_PREVIEWS",
    "Artist",
    "DrawingError",
    "Drawn",
    "Order",
    "Watcher",
    "open_artist",
]


@contextmanager
def open_artist(
    settings: Settings, server: str | None, key: str | None, *, is_warmed: bool
) -> Iterator[Artist]:
    """The service at an address, or, without one, the model of the settings in this process.

    Args:
        is_warmed: several pictures will be asked for.
    """
    artist: Artist
    if server is not None:
        from app.cli.drawing.remote import RemoteArtist

        artist = RemoteArtist(server, key)
    else:
        from app.cli.drawing.local import LocalArtist

        artist = LocalArtist(settings, is_warmed=is_warmed)
    try:
        yield artist
    except KeyboardInterrupt:
        artist.abandon()
        raise
    finally:
        artist.close()
