"""The OpenAPI document and the errors before the routes: told as they are."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from jsonschema_rs import Draft202012Validator
from PIL import Image

from app.keys import ApiKey, digest_of, new_key
from tests.service.conftest import Start, encode

PICTURE = encode(Image.new("RGB", (64, 64)))
ENTRY = ApiKey("alice", digest_of(new_key())).entry


def test_the_document_tells_of_every_error_before_the_routes(start: Start) -> None:
    document = start().get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert {"400", "403", "413", "421", "500", "503"} <= set(operation["responses"]), path
            assert ("408" in operation["responses"]) == (method == "post")
            assert ("422" in operation["responses"]) == (method == "post")
            assert "security" not in operation
    assert "securitySchemes" not in document["components"]
    assert "ValidationError" not in str(document)


def test_the_document_asks_for_a_key_where_one_is_needed(start: Start) -> None:
    document = start(api_keys=(ENTRY,)).get("/openapi.json").json()
    assert set(document["components"]["securitySchemes"]) == {"bearer", "x-api-key"}
    for path, operations in document["paths"].items():
        is_open = path in ("/", "/health", "/ready") or path.startswith("/files/")
        for operation in operations.values():
            assert ("security" in operation) == ("401" in operation["responses"]) == (not is_open)


def test_a_wrong_method_is_told_all_right_ones(start: Start) -> None:
    client = start()
    paths = client.get("/openapi.json").json()["paths"]
    for path, operations in paths.items():
        answer = client.patch(path.format(id="x", name="x", job_id="x"))
        assert answer.status_code == 405
        allowed = {method.strip().lower() for method in answer.headers["allow"].split(",")}
        assert set(operations) <= allowed <= {*operations, "head"}, path
        assert answer.headers["allow"] in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "prompt", ["\x0c", "\x1e\x1e", "\x85\u3000", "\ufeff", "\x00", "\u200b", " a\n", ""]
)
def test_a_prompt_is_blank_where_the_document_says_so(
    start: Start, tmp_path: Path, prompt: str
) -> None:
    client = start(data_dir=str(tmp_path))
    for path, operations in client.get("/openapi.json").json()["paths"].items():
        contents = operations.get("post", {}).get("requestBody", {}).get("content", {})
        for kind, content in contents.items():
            schema = content["schema"]["properties"]["prompt"]
            may_be_sent = Draft202012Validator(schema).is_valid(prompt)
            given = {"prompt": prompt, "width": 64, "height": 64}
            if kind == "application/json":
                images = {} if path.endswith("/generations") else {"images": [PICTURE]}
                answer = client.post(path, json={**given, **images})
            else:
                answer = client.post(path, data=given, files={"image": base64.b64decode(PICTURE)})
            assert (answer.status_code in (200, 202)) == may_be_sent, (path, kind, answer.text)


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/docs/oauth2-redirect"])
def test_no_page_loads_scripts_of_others(start: Start, path: str) -> None:
    assert start().get(path).status_code == 404
