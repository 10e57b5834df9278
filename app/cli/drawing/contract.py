"""What is ordered, who draws it, what is told meanwhile and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from app.engine.packing import PackedPicture, Packing
from fluxcore.params import GenerationParams

# As many as the public API makes.
MOST_PREVIEWS = 10


class DrawingError(Exception):
    """No picture comes; the message says why and what to do.

    Args:
        is_wrong_order: the same order can never work.
    """

    def __init__(self, message: str, *, is_wrong_order: bool = False) -> None:
        super().__init__(message)
        self.is_wrong_order = is_wrong_order


@dataclass(frozen=True, slots=True)
class Order:
    """One job for an artist.

    Attributes:
        params: what to draw, checked, pictures included.
        reference_files, mask_file: the same pictures as the files that they came as.
        previews: pictures of what is coming that are wanted, for each picture at most.
    """

    params: GenerationParams
    reference_files: tuple[bytes, ...] = ()
    mask_file: bytes | None = None
    packing: Packing = field(default_factory=Packing)
    previews: int = 0


@dataclass(frozen=True, slots=True)
class Drawn:
    """A finished order. Units: milliseconds per stage."""

    pictures: tuple[PackedPicture, ...]
    timings_ms: Mapping[str, float]
    warnings: tuple[str, ...]


class Watcher(Protocol):
    """Whoever is told how things stand, on the thread that waits."""

    def show(
        self, stage: str, share: float | None = None, left_s: float | None = None, note: str = ""
    ) -> None:
        """See ``app.cli.console.Bar.show``."""

    def preview(self, image_index: int, data: bytes) -> None:
        """A file of the picture that is coming, in its final size."""


class Artist(Protocol):
    """Draws orders, one at a time."""

    @property
    def name(self) -> str:
        """The model, and where it is; for display."""

    @property
    def note(self) -> str | None:
        """What a newcomer should know about the model, if anything."""

    @property
    def load_ms(self) -> float | None:
        """What loading the model took, if it was loaded for this."""

    @property
    def standing(self) -> str | None:
        """What is being done until pictures can be drawn, in words; None once they can.

        Raises:
            FluxError, DrawingError: that will never be.
        """

    def make_ready(self, watcher: Watcher) -> None:
        """Wait until pictures can be drawn.

        Raises:
            FluxError, DrawingError: that will never be.
        """

    def draw(self, order: Order, watcher: Watcher) -> Drawn:
        """Draw; an exception, such as ``KeyboardInterrupt``, cancels the job.

        Raises:
            InvalidParamsError, ServiceError, DrawingError: no picture comes.
        """

    def close(self) -> None:
        """Let go of everything; an artist that is closed draws no more."""

    def abandon(self) -> None:
        """The same for a person who does not want to wait; the process may end in it."""


def step_note(image_index: int, pictures: int, step: int, steps: int) -> str:
    """Where a job is, in words."""
    which = f"picture {image_index + 1} of {pictures}, " if pictures > 1 else ""
    return f"{which}step {step} of {steps}"
