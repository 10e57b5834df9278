"""The line that is typed: editing, history, completion, and a line of state below it.

Source of the editor: prompt_toolkit (BSD).
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from platformdirs import user_state_path
from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from app.cli.console import say
from app.cli.drawing import DrawingError
from app.cli.prompt.completion import LineCompleter
from app.cli.prompt.session import Session
from fluxcore.errors import FluxError

PROMPT = "fluxd> "
MENU_ROWS = 6
# How often the line below tells how loading goes on, in seconds.
REFRESH_S = 0.25


class Editor:
    """Reads lines for a session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._prompt: PromptSession[str] = PromptSession(
            PROMPT,
            history=_history(),
            auto_suggest=AutoSuggestFromHistory(),
            completer=LineCompleter(session.gallery),
            # A menu that comes by itself takes the Tab that was meant to complete.
            complete_while_typing=False,
            bottom_toolbar=self._state,
            reserve_space_for_menu=MENU_ROWS,
        )

    def read(self) -> str:
        """One line.

        Raises:
            EOFError: Ctrl-D on an empty line.
            KeyboardInterrupt: Ctrl-C.
            FluxError, DrawingError: the model cannot be used, and all pictures are saved.
        """
        return self._prompt.prompt(pre_run=self._watch)

    def _state(self) -> str:
        session = self._session
        try:
            standing = session.artist.standing
        except (FluxError, DrawingError) as error:
            return f" {error}"
        if standing is not None:
            return f" {standing}"
        return f" {session.artist.name}, {session.choices.described()}"

    def _watch(self) -> None:
        """Keep the line below fresh until the model is ready."""
        app = get_app()

        async def watch() -> None:
            while True:
                try:
                    if self._session.artist.standing is None:
                        break
                except (FluxError, DrawingError) as error:
                    # Pictures would be lost; the line below tells what is wrong.
                    if not self._session.gallery.unsaved:
                        app.exit(exception=error)
                    return
                app.invalidate()
                await asyncio.sleep(REFRESH_S)
            app.invalidate()

        app.create_background_task(watch())


def _history() -> History:
    """Lines of earlier sessions, readable to their user only."""
    path = history_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
    except OSError as error:
        say(f"lines are not remembered: cannot write {path}: {error.strerror}")
        return InMemoryHistory()
    return FileHistory(str(path))


def history_path() -> Path:
    """Where lines are kept."""
    return user_state_path("fluxd", appauthor=False) / "prompt-history"
