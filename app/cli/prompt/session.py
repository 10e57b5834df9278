"""What a session remembers, and how it draws. Knows nothing of the line editor."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image

from app.cli.console import UsageError, duration, progress_bar, say
from app.cli.drawing import MOST_PREVIEWS, Artist, DrawingError, Drawn, Order
from app.cli.onlooker import Onlooker
from app.cli.prompt.commands import COMMANDS
from app.cli.prompt.gallery import Gallery, Kept, sheet
from app.cli.prompt.parsing import Call, LineError, Wish, parse_line
from app.cli.terminal import Screen
from app.engine.pictures import read_picture
from app.errors import ServiceError
from app.settings import Settings, nearest
from fluxcore.errors import FluxError, InvalidParamsError
from fluxcore.params import MAX_IMAGES, GenerationParams, Schedule

RANDOM_SEEDS = 2**32


@dataclass(slots=True)
class Choices:
    """What holds for every picture until it is changed; None is the default."""

    size: tuple[int, int] | None = None
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    schedule: Schedule = "flux"
    power_alpha: float = 2.0

    def described(self) -> str:
        """In one line."""
        size = "default size" if self.size is None else f"{self.size[0]}x{self.size[1]}"
        parts = [size, f"seed {'random' if self.seed is None else self.seed}"]
        if self.steps is not None:
            parts.append(f"{self.steps} steps")
        if self.guidance is not None:
            parts.append(f"guidance {self.guidance:g}")
        if self.schedule == "power":
            parts.append(f"power {self.power_alpha:g}")
        elif self.schedule != "flux":
            parts.append(self.schedule)
        return ", ".join(parts)


class Session:
    """One person at one prompt.

    Args:
        is_remote: the service has default sizes of its own.
        shows_steps: show what is coming, too.
    """

    def __init__(
        self,
        artist: Artist,
        screen: Screen,
        settings: Settings,
        *,
        is_remote: bool = False,
        shows_steps: bool = False,
    ) -> None:
        self.artist = artist
        self.screen = screen
        self.choices = Choices()
        self.gallery = Gallery()
        self.max_pixels = settings.max_image_pixels
        self.last_sheet: Image.Image | None = None
        self.last_wish: Wish | None = None
        self._shows_steps = shows_steps
        self._default_sides: dict[str, int | None] = {}
        if not is_remote:
            self._default_sides = {
                "width": settings.default_width,
                "height": settings.default_height,
            }

    def obey(self, line: str) -> None:
        """Do what a line says; what goes wrong is told.

        Raises:
            EOFError: it says to leave.
        """
        try:
            match parsed := parse_line(line):
                case Call():
                    self._call(parsed)
                case Wish():
                    self.draw(parsed)
        except KeyboardInterrupt:
            say("cancelled")
        except InvalidParamsError as error:
            say(error.message)
        except (LineError, UsageError, FluxError, ServiceError, DrawingError, OSError) as error:
            say(str(error))

    def draw(self, wish: Wish) -> list[Kept]:
        """Draw one picture and show it."""
        drawn, onlooker = self._drawn(wish, 1, self.choices.seed)
        self.last_wish = wish
        kept = self._keep(drawn, wish)
        onlooker.picture(kept[0].picture)
        self._tell(kept, drawn)
        return kept

    def explore(self, wish: Wish, count: int) -> None:
        """Draw variations, seed by seed, and show them together."""
        seed = random.randrange(RANDOM_SEEDS) if self.choices.seed is None else self.choices.seed
        kept: list[Kept] = []
        self.last_wish = wish
        for start in range(0, count, MAX_IMAGES):
            drawn, _ = self._drawn(wish, min(MAX_IMAGES, count - start), seed + start)
            added = self._keep(drawn, wish)
            kept += added
            self._tell(added, drawn)
        self.last_sheet = sheet(kept)
        self.screen.show(self.last_sheet)
        say("!save sheet keeps the sheet, !save $N a picture; $N as the first word works on it")

    def _drawn(self, wish: Wish, n: int, seed: int | None) -> tuple[Drawn, Onlooker]:
        order = self._order(wish, n, seed)
        with quiet_keys(), progress_bar() as bar:
            onlooker = Onlooker(bar, self.screen)
            return self.artist.draw(order, onlooker), onlooker

    def _order(self, wish: Wish, n: int, seed: int | None) -> Order:
        choices = self.choices
        size = wish.size or choices.size
        given: dict[str, Any] = {}
        if size is not None:
            given = {"width": size[0], "height": size[1]}
        elif not wish.references:
            given = dict(self._default_sides)
        files = tuple(self.gallery.find(number).data for number in wish.references)
        params = GenerationParams(
            prompt=wish.prompt,
            steps=choices.steps,
            guidance=choices.guidance,
            seed=seed,
            n=n,
            schedule=choices.schedule,
            power_alpha=choices.power_alpha,
            references=tuple(read_picture(file, self.max_pixels) for file in files),
            **given,
        )
        previews = MOST_PREVIEWS if self._shows_steps else 0
        return Order(params, reference_files=files, previews=previews)

    def _keep(self, drawn: Drawn, wish: Wish) -> list[Kept]:
        return [
            self.gallery.add(
                picture.data, wish.prompt, picture.seed, (picture.width, picture.height)
            )
            for picture in drawn.pictures
        ]

    def _tell(self, kept: list[Kept], drawn: Drawn) -> None:
        took = duration(drawn.timings_ms.get("total", 0.0) / 1000)
        for one in kept:
            say(f"${one.number}  {one.width}x{one.height}  seed {one.seed}  {took}")
        for warning in drawn.warnings:
            say(f"warning: {warning}")

    def _call(self, call: Call) -> None:
        command = COMMANDS.get(call.name)
        if command is None:
            hint = nearest(call.name, COMMANDS)
            raise LineError(f"there is no !{call.name}; {hint}; !help lists all")
        command.run(self, call.argument)


@contextmanager
def quiet_keys() -> Iterator[None]:
    """What is typed meanwhile is kept for the next line, and not shown amid the bar."""
    try:
        import termios

        before = termios.tcgetattr(sys.stdin.fileno())
    except (ImportError, OSError, ValueError, termios.error):
        yield
        return
    quiet = list(before)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, before)
