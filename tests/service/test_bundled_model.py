"""The bundled model is there when no other is named, and everything says so.

Holds for any weights; what the trained ones draw is tested in tests/demo.
"""

from __future__ import annotations

import base64
import gc
import io
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from hatchling.builders.wheel import WheelBuilder
from PIL import Image
from starlette.testclient import TestClient

from app.main import BUNDLED_NOTE, create_app, create_engine, pipeline_loader
from app.settings import Settings
from demo.architecture import LARGEST_BYTES, LARGEST_FILE_BYTES
from fluxcore import FluxPipeline
from fluxcore.bundled import BUNDLED_NAME, bundled_model
from tests.service.conftest import PATIENCE_S, wait_until
from tests.service.processes import FLUXD, ROOT, ServerProcess, environment


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    """The service as it is with no settings but the device."""
    settings = Settings(device="cpu", shutdown_grace_s=0)
    engine = create_engine(settings, pipeline_loader(settings.model, settings))
    app = create_app(settings, engine)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        wait_until(lambda: engine.status().is_ready)
        yield client


def test_garbage_is_not_sought_among_the_frameworks(client: TestClient) -> None:
    # Else all threads stand still for 0.2 s now and then.
    assert gc.get_freeze_count() > 100_000


def test_health_and_answers_name_it(client: TestClient) -> None:
    health = client.get("/health").json()
    assert (health["model"], health["bundled"]) == ("fluxd-demo", True)
    assert health["device"]["residency"] == "resident", "it fits everywhere"
    names = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert names == ["fluxd-demo", *Settings().model_aliases]
    answer = client.post("/v1/generate", json={"prompt": "a red circle", "seed": 1})
    assert answer.status_code == 200
    body = answer.json()
    assert body["model"] == "fluxd-demo"
    (image,) = body["images"]
    with Image.open(io.BytesIO(base64.b64decode(image["b64"]))) as picture:
        assert picture.size == (256, 256), "the size that it draws best is its default"
    assert body["params"]["steps"] == 4


@pytest.mark.parametrize(("width", "height"), [(128, 128), (512, 512), (320, 192), (128, 512)])
def test_every_size_of_its_range_is_drawn(client: TestClient, width: int, height: int) -> None:
    body = {"prompt": "a blue star", "width": width, "height": height, "steps": 1}
    answer = client.post("/v1/generate", json=body, headers={"Accept": "image/png"})
    assert answer.status_code == 200, answer.text
    with Image.open(io.BytesIO(answer.content)) as picture:
        assert picture.size == (width, height)


def test_shapes_of_pictures_have_the_area_of_its_default_size(client: TestClient) -> None:
    body = {"prompt": "a blue star", "aspect_ratio": "4:1", "steps": 1}
    assert client.post("/v1/generate", json=body).json()["params"]["width"] == 512
    body = {"prompt": "a blue star", "size": "auto", "num_inference_steps": 1}
    assert client.post("/v1/images/generations", json=body).json()["size"] == "256x256"


def test_warming_up_draws_its_own_size() -> None:
    pipeline = FluxPipeline.load(device="cpu")
    assert pipeline.info.is_bundled and pipeline.info.default_side_px == 256
    tokens: list[int] = []
    pipeline.transformer.register_forward_hook(lambda _, __, out: tokens.append(out.shape[1]))
    pipeline.warm_up(sizes=Settings().warm_up_sizes_px)
    assert tokens == [16 * 16]


def test_it_is_recognised_by_its_place_not_by_its_name(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / BUNDLED_NAME).symlink_to(tiny_checkpoint)
    assert not FluxPipeline.load(tmp_path / BUNDLED_NAME, device="cpu").info.is_bundled
    (tmp_path / "other").symlink_to(bundled_model())
    assert FluxPipeline.load(tmp_path / "other", device="cpu").info.is_bundled


def test_serving_without_a_model_says_what_it_draws_and_how_to_change_that() -> None:
    with ServerProcess(*FLUXD, "serve", "--port", "0", FLUXD_DEVICE="cpu") as server:
        url = server.url()
        wait_until(lambda: httpx2.get(f"{url}/ready", timeout=PATIENCE_S).status_code == 200)
        assert httpx2.get(f"{url}/health", timeout=PATIENCE_S).json()["bundled"] is True
        server.signal(signal.SIGTERM)
        assert server.status() == 0, server.output
    (note,) = [line for line in server.lines if BUNDLED_NOTE in line]
    assert "shapes" in note and "--model path/to/FLUX.2-klein-4B" in note
    assert "ready model=fluxd-demo" in server.output


def test_generate_without_a_model_draws_and_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [*FLUXD, "generate", "a large red circle", "-o", "out.png", "--seed", "3"],
        cwd=tmp_path,
        env=environment(FLUXD_DEVICE="cpu"),
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_S,
    )
    assert BUNDLED_NOTE in done.stderr and done.stdout == ""
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (256, 256)
        assert "Model: fluxd-demo" in picture.text["parameters"]  # type: ignore[attr-defined]


def test_it_is_small_and_all_of_it_goes_into_the_package() -> None:
    files = {path: path.stat().st_size for path in bundled_model().rglob("*") if path.is_file()}
    assert sum(files.values()) < LARGEST_BYTES
    assert max(files.values()) < LARGEST_FILE_BYTES
    assert {path.suffix for path in files} == {".json", ".safetensors", ".txt", ".jinja"}
    packed = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    assert {str(path.relative_to(ROOT)) for path in files} <= packed
    assert not any(name.startswith(("demo/", "tests/")) for name in packed)
