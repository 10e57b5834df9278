"""Which kind of answer a client takes: JSON, or the bytes of one picture.

Source: RFC 9110, 12.4.2 (quality values) and 12.5.1 (Accept).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import get_args

from app.api.bodies import JSON_TYPE
from app.engine.packing import PictureFormat
from app.errors import NotAcceptableError

DEFAULT_FORMAT: PictureFormat = "png"
FORMATS: tuple[PictureFormat, ...] = get_args(PictureFormat)

# A missing leading zero is no standard, but what some clients send.
_QUALITY = re.compile(r"(?:0?\.[0-9]{1,3}|0\.?|1(?:\.0{0,3})?)")


@dataclass(frozen=True, slots=True)
class AnswerKind:
    """JSON with pictures in base64, or one picture's bytes; ``format`` in both cases."""

    is_json: bool
    format: PictureFormat


@dataclass(frozen=True, slots=True)
class _Range:
    """One element of an Accept header, such as ``image/*;q=0.5``."""

    type: str
    subtype: str
    quality: float

    def specificity(self, media_type: str) -> int | None:
        """2 for the very type, 1 for ``image/*``, 0 for ``*/*``, None for another."""
        kind, _, subtype = media_type.partition("/")
        if self.type == "*" and self.subtype == "*":
            return 0
        if self.type != kind:
            return None
        if self.subtype == "*":
            return 1
        return 2 if self.subtype == subtype else None


# A program sends the same header with every request.
@lru_cache(maxsize=64)
def choose_answer(accept: tuple[str, ...], wanted: PictureFormat | None) -> AnswerKind:
    """The kind of answer that the client likes best.

    JSON wins where nothing more specific is asked for: ``*/*`` or no header at all.

    Args:
        accept: all Accept headers of the request.
        wanted: the body's ``output_format``, if it names one.

    Raises:
        NotAcceptableError: there is no kind that both sides know.
    """
    ranges = [_parse(part) for header in accept for part in header.split(",") if part.strip()]
    formats = FORMATS if wanted is None else (wanted,)
    default = wanted or DEFAULT_FORMAT
    if not ranges:
        return AnswerKind(is_json=True, format=default)
    best = AnswerKind(is_json=True, format=default)
    best_rank = _rank(JSON_TYPE, ranges)
    for offered in formats:
        rank = _rank(f"image/{offered}", ranges)
        if rank > best_rank:
            best, best_rank = AnswerKind(is_json=False, format=offered), rank
    if best_rank[0] == 0:
        offers = ", ".join([JSON_TYPE, *(f"image/{name}" for name in formats)])
        because = "" if wanted is None else f" with output_format {wanted}"
        got = ", ".join(accept)
        raise NotAcceptableError(f"Accept must allow one of {offers}{because}; got {got!r:.80}")
    return best


def _rank(media_type: str, ranges: Sequence[_Range]) -> tuple[float, int]:
    """(quality, specificity) of the most specific range that covers the type."""
    best, quality = -1, 0.0
    for candidate in ranges:
        specificity = candidate.specificity(media_type)
        if specificity is not None and specificity > best:
            best, quality = specificity, candidate.quality
    return quality, best


def _parse(element: str) -> _Range:
    media_type, *parameters = (part.strip() for part in element.lower().split(";"))
    kind, _, subtype = media_type.partition("/")
    quality = 1.0
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            value = value.strip()
            # What cannot be read is not asked for.
            quality = float(value) if _QUALITY.fullmatch(value) else 0.0
    return _Range(kind, subtype, quality)
