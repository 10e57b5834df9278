"""What the rules before the routes add to the OpenAPI document: their errors, and the keys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI

from app.api.documents import ErrorAnswer, error, put_body_in_place, schema_of
from app.api.security.guard import is_public
from app.settings import Settings

# What every address may answer, whatever its route does.
GUARD_ERRORS = (400, 403, 413, 421, 500, 503)
KEY_ERRORS = (401,)
# Where a body is read and work is asked for, perhaps under an Idempotency-Key.
POST_ERRORS = (408, 422, 429)

_VALIDATION_ERROR = "HTTPValidationError"
_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}


def describe_guard(app: FastAPI, settings: Settings) -> None:
    """Make the app's document tell of the guard, as these settings make it."""
    describe_routes = app.openapi

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = describe_routes()
            components = document.setdefault("components", {})
            components.setdefault("schemas", {})["ErrorAnswer"] = schema_of(ErrorAnswer)
            for name in (_VALIDATION_ERROR, "ValidationError"):
                components["schemas"].pop(name, None)
            if settings.api_keys:
                components["securitySchemes"] = _SCHEMES
            for path, operations in document["paths"].items():
                for method, operation in operations.items():
                    put_body_in_place(operation)
                    needs_key = bool(settings.api_keys) and not is_public(path)
                    _describe(operation, method, needs_key=needs_key)
        assert app.openapi_schema is not None, "the framework keeps the document that it makes"
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]


def _describe(operation: dict[str, Any], method: str, *, needs_key: bool) -> None:
    # The framework's own answer to a wrong parameter, which here is a 400.
    if _VALIDATION_ERROR in str(operation["responses"].get("422")):
        del operation["responses"]["422"]
    statuses: Iterable[int] = GUARD_ERRORS
    if needs_key:
        statuses = (*statuses, *KEY_ERRORS)
        operation["security"] = [{name: []} for name in _SCHEMES]
    if method == "post":
        statuses = (*statuses, *POST_ERRORS)
    for status in statuses:
        operation["responses"].setdefault(str(status), error(status))
