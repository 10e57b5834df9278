"""The OpenAPI document: schemas of bodies, and of every error that a route can answer.

Owns what the document says beyond what FastAPI finds by itself. The routes read their
bodies themselves, so the bodies are described here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel

from app.api.bodies import FORM_TYPE, JSON_TYPE
from app.api.negotiation import FORMATS
from fluxcore.params import (
    MAX_PROMPT_CHARS,
    MAX_SIDE_PX,
    MIN_SIDE_PX,
    SAYS_SOMETHING,
    SIZE_MULTIPLE,
)

Schema = dict[str, Any]
Responses = dict[int | str, dict[str, Any]]

# Constraints that the code checks elsewhere, in one place, for the document.
SIDE_SCHEMA: Schema = {
    "minimum": MIN_SIDE_PX,
    "maximum": MAX_SIDE_PX,
    "multipleOf": SIZE_MULTIPLE,
}
TEXT_SCHEMA: Schema = {"minLength": 1, "maxLength": MAX_PROMPT_CHARS, "pattern": SAYS_SOMETHING}
PICTURE_SCHEMA: Schema = {"type": "string", "format": "picture"}
EVENTS_CONTENT: Schema = {
    "itemSchema": {
        "description": "Server-sent events.",
        "type": "object",
        "properties": {
            "event": {"type": "string"},
            "data": {"type": "string", "description": "JSON."},
            "id": {"type": "string"},
        },
        "required": ["event", "data"],
    }
}
FILE_SCHEMA: Schema = {"type": "string", "format": "binary"}
FILES_SCHEMA: Schema = {
    "anyOf": [FILE_SCHEMA, {"type": "array", "items": FILE_SCHEMA, "minItems": 1}]
}
_SIDES = "|".join(str(side) for side in range(MIN_SIDE_PX, MAX_SIDE_PX + 1, SIZE_MULTIPLE))
SIZE_PATTERN = f"^(auto|({_SIDES})x({_SIDES}))$"
# Some clients send an empty text instead of nothing.
SIZE_OR_EMPTY_PATTERN = f"^(auto|({_SIDES})x({_SIDES}))?$"
# At most four digits before the point and three after it.
RATIO_PATTERN = r"^([0-9]{1,4}(?:\.[0-9]{1,3})?):([0-9]{1,4}(?:\.[0-9]{1,3})?)$"

# Where a body waits until the document is made: FastAPI would turn large integers into floats.
BODY_KEY = "x-request-body"

_RETRY = {"Retry-After": "Seconds after which the same request may work."}
_NO_RETRY = {"x-should-retry": "false: the same request would fail again."}
_MEANINGS: dict[int, tuple[str, Mapping[str, str]]] = {
    400: ("A value of the request can never work; param names it.", {}),
    401: ("No API key was sent, or one that is not known.", _NO_RETRY),
    403: ("A web page of an origin that is not allowed asks.", _NO_RETRY),
    404: ("There is no such thing.", {}),
    406: ("Accept names nothing that this route can answer.", {}),
    408: ("The body stopped arriving.", {}),
    413: ("The body is larger than the settings allow.", {}),
    415: ("The body's Content-Type is none that this route reads.", {}),
    421: ("The Host header holds a name that the service does not answer to.", _NO_RETRY),
    422: ("The Idempotency-Key was given with another request before.", {}),
    429: ("Too many jobs wait, or this client asks too often.", _RETRY),
    500: ("A fault of the service or of the device.", {}),
    503: ("No job is taken now: loading, ending, broken or too many connections.", _RETRY),
    504: ("The job was not done in time and has been cancelled.", _NO_RETRY),
    507: ("The job does not fit into the device's memory.", _NO_RETRY),
}
# What every route that runs a job may answer.
JOB_ERRORS = (400, 413, 415, 429, 500, 503, 504, 507)


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The one shape of errors."""

    error: ErrorDetail


def errors(*statuses: int) -> Responses:
    """The answers for these statuses, as a route's ``responses``."""
    return {status: error(status) for status in statuses}


def error(status: int) -> Schema:
    """The answer for one status.

    It names the schema, which ``describe_guard`` adds: of a model FastAPI would make a
    validator for every status of every route, half of what starting the app took.
    """
    schema = {"$ref": "#/components/schemas/ErrorAnswer"}
    return {"content": {JSON_TYPE: {"schema": schema}}, **_meaning(status)}


def _meaning(status: int) -> Schema:
    meaning, headers = _MEANINGS[status]
    return {
        "description": f"{HTTPStatus(status).phrase}. {meaning}",
        "headers": {
            name: {"description": text, "schema": {"type": "string"}}
            for name, text in headers.items()
        },
    }


def json_body(model: type[BaseModel]) -> Schema:
    """A route's ``openapi_extra``: its body is JSON."""
    return _body({JSON_TYPE: schema_of(model)})


def json_or_form_body(model: type[BaseModel], form: Schema) -> Schema:
    """The same, or a form with files."""
    return _body({JSON_TYPE: schema_of(model), FORM_TYPE: form})


def form_body(form: Schema) -> Schema:
    """A route's ``openapi_extra``: its body is a form with files."""
    return _body({FORM_TYPE: form})


def put_body_in_place(operation: Schema) -> None:
    """Once FastAPI has made the document, the body goes where it belongs."""
    if BODY_KEY in operation:
        operation["requestBody"] = operation.pop(BODY_KEY)


def with_maximum(body: Schema, name: str, maximum: float) -> Schema:
    """The same body with a limit that is a setting."""
    for content in body[BODY_KEY]["content"].values():
        content["schema"]["properties"][name]["maximum"] = maximum
    return body


def form_schema(
    model: type[BaseModel],
    files: Schema,
    *,
    required: tuple[str, ...],
    without: tuple[str, ...] = (),
) -> Schema:
    """The text fields of a model, without null, and files beside them."""
    schema = schema_of(model)
    texts = {
        name: _without_null(field) if name in required else _or_empty(_without_null(field))
        for name, field in schema["properties"].items()
        if name not in files and name not in without
    }
    extra = {name: schema[name] for name in ("additionalProperties",) if name in schema}
    return {
        **extra,
        "type": "object",
        "properties": {**texts, **files},
        "required": list(required),
    }


def pictures_content() -> Schema:
    """The media types of a picture's bytes."""
    return {f"image/{name}": {"schema": FILE_SCHEMA} for name in FORMATS}


def schema_of(model: type[BaseModel]) -> Schema:
    """A model's schema with its parts in place: references would point outside of the body."""
    schema = _schema_with_parts(model)
    inlined: Schema = _inline(
        {name: value for name, value in schema.items() if name != "$defs"}, schema.get("$defs", {})
    )
    return inlined


@cache
def _schema_with_parts(model: type[BaseModel]) -> Schema:
    """Kept, since several bodies are made of one model: to be copied, never changed."""
    return model.model_json_schema()


def _body(content: Mapping[str, Schema]) -> Schema:
    return {
        BODY_KEY: {
            "required": True,
            "content": {kind: {"schema": schema} for kind, schema in content.items()},
        }
    }


def _inline(schema: Any, parts: Mapping[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_inline(item, parts) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inline(parts[schema["$ref"].rpartition("/")[2]], parts)
    return {name: _inline(value, parts) for name, value in schema.items()}


def _or_empty(field: Schema) -> Schema:
    """An input that was left empty is sent as an empty text, and is an absent one."""
    told: Schema = {name: field[name] for name in ("title", "description") if name in field}
    rest = {name: value for name, value in field.items() if name not in told}
    # What may be anything in JSON is text here.
    return {**told, "anyOf": [rest, {"const": ""}]} if rest else {**told, "type": "string"}


def _without_null(field: Schema) -> Schema:
    kept = {name: value for name, value in field.items() if name not in ("anyOf", "default")}
    if "enum" in kept:
        kept["enum"] = [value for value in kept["enum"] if value is not None]
    options = [option for option in field.get("anyOf", ()) if option != {"type": "null"}]
    if len(options) == 1:
        return {**options[0], **kept}
    return {**kept, "anyOf": options} if options else kept
