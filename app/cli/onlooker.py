"""Whoever watches an order at a terminal: a bar, and the pictures as they come."""

from __future__ import annotations

import io

from PIL import Image

from app.cli.console import Bar
from app.cli.terminal import Screen, Shown


class Onlooker:
    """Shows how an order stands.

    Args:
        screen: where to show pictures; None shows none.
    """

    def __init__(self, bar: Bar, screen: Screen | None) -> None:
        self._bar = bar
        self._screen = screen
        self._frame: Shown | None = None

    def show(
        self, stage: str, share: float | None = None, left_s: float | None = None, note: str = ""
    ) -> None:
        """See ``Watcher``."""
        self._bar.show(stage, share, left_s, note)

    def preview(self, image_index: int, data: bytes) -> None:
        """Each step takes the place of the one before."""
        if self._screen is not None:
            with self._bar.aside():
                self._frame = self._screen.show(Image.open(io.BytesIO(data)), self._frame)

    def picture(self, picture: Image.Image) -> None:
        """A finished picture: the first in the place of the last step. The bar is gone."""
        if self._screen is not None:
            self._screen.show(picture, self._frame)
            self._frame = None
