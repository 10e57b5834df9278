"""Logging: the only module that configures it.

Owns the three line formats, the request id that records carry, and the one line
that each finished job leaves. Knows nothing of HTTP or of the pipeline.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from collections.abc import Mapping
from contextvars import ContextVar
from typing import TextIO

# Set for the length of a request, and by the worker for the length of a job.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

_COLOURS = {"DEBUG": "2", "INFO": "32", "WARNING": "33", "ERROR": "31", "CRITICAL": "31;1"}
# Control characters but tab and line feed, as they are shown.
_CONTROLS = {
    code: f"\\x{code:02x}"
    for code in (*range(0x20), *range(0x7F, 0xA0))
    if code not in (0x09, 0x0A)
}
# Libraries whose DEBUG and INFO lines say nothing to an operator of this service.
_QUIET = ("asyncio", "PIL", "uvicorn")
# Warn of every client that speaks no HTTP or sends no sound form, which is told so itself.
_SILENT = ("python_multipart", "uvicorn.error")


class RequestIdFilter(logging.Filter):
    """Puts the current request id on every record that has none."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Always true: the filter only adds."""
        if not hasattr(record, "request_id"):
            record.request_id = request_id.get()
        return True


class LineFormatter(logging.Formatter):
    """One line a record: full UTC timestamps, or short coloured lines for people."""

    def __init__(self, *, is_human: bool) -> None:
        super().__init__()
        self._is_human = is_human

    def format(self, record: logging.LogRecord) -> str:
        """The line, followed by the traceback if the record has one."""
        identity = getattr(record, "request_id", None)
        # A client's text must be able neither to start a line of its own nor to command the
        # terminal that shows it.
        message = record.getMessage().translate(_CONTROLS).replace("\n", "\n    ")
        if self._is_human:
            clock = time.strftime("%H:%M:%S", time.localtime(record.created))
            level = f"\x1b[{_COLOURS.get(record.levelname, '0')}m{record.levelname:<7}\x1b[0m"
            suffix = f" \x1b[2m[{identity}]\x1b[0m" if identity else ""
            line = f"{clock} {level} {message}{suffix}"
        else:
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            line = (
                f"{stamp}.{int(record.msecs):03d}Z {record.levelname} {record.name} "
                f"[{identity or '-'}] {message}"
            )
        if record.exc_info:
            line = f"{line}\n{self.formatException(record.exc_info)}"
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line. An event's fields stand in it under their own names."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; a traceback stands in it as text."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "request_id": getattr(record, "request_id", None),
            "message": getattr(record, "event", None) or record.getMessage(),
        }
        fields: Mapping[str, object] = getattr(record, "fields", {})
        line.update({name: value for name, value in fields.items() if name not in line})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure_logging(level: str, line_format: str = "auto", stream: TextIO | None = None) -> None:
    """Send all records of ``level`` and above to ``stream`` (standard error when left out).

    Args:
        level: debug, info, warning or error.
        line_format: human, plain, json, or auto: human on a terminal, else plain.
    """
    target = sys.stderr if stream is None else stream
    is_human = line_format == "human" or (line_format == "auto" and target.isatty())
    handler = logging.StreamHandler(target)
    handler.setFormatter(
        JsonFormatter() if line_format == "json" else LineFormatter(is_human=is_human)
    )
    handler.addFilter(RequestIdFilter())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    # What is odd about a client's picture; told in words of the picture's own, without an end.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in _SILENT:
        logging.getLogger(name).setLevel(logging.ERROR)


def fields_line(event: str, fields: Mapping[str, object]) -> str:
    """``event name=value name=value``, the form of every line that programs may read."""
    return " ".join([event, *(f"{name}={_shown(value)}" for name, value in fields.items())])


def log_event(
    logger: logging.Logger,
    level: int,
    event: str,
    fields: Mapping[str, object],
    request_id: str | None = None,
) -> None:
    """Log an event with fields, which the JSON form keeps apart.

    Args:
        request_id: of the job that it is about, where that is not the current one.
    """
    extra: dict[str, object] = {"event": event, "fields": fields}
    if request_id is not None:
        extra["request_id"] = request_id
    logger.log(level, "%s", fields_line(event, fields), extra=extra)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.1f}"
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return str(value)
