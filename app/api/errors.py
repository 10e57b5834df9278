"""Errors as answers: one JSON shape for everything that can go wrong.

Owns the translation of framework exceptions and of validation problems into
``ServiceError`` and its rendering. What a prompt or a picture held is never quoted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from app import telemetry
from app.errors import (
    ClientLeftError,
    InternalError,
    InvalidRequestError,
    MethodNotAllowedError,
    MissingParameterError,
    NotFoundError,
    ServiceError,
    UnknownParameterError,
    as_service_error,
)
from app.settings import nearest
from fluxcore.errors import FluxError

logger = logging.getLogger(__name__)

_SHOWN_CHARS = 80
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_PRIVATE_FIELDS = frozenset({"prompt", "negative_prompt", "images", "image", "mask"})


def install_error_handlers(app: FastAPI) -> None:
    """Make every error of the app leave in the one shape."""
    for kind in (
        ServiceError,
        FluxError,
        HTTPException,
        RequestValidationError,
        ClientDisconnect,
    ):
        app.add_exception_handler(kind, _handle)


def render(error: ServiceError) -> JSONResponse:
    """The answer for an error."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


def log_refusal(method: str, error: ServiceError) -> None:
    """The line of a request that is answered with an error."""
    # Refusals that an operator can do something about; the rest is the client's business.
    is_for_operators = error.status in (401, 403, 421, 429, 503)
    telemetry.log_event(
        logger,
        logging.INFO if is_for_operators else logging.DEBUG,
        "refused",
        {
            "method": method,
            "status": error.status,
            "code": error.code,
            "param": error.param,
        },
    )


def left_while_sending() -> ClientLeftError:
    """What ends a request whose body will not come."""
    return ClientLeftError("the client closed the connection while sending")


def from_problems(problems: Sequence[Mapping[str, Any]], known: Iterable[str]) -> ServiceError:
    """The first of pydantic's problems as an error that names the field.

    Args:
        known: the names of fields that exist, to suggest one for a name that does not.
    """
    problem = problems[0]
    path = list(problem["loc"])
    param = _param(path)
    match problem["type"]:
        case "json_invalid":
            reason = str(problem["msg"]).removeprefix("Invalid JSON: ")
            return InvalidRequestError(f"the body is not valid JSON: {reason}", code="invalid_json")
        case "missing":
            return MissingParameterError(f"{param} is required", param=param)
        case "extra_forbidden":
            name = str(path[-1])[:_SHOWN_CHARS]
            return UnknownParameterError(
                f"unknown field {name!r}; {nearest(name, known)}", param=param
            )
    if param is None:
        return InvalidRequestError("the body must be a JSON object")
    rule = str(problem["msg"]).removeprefix("Value error, ")
    rule = rule.replace("Input should be", f"{param} must be")
    rule = rule.replace("String should have", f"{param} must have")
    return InvalidRequestError(f"{rule}; got {_got(path, problem['input'])}", param=param)


async def _handle(request: Request, error: Exception) -> JSONResponse:
    """Not a plain function: those are handed to a thread, which a refusal is not worth."""
    known = _as_known(request, error)
    log_refusal(request.method, known)
    return render(known)


def _as_known(request: Request, error: Exception) -> ServiceError:
    if isinstance(error, RequestValidationError):
        # FastAPI puts where it looked (body, query, ...) before the name.
        return from_problems([{**p, "loc": tuple(p["loc"])[1:]} for p in error.errors()], ())
    if isinstance(error, ClientDisconnect):
        return left_while_sending()
    if isinstance(error, HTTPException):
        return _from_http(request, error)
    return as_service_error(error)


def _from_http(request: Request, error: HTTPException) -> ServiceError:
    path = request.url.path[:_SHOWN_CHARS]
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return NotFoundError(f"there is nothing at {path}; GET / lists what there is")
    if error.status_code == 405:
        allowed = ", ".join(_allowed_methods(request)) or headers.get("Allow", "")
        return MethodNotAllowedError(
            f"{request.method} does not work on {path}; use {allowed}", headers={"Allow": allowed}
        )
    if error.status_code >= 500:
        known: ServiceError = InternalError("the request failed", headers=headers)
    else:
        known = InvalidRequestError(str(error.detail), headers=headers)
    known.status = error.status_code
    return known


def _allowed_methods(request: Request) -> list[str]:
    """What works on the address; the framework tells of the first route that has it only."""
    routes = request.app.routes
    return [
        method
        for method in _METHODS
        if any(
            route.matches({**request.scope, "method": method})[0] is Match.FULL for route in routes
        )
    ]


def _param(path: Sequence[Any]) -> str | None:
    """``("images", 1)`` as ``images[1]``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")[:_SHOWN_CHARS] or None


def _got(path: Sequence[Any], value: Any) -> str:
    """What came, shortened; of private fields only its type."""
    if path[0] in _PRIVATE_FIELDS:
        return type(value).__name__
    shown = repr(value)
    return shown if len(shown) <= _SHOWN_CHARS else f"{shown[:_SHOWN_CHARS]}..."
