"""Request bodies: JSON, or a form with files in it, to a checked model and its pictures.

Owns which media types are read and what a part of a form is: a field, a picture or
something unknown. The pictures stay undecoded here.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

import anyio.to_thread
from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ValidationError, ValidationInfo
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from app.api.errors import from_problems
from app.errors import InvalidRequestError, MediaTypeError, ServiceError

JSON_TYPE = "application/json"
FORM_TYPE = "multipart/form-data"
# Bodies up to this size are parsed on the event loop; it takes well under a millisecond.
SMALL_BODY_BYTES = 64 * 1024
# Parts of one form. The routes allow far fewer pictures; this bounds the parser.
MAX_FORM_PARTS = 128
# Some clients number their pictures, some say that there may be several, some do neither.
_REFERENCE_PART = re.compile(r"images?(\[[0-9]{0,3}\])?")
_MASK_PART = "mask"
_WHOLE_TEXT = re.compile(r"-?[0-9]{1,40}(\.0{1,3})?")
# The context of values that are read from their text.
_AS_TEXT = {"is_text": True}
# Of a name that a client made up, an error shows so much.
_SHOWN_CHARS = 60
# How forms may be written. The last is what some Java libraries say, and then send.
_LATIN = "iso-8859-1"
_CHARSETS = frozenset({"utf-8", "utf8", "us-ascii", _LATIN})
# A file that was sent without a file name arrives as text, its bytes read as latin-1.
_FILE_STARTS = ("\x89PNG", "\xff\xd8\xff", "RIFF")

# A picture as it came: the bytes of a file, or base64, a data URL or an address.
Source = str | bytes


def _whole(value: Any, info: ValidationInfo) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if info.context is _AS_TEXT and isinstance(value, str) and _WHOLE_TEXT.fullmatch(value):
        return int(value.partition(".")[0])
    return value


# JSON knows one kind of number: 512.0 is an integer, as some languages write it.
Whole = Annotated[int, BeforeValidator(_whole)]
Model = TypeVar("Model", bound=BaseModel)


@dataclass(slots=True)
class Form:
    """A form. ``fields`` holds text; ``unknown_files`` the names of files that are no picture,
    ``repeated`` those of text that came more than once."""

    fields: dict[str, str] = field(default_factory=dict)
    references: list[Source] = field(default_factory=list)
    mask: Source | None = None
    unknown_files: list[str] = field(default_factory=list)
    repeated: set[str] = field(default_factory=set)

    def drop_pictures(self) -> None:
        """They are decoded; what came need not be held while the job waits."""
        self.references, self.mask = [], None


def media_type(request: Request) -> str:
    """The body's media type, without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def check_json(request: Request) -> None:
    """Refuse what is not JSON.

    Raises:
        MediaTypeError: with what would do.
    """
    if media_type(request) != JSON_TYPE:
        raise _other_type(request, JSON_TYPE)


def check_form(request: Request) -> None:
    """Refuse what is not a form.

    Raises:
        MediaTypeError: with what would do.
    """
    if media_type(request) != FORM_TYPE:
        raise _other_type(request, FORM_TYPE)


def is_form(request: Request) -> bool:
    """Whether the body is a form; else it is JSON.

    Raises:
        MediaTypeError: it is neither.
    """
    kind = media_type(request)
    if kind not in (JSON_TYPE, FORM_TYPE):
        raise _other_type(request, f"{JSON_TYPE} or {FORM_TYPE}")
    return kind == FORM_TYPE


async def read_body(request: Request) -> bytes:
    """The whole body, which the request does not keep: its job may wait for long."""
    return b"".join([part async for part in request.stream()])


async def read_json(request: Request, model: type[Model]) -> Model:
    """A JSON body, checked.

    Raises:
        InvalidRequestError: naming the first field that is wrong.
    """
    body = await read_body(request)
    if len(body) <= SMALL_BODY_BYTES:
        return parse_json(body, model)
    return await anyio.to_thread.run_sync(parse_json, body, model)


def parse_json(body: bytes, model: type[Model]) -> Model:
    """See ``read_json``."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _first_problem(error, model) from None


def parse_fields(form: Form, model: type[Model]) -> Model:
    """The text fields of a form, checked; numbers and truth values are read from their text.

    Raises:
        InvalidRequestError: naming the first field that is wrong.
    """
    for name in model.model_fields:
        if name in form.unknown_files:
            raise InvalidRequestError(
                f"{name} must be text, and came as a file (with curl: -F '{name}=<FILE')",
                param=name,
            )
        if name in form.repeated:
            raise InvalidRequestError(f"{name} must be sent once", param=name)
    try:
        return model.model_validate_strings(dict(form.fields), context=_AS_TEXT)
    except ValidationError as error:
        raise _first_problem(error, model) from None


async def read_form(request: Request, max_bytes: int) -> Form:
    """A form with its pictures. An empty field is an absent one.

    The pictures are known by the parts' names; what a part says of its type and what its
    file is called are not looked at.

    Args:
        max_bytes: most bytes of one text part; a picture may come as base64.

    Raises:
        InvalidRequestError: it is no sound form, or not all of one.
    """
    form = Form()
    async with _parts(request, max_bytes) as parts:
        for name, value in parts.multi_items():
            content = await value.read() if isinstance(value, UploadFile) else value
            # An input that was left empty: a browser sends it all the same.
            if not content and not (isinstance(value, UploadFile) and value.filename):
                continue
            if _REFERENCE_PART.fullmatch(name):
                form.references.append(_picture(content))
            elif name == _MASK_PART:
                if form.mask is not None:
                    raise InvalidRequestError("mask must be sent once", param="mask")
                form.mask = _picture(content)
            elif isinstance(content, bytes):
                form.unknown_files.append(name)
            else:
                if name in form.fields:
                    form.repeated.add(name)
                form.fields[name] = content
    return form


class _FormParser(MultiPartParser):
    """Starlette's, which takes a form that stops anywhere for one without what is missing.

    And it reads text that is no UTF-8 as latin-1, which is right for a file without a name only.
    """

    def __init__(
        self, headers: Headers, stream: AsyncIterator[bytes], charset: str, max_bytes: int
    ) -> None:
        super().__init__(
            headers,
            self._to_the_end(stream),
            max_files=MAX_FORM_PARTS,
            max_fields=MAX_FORM_PARTS,
            max_part_size=max_bytes,
        )
        self._encoding = "latin-1" if charset == _LATIN else "utf-8"
        self._is_whole = False

    def on_part_end(self) -> None:
        """A part has come."""
        part = self._current_part
        if part.file is not None or _is_picture(part.field_name):
            super().on_part_end()
            return
        try:
            self.items.append((part.field_name, part.data.decode(self._encoding)))
        except UnicodeDecodeError as error:
            name = part.field_name[:_SHOWN_CHARS]
            raise InvalidRequestError(
                f"{name} must be text in UTF-8; byte {error.start} is none", param=name
            ) from None

    def on_end(self) -> None:
        """The last boundary has come."""
        self._is_whole = True

    async def _to_the_end(self, stream: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        async for chunk in stream:
            yield chunk
        # Told from within the parsing, which then closes the files of what came.
        if not self._is_whole:
            raise MultiPartException(
                "the form is cut short: its last boundary is missing; send it again"
            )


@asynccontextmanager
async def _parts(request: Request, max_bytes: int) -> AsyncIterator[FormData]:
    charset = _charset(request)
    async with aclosing(request.stream()) as stream:
        try:
            parts = await _FormParser(request.headers, stream, charset, max_bytes).parse()
        except MultiPartException as error:
            raise InvalidRequestError(error.message) from None
    try:
        yield parts
    finally:
        await parts.close()


def _charset(request: Request) -> str:
    """What a form's text is written in; UTF-8 where nothing is said.

    Python knows a hundred more encodings, of which some fail in ways of their own.
    """
    _, parameters = parse_options_header(request.headers.get("content-type"))
    charset = parameters.get(b"charset", b"utf-8").decode("latin-1").lower()
    if charset not in _CHARSETS:
        raise InvalidRequestError(f"the charset of a form must be utf-8; got {charset:.40}")
    return charset


def _is_picture(name: str) -> bool:
    return name == _MASK_PART or _REFERENCE_PART.fullmatch(name) is not None


def _picture(content: Source) -> Source:
    if isinstance(content, str) and content.startswith(_FILE_STARTS):
        try:
            return content.encode("latin-1")
        except UnicodeEncodeError:
            return content
    return content


def _first_problem(error: ValidationError, model: type[BaseModel]) -> ServiceError:
    problems: list[Any] = list(error.errors(include_url=False, include_context=False))
    return from_problems(problems, model.model_fields)


def _other_type(request: Request, allowed: str) -> MediaTypeError:
    sent = request.headers.get("content-type", "")
    hint = "-F name=value" if allowed == FORM_TYPE else f"-H 'Content-Type: {JSON_TYPE}'"
    return MediaTypeError(
        f"Content-Type must be {allowed}; got {sent[:80] or 'none'} (with curl: {hint})"
    )
