"""The official Node client over a real socket. Skips itself where it is not installed."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fluxcore import FluxPipeline
from tests.service.conftest import StartLive, wait_until
from tests.service.openai.conftest import PICTURE, PNG, picture_of

CLIENT = Path(__file__).parent / "node"
OLDEST_NODE = 20


def node() -> str:
    """The interpreter; a test that needs it ends here where there is none."""
    found = shutil.which("node")
    if found is None:
        pytest.skip("node is not installed")
    if not (CLIENT / "node_modules" / "openai").is_dir():
        pytest.skip("the Node client is not installed: 'make install' does it where npm is")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=True)
    if int(version.stdout.removeprefix("v").partition(".")[0]) < OLDEST_NODE:
        pytest.skip(f"node {OLDEST_NODE} or newer is needed; this is {version.stdout.strip()}")
    return found


def test_the_node_client(
    start_live: StartLive, tiny_pipeline: FluxPipeline, tmp_path: Path
) -> None:
    interpreter = node()
    live = start_live(
        load=lambda progress: tiny_pipeline,
        settings={"default_width": 64, "default_height": 64},
    )
    picture = tmp_path / "photo.png"
    picture.write_bytes(PNG)
    done = subprocess.run(
        [interpreter, str(CLIENT / "client.mjs"), f"{live.url}/v1", str(picture)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)

    generated = found["generated"]
    assert generated["seeds"] == [7, 8]
    assert generated["size"] == "64x64"
    assert generated["total_tokens"] > 32
    assert generated["request_id"]
    for text in generated["pictures"]:
        drawn = picture_of(base64.b64decode(text, validate=True))
        assert (drawn.format, drawn.size) == ("WEBP", (64, 64))

    assert found["linked"]["type"] == "image/png"
    assert found["linked"]["bytes"] > 100

    partial, completed = "image_generation.partial_image", "image_generation.completed"
    assert found["streamed"] == [
        {"type": partial, "index": 0},
        {"type": partial, "index": 1},
        {"type": completed, "index": None},
    ]

    assert [edited["tokens"] for edited in found["edited"]] == [20, 20, 40]
    for edited in found["edited"]:
        assert edited["size"] == f"{PICTURE.width}x{PICTURE.height}"
        assert picture_of(base64.b64decode(edited["picture"])).size == PICTURE.size
    assert found["varied"] == 1

    assert found["models"] == ["tiny", "dall-e-2", "dall-e-3", "gpt-image-1"]
    assert found["model"] == "black-forest-labs/tiny"
    refused = found["refused"]
    assert refused.pop("request_id")
    assert refused == {
        "is_bad_request": True,
        "status": 400,
        "param": "size",
        "code": "invalid_value",
        "type": "invalid_request_error",
    }

    # The client broke out of its last stream, and its job of a hundred steps with it.
    assert found["left"] == partial
    wait_until(lambda: live.engine.status().running == 0)
