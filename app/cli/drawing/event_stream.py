"""Server-sent events, read.

Source: the HTML standard, 9.2.6 (interpreting an event stream).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def read_events(lines: Iterable[bytes]) -> Iterator[tuple[str, str]]:
    """Name and data of each event that is complete; comments are passed over."""
    name, data = "message", list[str]()
    for raw in lines:
        line = raw.decode("utf-8", "replace").rstrip("\r\n")
        if not line:
            if data:
                yield name, "\n".join(data)
            name, data = "message", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data.append(value)
