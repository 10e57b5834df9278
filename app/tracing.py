"""OpenTelemetry traces of jobs, where the package is installed and set up; else nothing.

Owns the names of spans and attributes. Uses the API alone: where spans go is for
whoever starts the process to say, as with ``opentelemetry-instrument fluxd serve``
and the ``OTEL_*`` variables. Without a provider every span is one that does nothing.
No prompt and no picture is in a trace.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fluxcore.version import __version__

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

_tracer: Tracer | None
try:
    from opentelemetry import trace
except ImportError:
    _tracer = None
else:
    # Asks for the provider when the first span is made, so that it may be set up later.
    _tracer = trace.get_tracer("fluxd", __version__)

Attributes = Mapping[str, str | bool | int | float]


class JobTrace:
    """One job: a span from its acceptance to its answer, with one for each of its slices.

    Made on the thread of the request, whose span becomes the parent.
    """

    def __init__(self, attributes: Attributes) -> None:
        self._span: Span | None = None
        self._inside: Context | None = None
        if _tracer is not None:
            span = _tracer.start_span("fluxd.job", attributes=dict(attributes))
            if span.is_recording():
                self._span = span
                self._inside = trace.set_span_in_context(span)

    @property
    def is_recorded(self) -> bool:
        """Whether anybody gets to see it."""
        return self._span is not None

    def sliced(self, stage: str, took_s: float) -> None:
        """A slice has just ended."""
        if self._span is None or _tracer is None:
            return
        end_ns = time.time_ns()
        span = _tracer.start_span(
            f"fluxd.{stage}", self._inside, start_time=end_ns - int(took_s * 1e9)
        )
        span.end(end_ns)

    def ended(self, outcome: str, attributes: Attributes) -> None:
        """The job is answered: ``completed``, or with the error of a code."""
        if self._span is None:
            return
        self._span.set_attributes(dict(attributes))
        self._span.set_attribute("fluxd.outcome", outcome)
        if outcome != "completed":
            self._span.set_status(trace.StatusCode.ERROR, outcome)
        self._span.end()
