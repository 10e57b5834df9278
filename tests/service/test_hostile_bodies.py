"""Bodies that cost a server much and a client little: each is refused, quickly and in words."""

from __future__ import annotations

import base64
import io
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.api.input_pictures import PictureLimits, decode_pictures
from app.api.negotiation import choose_answer
from app.api.schemas import GenerateRequest, parse_generate
from app.errors import InvalidRequestError, ServiceError
from fluxcore.fitting import LARGEST_REFERENCE_AREA, fitted_size
from fluxcore.pipeline.pictures import fit_reference
from tests.service.conftest import Later, StartLive, encode, wait_until

LIMITS = PictureLimits(max_bytes=20_000_000, max_pixels=10_000_000)


def _refused(body: bytes) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        parse_generate(body, GenerateRequest)
    return caught.value


@pytest.mark.parametrize("name", ["body", "query", "path", "header", "cookie", "wdith"])
def test_an_unknown_field_of_any_name_is_named(name: str) -> None:
    error = _refused(json.dumps({"prompt": "a", name: 1}).encode())
    assert (error.status, error.param, error.code) == (400, name, "unknown_parameter")


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt":"a","images":[' + b"1," * 300_000 + b"1]}",
        b'{"prompt":"a"' + b"".join(b',"k%d":1' % i for i in range(100_000)) + b"}",
    ],
    ids=["wrong elements", "unknown names"],
)
def test_many_faults_cost_no_more_than_one(body: bytes) -> None:
    tracemalloc.start()
    try:
        assert _refused(body).status == 400
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 40 * len(body)


def test_text_that_is_no_ascii_is_no_base64() -> None:
    for text in ("中" * 100_000, "é" * 10, "data:image/png;base64,é"):
        with pytest.raises(InvalidRequestError, match="base64") as caught:
            decode_pictures([text], None, LIMITS)
        assert caught.value.param == "images[0]"


def test_waiting_references_hold_what_the_model_sees_and_no_more() -> None:
    picture = Image.effect_noise((1900, 1300), 60).convert("RGB")
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    text = base64.b64encode(file.getvalue()).decode()
    (shrunk,) = decode_pictures([text], None, LIMITS).references
    assert shrunk.width * shrunk.height <= LARGEST_REFERENCE_AREA
    assert fitted_size(shrunk) == fitted_size(picture)
    assert fit_reference(shrunk).tobytes() == fit_reference(picture).tobytes()


def test_a_quality_without_its_leading_zero_counts() -> None:
    assert choose_answer(("image/png;q=.9, application/json;q=.1",), None).format == "png"
    assert not choose_answer(("image/png;q=.9, application/json;q=.1",), None).is_json


LARGE = encode(Image.frombytes("RGB", (900, 900), random.Random(0).randbytes(3 * 900 * 900)))
URL = f"data:image/png;base64,{LARGE}"
FILE = {"image": base64.b64decode(LARGE)}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/generate", {"json": {"prompt": "x", "images": [LARGE]}}),
        ("/v1/generate", {"data": {"prompt": "x"}, "files": FILE}),
        ("/v1/images/edits", {"json": {"prompt": "x", "images": [{"image_url": URL}]}}),
        ("/v1/images/edits", {"data": {"prompt": "x"}, "files": FILE}),
        ("/v1/images/variations", {"files": FILE}),
    ],
    ids=["json", "form", "edit as json", "edit as form", "variation"],
)
@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "k"}], ids=["plain", "with key"])
def test_what_was_sent_is_not_held_while_the_job_waits(
    start_live: StartLive, tmp_path: Path, path: str, body: Any, headers: dict[str, str]
) -> None:
    live = start_live(settings={"data_dir": str(tmp_path)})
    live.pipeline.close_gate()

    def holders() -> list[str]:
        """Where memory was taken that holds a body, or a picture as it came."""
        snapshot = tracemalloc.take_snapshot()
        return [str(trace) for trace in snapshot.traces if trace.size > len(LARGE) // 2]

    with live.client() as client:
        request = client.build_request("POST", path, headers=headers, **body)
        content = request.read()
        tracemalloc.start(8)
        try:
            later = Later(lambda: client.send(request))
            live.pipeline.started.wait()
            wait_until(lambda: not holders())
        finally:
            tracemalloc.stop()
            live.pipeline.gate.set()
        assert later.answer().status_code == 200 and len(content) > len(LARGE) // 2


def test_waiting_jobs_leave_room_for_other_bodies(start_live: StartLive) -> None:
    noise = Image.frombytes("RGB", (400, 400), random.Random(0).randbytes(3 * 400 * 400))
    # Room for one of them at a time.
    live = start_live(settings={"max_bodies_bytes": 800_000, "max_body_bytes": 800_000})
    live.pipeline.close_gate()
    first = live.generate_later("first", images=[encode(noise)])
    live.pipeline.started.wait()
    second = live.generate_later("second", images=[encode(noise)])
    wait_until(lambda: live.depth == 1)
    live.pipeline.gate.set()
    assert first.answer().status_code == second.answer().status_code == 200
