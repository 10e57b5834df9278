"""What a request must be and JSON Schema cannot say; loaded by schemathesis.

Requests that are meant to be valid are brought to follow the rules between fields, so
that their refusal is a fault. Requests that are meant to be wrong stay as they are.
"""

from __future__ import annotations

import base64
import io
from typing import Any

import schemathesis
from hypothesis import strategies as st
from PIL import Image
from schemathesis.transport.serialization import Binary

SIDE_PX = 64
ALIASES = (
    ("num_inference_steps", "steps", "step"),
    ("guidance_scale", "guidance", "cfg_scale", "cfg"),
)
SHAPES = ("width", "height", "size", "aspect_ratio", "megapixels")
INTEGERS = frozenset(
    ("n", "seed", "quality", "previews", "partial_images", "output_compression", "width", "height")
) | {*ALIASES[0]}
TIMEOUT_S = 60.0


def _png(mode: str, colour: int | tuple[int, ...]) -> bytes:
    target = io.BytesIO()
    Image.new(mode, (SIDE_PX, SIDE_PX), colour).save(target, "PNG")
    return target.getvalue()


PICTURE = _png("RGB", (90, 60, 30))
# Transparent everywhere: draw all of it again.
MASK = _png("RGBA", (0, 0, 0, 0))


# A file that need not be a picture. As text, though it is sent as a file all the same: where a
# schema is negated, the generator judges its own draws by a validator that knows no bytes.
schemathesis.openapi.format("binary", st.text(st.characters(codec="ascii"), max_size=64))


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """Bring a valid request to follow the rules between fields."""
    if case.meta is None or not all(
        part.mode.is_positive for part in (case.meta.generation, *case.meta.components.values())
    ):
        return
    if case.operation.path == "/v1/jobs" and case.query:
        # Must be the id of a job that there is.
        case.query.pop("after", None)
    if isinstance(case.body, dict):
        is_form = case.media_type == "multipart/form-data"
        case.body = _repaired(case.operation.path, dict(case.body), is_form=is_form)
        # Still a valid request; a form with files, once changed, would be taken for a wrong one.
        case._record_starting_state()


def _repaired(path: str, body: dict[str, Any], *, is_form: bool) -> dict[str, Any]:
    for name, value in body.items():
        # JSON Schema counts 1.0 as an integer; the service takes a number as it is written.
        if name in INTEGERS and isinstance(value, float) and value.is_integer():
            body[name] = int(value)
    for names in ALIASES:
        given = [name for name in names if body.get(name) is not None]
        for name in given[1:]:
            del body[name]
    if isinstance(body.get("seed"), int):
        # The last picture's seed, seed + n - 1, must be one, too.
        body["seed"] = min(body["seed"], 2**53)
    if is_form:
        # Empty ones are absent, and so cannot be at odds with others.
        body = {name: value for name, value in body.items() if value != "" or name == "prompt"}
    _repair_pictures(path, body, is_form=is_form)
    if path in ("/v1/generate", "/v1/jobs"):
        _repair_native(path, body)
    elif (body.get("width") is None) != (body.get("height") is None):
        body.pop("width", None)
        body.pop("height", None)
    if body.get("stream") and body.get("response_format") == "url":
        # The events hold the pictures themselves.
        del body["response_format"]
    if body.get("mask") is not None:
        # The picture under a mask decides the size.
        for name in SHAPES:
            body.pop(name, None)
    return body


def _repair_pictures(path: str, body: dict[str, Any], *, is_form: bool) -> None:
    """Real pictures in the places of those that were made up."""

    def real(data: bytes) -> Any:
        return Binary(data) if is_form else base64.b64encode(data).decode()

    given = body.pop("image", None) or []
    many = body.pop("images", None) or []
    count = len(many) if isinstance(many, list) and many else len(given) or 1
    needs_picture = path.endswith(("/edits", "/variations"))
    if many or given or needs_picture:
        name = "image" if is_form else "images"
        body[name] = [real(PICTURE)] * min(count, 10)
    has_mask = body.pop("mask", None) is not None and bool(many or given)
    if has_mask and not path.endswith("/variations"):
        body["mask"] = real(MASK)
    else:
        body.pop("strength", None)


def _repair_native(path: str, body: dict[str, Any]) -> None:
    if body.get("aspect_ratio") is not None or body.get("megapixels") is not None:
        for name in SHAPES:
            body.pop(name, None)
        body |= {"aspect_ratio": "16:9", "megapixels": 0.5}
    elif body.get("size") is not None:
        body.pop("width", None)
        body.pop("height", None)
    if body.get("timeout_s") is not None:
        # What cannot be done in time is rightly answered with 504.
        body["timeout_s"] = TIMEOUT_S
    if path == "/v1/jobs":
        # Jobs have their own stream, and here nobody may be told of their end.
        body.pop("stream", None)
        body.pop("webhook", None)
