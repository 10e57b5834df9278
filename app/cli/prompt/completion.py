"""What Tab offers: commands, what may follow them, files, and pictures by number."""

from __future__ import annotations

from collections.abc import Iterator

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from app.cli.prompt.commands import COMMANDS
from app.cli.prompt.gallery import Gallery
from app.cli.prompt.parsing import picture_number

META_CHARS = 40


class LineCompleter(Completer):
    """Completes a line of the prompt.

    Args:
        gallery: the pictures that may be named.
    """

    def __init__(self, gallery: Gallery) -> None:
        self._gallery = gallery
        self._paths = PathCompleter(expanduser=True)

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterator[Completion]:
        """Everything that may stand at the cursor."""
        text = document.text_before_cursor.lstrip()
        if not text.startswith("!"):
            *before, word = text.split(" ")
            if all(picture_number(one) is not None for one in before):
                yield from self._pictures(word)
            return
        name, space, argument = text[1:].partition(" ")
        if not space:
            for command in COMMANDS:
                if command.startswith(name):
                    usage = f"!{command} {COMMANDS[command].usage}".rstrip()
                    yield Completion(
                        f"!{command}",
                        -len(text),
                        display=usage,
                        display_meta=COMMANDS[command].help,
                    )
            return
        yield from self._arguments(name, argument, complete_event)

    def _arguments(self, name: str, argument: str, event: CompleteEvent) -> Iterator[Completion]:
        command = COMMANDS.get(name)
        if command is None:
            return
        word = argument.rpartition(" ")[2]
        if word == argument:
            for known in command.words:
                if known.startswith(word):
                    yield Completion(known, -len(word))
        if "$" in command.usage:
            yield from self._pictures(word)
        if command.takes_file and argument:
            yield from self._paths.get_completions(Document(argument), event)

    def _pictures(self, word: str) -> Iterator[Completion]:
        if not word.startswith("$"):
            return
        for kept in reversed(list(self._gallery)):
            name = f"${kept.number}"
            if name.startswith(word):
                yield Completion(name, -len(word), display_meta=kept.origin[:META_CHARS])
