"""Finished pictures to PNG, JPEG or WebP bytes, off the worker thread.

Owns the encoders' settings and the threads they run on. The encoders let go of the
interpreter lock while they compress, so pictures of one job are packed side by side.
"""

from __future__ import annotations

import io
import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Literal

from app.engine.metadata import Provenance, exif, png_text
from app.engine.png import Deflated, Map, Strip, write_png
from fluxcore.drawn import DrawnPicture

logger = logging.getLogger(__name__)

PictureFormat = Literal["png", "jpeg", "webp"]
PACKING_THREADS = 2
# For the strips of PNG files, beside the thread that packs.
STRIP_THREADS = max(1, min(8, (os.cpu_count() or 1) - 1))
WEBP_METHOD = 4
DEFAULT_QUALITY = 90
# From this quality on, colours are kept at full resolution.
FULL_CHROMA_QUALITY = 90


@dataclass(frozen=True, slots=True)
class Packing:
    """How pictures are to be written. ``quality``, 1 to 100, counts for JPEG and WebP."""

    format: PictureFormat = "png"
    quality: int = DEFAULT_QUALITY


@dataclass(frozen=True, slots=True)
class PackedPicture:
    """One picture as a file. Units: pixels."""

    data: bytes
    format: PictureFormat
    seed: int
    width: int
    height: int


def pack_picture(
    picture: DrawnPicture, packing: Packing, made: Provenance, spread: Map = map
) -> PackedPicture:
    """Write one picture, with what made it, to bytes.

    Args:
        spread: maps the parts of a PNG file, on threads or not.
    """
    if packing.format == "png":
        text = png_text(made)
        data = write_png(picture.pixels, text, spread, picture.lines, picture.deflated)
        return PackedPicture(data, "png", made.seed, picture.width, picture.height)
    target = io.BytesIO()
    match packing.format:
        case "jpeg":
            subsampling = "4:4:4" if packing.quality >= FULL_CHROMA_QUALITY else "4:2:0"
            picture.image.save(
                target, "JPEG", quality=packing.quality, subsampling=subsampling, exif=exif(made)
            )
        case "webp":
            picture.image.save(
                target, "WEBP", quality=packing.quality, method=WEBP_METHOD, exif=exif(made)
            )
    return PackedPicture(
        target.getvalue(), packing.format, made.seed, picture.width, picture.height
    )


class PackingPool:
    """The threads that pack."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(PACKING_THREADS, thread_name_prefix="fluxd-pack")
        # Apart from those that may wait for them.
        self._strips = ThreadPoolExecutor(STRIP_THREADS, thread_name_prefix="fluxd-strip")
        self._lock = threading.Lock()

    def pack(
        self,
        pictures: Sequence[tuple[DrawnPicture, Provenance]],
        packing: Packing,
        deliver: Callable[[list[Future[PackedPicture]]], None],
    ) -> None:
        """Pack one job's pictures; ``deliver`` is called once, on a packing thread.

        Raises:
            RuntimeError: the threads have ended.
        """
        remaining = len(pictures)
        packed: list[Future[PackedPicture]] = [Future() for _ in pictures]

        # Not as a callback of what is submitted, which runs on the worker's thread where the
        # picture is packed before the callback is there.
        def work(future: Future[PackedPicture], picture: DrawnPicture, made: Provenance) -> None:
            nonlocal remaining
            try:
                future.set_result(pack_picture(picture, packing, made, self._spread))
            except Exception as error:  # noqa: BLE001 (told by whom it is delivered to)
                future.set_exception(error)
            with self._lock:
                remaining -= 1
                is_last = remaining == 0
            if is_last:
                try:
                    deliver(packed)
                except Exception:
                    logger.exception("packed pictures could not be delivered")

        for future, (picture, made) in zip(packed, pictures, strict=True):
            self._pool.submit(work, future, picture, made)

    def pack_in_order(
        self,
        picture: DrawnPicture,
        made: Provenance,
        packing: Packing,
        deliver: Callable[[PackedPicture], None],
        previous: Future[None] | None,
    ) -> Future[None]:
        """Pack one picture and deliver it, on a packing thread, after ``previous`` is done.

        Raises:
            RuntimeError: the threads have ended.
        """

        def work() -> None:
            packed = pack_picture(picture, packing, made, self._spread)
            if previous is not None:
                # Begun before this one, so that waiting for it cannot block for ever.
                wait((previous,))
            deliver(packed)

        return self._pool.submit(work)

    def _spread(
        self, deflate: Callable[[Strip], Deflated], strips: Iterable[Strip]
    ) -> Iterable[Deflated]:
        """Map strips on the threads for them and on this one, which does what those do not get to.

        Each goes to a thread while the next is made. The last stays here, so that a picture of
        one strip is handed to nobody.
        """
        coming = iter(strips)
        last = next(coming)
        given: list[tuple[Strip, Future[Deflated]]] = []
        for strip in coming:
            given.append((last, self._strips.submit(deflate, last)))
            last = strip
        done = [deflate(last)]
        for strip, future in reversed(given):
            done.append(deflate(strip) if future.cancel() else future.result())
        return reversed(done)

    def close(self) -> None:
        """End the threads after what they have in hand."""
        self._pool.shutdown(wait=True)
        self._strips.shutdown(wait=True)
