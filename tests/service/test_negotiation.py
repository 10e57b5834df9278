"""Accept headers, as clients really send them."""

from __future__ import annotations

import re

import pytest

from app.api.negotiation import AnswerKind, choose_answer
from app.engine import PictureFormat
from app.errors import NotAcceptableError

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"


@pytest.mark.parametrize(
    ("accept", "wanted", "kind"),
    [
        ([], None, AnswerKind(True, "png")),
        ([""], None, AnswerKind(True, "png")),
        ([], "webp", AnswerKind(True, "webp")),
        (["*/*"], None, AnswerKind(True, "png")),
        (["*/*"], "jpeg", AnswerKind(True, "jpeg")),
        (["application/json"], None, AnswerKind(True, "png")),
        (["application/*"], None, AnswerKind(True, "png")),
        (["image/png"], None, AnswerKind(False, "png")),
        (["IMAGE/JPEG"], None, AnswerKind(False, "jpeg")),
        (["image/*"], None, AnswerKind(False, "png")),
        (["image/*"], "webp", AnswerKind(False, "webp")),
        (["image/webp;q=0.9, image/jpeg;q=0.95"], None, AnswerKind(False, "jpeg")),
        (["image/webp;q=0.9", "image/jpeg;q=0.95"], None, AnswerKind(False, "jpeg")),
        (["image/png;q=0.5, application/json"], None, AnswerKind(True, "png")),
        (["image/png, application/json;q=0.5"], None, AnswerKind(False, "png")),
        (["application/json, image/png"], None, AnswerKind(True, "png")),
        (["image/png, */*"], None, AnswerKind(False, "png")),
        (["image/png;q=0, image/*"], None, AnswerKind(False, "jpeg")),
        (["*/*;q=0.1, image/webp;q=0"], None, AnswerKind(True, "png")),
        (["image/png; q = 0.3 , image/webp ; q=0.4"], None, AnswerKind(False, "webp")),
        ([BROWSER], None, AnswerKind(False, "webp")),
    ],
)
def test_the_best_liked_kind_is_chosen(
    accept: list[str], wanted: PictureFormat | None, kind: AnswerKind
) -> None:
    assert choose_answer(tuple(accept), wanted) == kind


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        (["text/html"], None),
        (["image/gif"], None),
        (["image/png"], "webp"),
        (["*/*;q=0"], None),
        (["application/json;q=0.0"], None),
        (["image/png;q=nonsense"], None),
        (["image/png;q=2"], None),
        (["png"], None),
    ],
)
def test_what_cannot_be_served_is_refused(accept: list[str], wanted: PictureFormat | None) -> None:
    with pytest.raises(NotAcceptableError, match=re.escape(f"got '{', '.join(accept)}'")):
        choose_answer(tuple(accept), wanted)
