"""Every error that a client can be answered with.

    ServiceError                       status, type, code, param, message, headers
    ├── InvalidRequestError       400  a value that can never work; names the field
    │   ├── MissingParameterError      a required field is absent
    │   └── UnknownParameterError      a field that does not exist
    ├── AuthenticationError       401  no API key, or an unknown one
    ├── OriginNotAllowedError     403  a web page of another origin
    ├── NotFoundError             404
    │   └── ModelNotFoundError         a model's name that is not known
    ├── MethodNotAllowedError     405
    ├── NotAcceptableError        406  no format that both sides know
    ├── BodyTimeoutError          408  the body stopped arriving
    ├── JobCancelledError         409  the client cancelled the job itself
    ├── BodyTooLargeError         413
    ├── MediaTypeError            415
    ├── HostNotAllowedError       421  called by a name that is not ours
    ├── IdempotencyError          422  the key stands for another request
    ├── QueueFullError            429  with Retry-After
    ├── RateLimitedError          429  one client asks too often; with Retry-After
    ├── ClientLeftError           499  nobody reads it; it ends the job
    ├── InternalError             500  a fault of ours, or the device's
    ├── NotReadyError             503  loading or warming up, with Retry-After
    ├── ShuttingDownError         503  with Retry-After
    ├── TooManyBytesError         503  with Retry-After
    ├── TooManyConnectionsError   503  with Retry-After
    ├── StorageError              503  the data directory takes nothing
    ├── EngineDeadError           503  the worker has ended; only a restart helps
    ├── JobTimeoutError           504
    └── OutOfDeviceMemoryError    507  the same request would fail again

``as_service_error`` turns what fluxcore raises into one of these. The messages
never hold a path of this machine or a traceback.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from fluxcore.errors import (
    DeviceFaultError,
    InvalidParamsError,
    OutOfMemoryError,
)

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"


class ServiceError(Exception):
    """An error in the one shape that every answer of the service uses.

    Args:
        message: what was expected, what came, and the remedy.
        param: the field of the request that is wrong, if one is.
        code: a word for programs; the class's own when left out.
        retry_after_s: when a repeated request may work, in seconds.
        headers: further headers of the answer.
    """

    status = 500
    type = SERVER_ERROR
    code = "internal_error"
    # None leaves the decision to the client; False: the same request would fail again.
    is_retryable: bool | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.code
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
            # The OpenAI SDKs honour this one first; it can say less than a second.
            self.headers["retry-after-ms"] = str(max(1, math.ceil(retry_after_s * 1000)))
        if self.is_retryable is not None:
            self.headers["x-should-retry"] = "true" if self.is_retryable else "false"

    def body(self) -> dict[str, dict[str, str | None]]:
        """The answer's JSON; all four keys are always there."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


class InvalidRequestError(ServiceError):
    """A value of the request can never work."""

    status, type, code = 400, INVALID_REQUEST, "invalid_value"


class MissingParameterError(InvalidRequestError):
    """A required field is absent."""

    code = "missing_required_parameter"


class UnknownParameterError(InvalidRequestError):
    """The request holds a field that does not exist."""

    code = "unknown_parameter"


class AuthenticationError(ServiceError):
    """The request names no API key, or one that is not known."""

    status, type, code, is_retryable = 401, INVALID_REQUEST, "invalid_api_key", False


class OriginNotAllowedError(ServiceError):
    """A web page of another origin asks, and the settings do not allow it."""

    status, type, code, is_retryable = 403, INVALID_REQUEST, "origin_not_allowed", False


class NotFoundError(ServiceError):
    """No such address."""

    status, type, code = 404, INVALID_REQUEST, "not_found"


class ModelNotFoundError(NotFoundError):
    """No model of that name is served."""

    code = "model_not_found"


class MethodNotAllowedError(ServiceError):
    """The address exists, for another method."""

    status, type, code = 405, INVALID_REQUEST, "method_not_allowed"


class NotAcceptableError(ServiceError):
    """The client takes none of the formats that can be made."""

    status, type, code = 406, INVALID_REQUEST, "not_acceptable"


class BodyTimeoutError(ServiceError):
    """The client stopped sending its body, or sends it too slowly."""

    status, type, code = 408, INVALID_REQUEST, "body_timeout"


class JobCancelledError(ServiceError):
    """The client asked for the job's end."""

    status, type, code = 409, INVALID_REQUEST, "cancelled"


class BodyTooLargeError(ServiceError):
    """The body is larger than the settings allow."""

    status, type, code = 413, INVALID_REQUEST, "body_too_large"


class MediaTypeError(ServiceError):
    """The body is of a type that this address does not read."""

    status, type, code = 415, INVALID_REQUEST, "unsupported_media_type"


class HostNotAllowedError(ServiceError):
    """The Host header names a machine that this service does not answer for."""

    status, type, code, is_retryable = 421, INVALID_REQUEST, "host_not_allowed", False


class IdempotencyError(ServiceError):
    """The Idempotency-Key of the request was given with another request before."""

    status, type, code = 422, INVALID_REQUEST, "idempotency_key_reused"


class QueueFullError(ServiceError):
    """As much waits as may. ``bound`` says which limit was met: jobs, pixels or work."""

    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after_s: float, bound: str = "jobs") -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.bound = bound


class RateLimitedError(ServiceError):
    """One client asks more often than the settings allow it to."""

    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"


class ClientLeftError(ServiceError):
    """The client closed the connection before its job was done."""

    status, type, code = 499, INVALID_REQUEST, "client_left"


class InternalError(ServiceError):
    """Something failed that the client can do nothing about."""


class NotReadyError(ServiceError):
    """The model is still being loaded or warmed up."""

    status, code = 503, "loading"


class ShuttingDownError(ServiceError):
    """The service takes no more jobs because it is ending."""

    status, code = 503, "shutting_down"


class TooManyBytesError(ServiceError):
    """The bodies of all requests together are larger than the settings allow."""

    status, code = 503, "too_many_bytes"


class TooManyConnectionsError(ServiceError):
    """As many connections are open as may be."""

    status, code = 503, "too_many_connections"


class StorageError(ServiceError):
    """The data directory cannot be read or written to."""

    status, code = 503, "storage_failed"


class EngineDeadError(ServiceError):
    """The worker thread has ended; the process must be restarted."""

    status, code, is_retryable = 503, "engine_dead", False


class JobTimeoutError(ServiceError):
    """The job was not done in time and has been cancelled."""

    status, code, is_retryable = 504, "timeout", False


class OutOfDeviceMemoryError(ServiceError):
    """The job did not fit into the device's memory."""

    status, code, is_retryable = 507, "out_of_memory", False


def renamed(error: InvalidParamsError, names: Mapping[str, str]) -> InvalidRequestError:
    """The error under the name that the request has for the field.

    Args:
        names: of those fields that the request calls by another name.
    """
    field, bracket, index = error.field.partition("[")
    name = names.get(field, field) + bracket + index
    message = error.message
    if message.startswith(f"{error.field} "):
        message = name + message.removeprefix(error.field)
    return InvalidRequestError(message, param=name)


def as_service_error(error: Exception) -> ServiceError:
    """What a client is told about ``error``; nothing of what it says unless it is for clients.

    The result holds no reference to ``error``, so that no traceback keeps tensors alive.
    """
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, InvalidParamsError):
        return renamed(error, {"references": "images"})
    if isinstance(error, OutOfMemoryError):
        return OutOfDeviceMemoryError(
            "the job did not fit into the device's memory; "
            "ask for a smaller size or fewer references"
        )
    if isinstance(error, DeviceFaultError):
        return InternalError(
            "the device returned a picture that is not one; try again", code="device_fault"
        )
    return InternalError("the job failed for a reason that is in the service's log")
