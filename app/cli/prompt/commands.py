"""The commands of the prompt: ``!seed`` and the like, each a function of the session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from app.cli.console import say
from app.cli.prompt.gallery import Kept, as_png, free_name, write_png
from app.cli.prompt.parsing import (
    LAST,
    LineError,
    parse_wish,
    picture_number,
    read_number,
    read_path,
    read_size,
    read_whole,
)
from fluxcore.errors import InvalidParamsError
from fluxcore.params import GenerationParams, Schedule

if TYPE_CHECKING:
    from app.cli.prompt.session import Session

DEFAULT = "default"
RANDOM = "random"
ALL = "all"
SHEET = "sheet"
MOST_VARIATIONS = 36
# Characters of a prompt that a list shows.
SHOWN_CHARS = 60


@dataclass(frozen=True, slots=True)
class Command:
    """One command.

    Attributes:
        usage: its arguments.
        help: what it does, in one line.
        words: what may follow it, for completion.
        takes_file: a file's name may follow it.
    """

    usage: str
    help: str
    run: Callable[[Session, str], None]
    words: tuple[str, ...] = ()
    takes_file: bool = False


def _seed(session: Session, argument: str) -> None:
    if argument:
        seed = None if argument == RANDOM else read_whole("!seed", argument)
        _check(seed=seed)
        session.choices.seed = seed
    _tell(session)


def _size(session: Session, argument: str) -> None:
    if argument:
        session.choices.size = None if argument == DEFAULT else read_size(argument)
    _tell(session)


def _steps(session: Session, argument: str) -> None:
    if argument:
        steps = None if argument == DEFAULT else read_whole("!steps", argument)
        _check(steps=steps)
        session.choices.steps = steps
    _tell(session)


def _guidance(session: Session, argument: str) -> None:
    if argument:
        guidance = None if argument == DEFAULT else read_number("!guidance", argument)
        _check(guidance=guidance)
        session.choices.guidance = guidance
    _tell(session)


def _schedule(session: Session, argument: str) -> None:
    if argument:
        name, _, exponent = argument.partition(" ")
        alpha = read_number("!schedule power", exponent) if exponent else 2.0
        if exponent and name != "power":
            raise LineError(f"only power takes a number; got {argument!r}")
        _check(schedule=name, power_alpha=alpha)
        session.choices.schedule = next(one for one in get_args(Schedule) if one == name)
        session.choices.power_alpha = alpha
    _tell(session)


def _save(session: Session, argument: str) -> None:
    word, _, rest = argument.partition(" ")
    if word == SHEET:
        _save_sheet(session, rest.strip())
    elif word == ALL and not rest:
        for kept in session.gallery.unsaved:
            _save_one(kept, None)
    else:
        chosen, name = _chosen(session, argument)
        if name and len(chosen) > 1:
            raise LineError("one name is for one picture; leave it out to save several")
        for kept in chosen:
            _save_one(kept, name)


def _save_one(kept: Kept, name: str | None) -> None:
    stem = f"fluxd-{kept.number if kept.seed is None else kept.seed}"
    path = read_path(name) if name else free_name(stem, Path())
    write_png(kept.png, path)
    kept.is_saved = True
    say(f"${kept.number} saved as {path}")


def _save_sheet(session: Session, name: str) -> None:
    if session.last_sheet is None:
        raise LineError("there is no sheet yet; !explore makes one")
    path = read_path(name) if name else free_name("fluxd-sheet", Path())
    write_png(as_png(session.last_sheet), path)
    say(f"the sheet saved as {path}")


def _load(session: Session, argument: str) -> None:
    if not argument:
        raise LineError("!load takes the name of a PNG, JPEG or WebP file")
    kept = session.gallery.load(read_path(argument), session.max_pixels)
    session.screen.show(kept.picture)
    say(f"${kept.number}  {kept.width}x{kept.height}  {kept.origin}")


def _show(session: Session, argument: str) -> None:
    chosen, rest = _chosen(session, argument)
    if rest:
        raise LineError(f"!show takes pictures, such as $0; got {rest!r}")
    for kept in chosen:
        session.screen.show(kept.picture)
        say(_line(kept))


def _list(session: Session, argument: str) -> None:
    if not len(session.gallery):
        say("no pictures yet")
    for kept in session.gallery:
        say(_line(kept))


def _explore(session: Session, argument: str) -> None:
    number, _, text = argument.partition(" ")
    count = read_whole("!explore", number)
    if not 2 <= count <= MOST_VARIATIONS:
        raise LineError(f"!explore takes 2 to {MOST_VARIATIONS} variations; got {count}")
    wish = parse_wish(text) if text.strip() else session.last_wish
    if wish is None:
        raise LineError("draw something first, or say what: !explore 4 a blue star")
    session.explore(wish, count)


def _help(session: Session, argument: str) -> None:
    say(help_text())


def _quit(session: Session, argument: str) -> None:
    raise EOFError


COMMANDS = {
    "seed": Command("[N | random]", "the seed of what comes", _seed, (RANDOM,)),
    "size": Command(
        "[WxH | default]",
        "the size of what comes",
        _size,
        (DEFAULT, "256x256", "512x512", "768x768", "1024x1024"),
    ),
    "steps": Command("[N | default]", "how many steps", _steps, (DEFAULT,)),
    "guidance": Command("[X | default]", "guidance; base models only", _guidance, (DEFAULT,)),
    "schedule": Command(
        "[flux | linear | power [X]]", "how noise falls", _schedule, get_args(Schedule)
    ),
    "explore": Command("N [PROMPT]", "N variations, as a sheet", _explore),
    "show": Command("[$N ...]", "show pictures again", _show),
    "list": Command("", "all pictures of this session", _list),
    "save": Command(
        "[$N ... | all | sheet] [FILE]", "write pictures as PNG", _save, (ALL, SHEET), True
    ),
    "load": Command("FILE", "take a picture in", _load, (), True),
    "help": Command("", "this list", _help),
    "quit": Command("", "leave, as Ctrl-D does", _quit),
}


def help_text() -> str:
    """All there is, for the person at the prompt."""
    rows = [
        ("a blue star", "draws it"),
        ("512x512 a blue star", "in that size"),
        ("$ make it red", "draws with the last picture as reference"),
        ("$0 $3 side by side", "with several; each picture's number is told"),
        *((f"!{name} {command.usage}".strip(), command.help) for name, command in COMMANDS.items()),
        ("Ctrl-C", "cancels the picture, or the line"),
    ]
    width = max(len(left) for left, _ in rows) + 2
    return "\n".join(f"{left:<{width}}{right}" for left, right in rows)


def _chosen(session: Session, argument: str) -> tuple[list[Kept], str]:
    """The pictures that an argument begins with, else the last one, and what follows them."""
    numbers: list[int] = []
    rest = argument
    while rest:
        word, _, after = rest.partition(" ")
        number = picture_number(word)
        if number is None:
            break
        numbers.append(number)
        rest = after.lstrip()
    return [session.gallery.find(number) for number in numbers or [LAST]], rest


def _check(**given: object) -> None:
    """Refuse now what would be refused with the next picture.

    Raises:
        LineError: saying what is allowed.
    """
    try:
        GenerationParams(prompt="a", **given)  # type: ignore[arg-type]
    except InvalidParamsError as error:
        raise LineError(error.message) from None


def _tell(session: Session) -> None:
    say(session.choices.described())


def _line(kept: Kept) -> str:
    seed = "" if kept.seed is None else f"  seed {kept.seed}"
    origin = kept.origin if len(kept.origin) <= SHOWN_CHARS else f"{kept.origin[:SHOWN_CHARS]}…"
    return f"${kept.number}  {kept.width}x{kept.height}{seed}  {origin}"
