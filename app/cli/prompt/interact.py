"""The loop: read a line, obey it, until the person leaves."""

from __future__ import annotations

from app.cli.console import say
from app.cli.drawing import open_artist
from app.cli.prompt.editor import Editor
from app.cli.prompt.session import Session
from app.cli.terminal import open_screen
from app.settings import Settings
from app.telemetry import configure_logging
from fluxcore.version import __version__


def interact(
    settings: Settings, *, server: str | None, key: str | None, graphics: str, shows_steps: bool
) -> None:
    """Run the prompt until Ctrl-D or ``!quit``.

    Raises:
        UsageError, FluxError, DrawingError: it cannot draw at all.
    """
    configure_logging("error" if settings.log_level == "error" else "warning", settings.log_format)
    screen = open_screen(graphics)
    with open_artist(settings, server, key, is_warmed=True) as artist:
        session = Session(
            artist, screen, settings, is_remote=server is not None, shows_steps=shows_steps
        )
        say(f"fluxd {__version__}. Type what to draw; !help tells more, Ctrl-D leaves.")
        for note in (artist.note, screen.note):
            if note is not None:
                say(note)
        _converse(session)


def _converse(session: Session) -> None:
    editor = Editor(session)
    has_warned = False
    while True:
        try:
            line = editor.read()
            session.obey(line)
            has_warned = False
        except KeyboardInterrupt:
            continue
        except EOFError:
            unsaved = len(session.gallery.unsaved)
            if not unsaved or has_warned:
                return
            has_warned = True
            count = "1 picture is" if unsaved == 1 else f"{unsaved} pictures are"
            say(f"{count} not saved: !save all keeps them, once more leaves without")
