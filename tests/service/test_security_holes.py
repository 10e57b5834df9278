"""Holes that services of this kind have had; each test shows that one is not here.

Others stand where they belong: addresses of pictures in ``test_remote_pictures``, pages of
other origins in ``test_web_pages``, bombs in ``test_picture_files``, pickled weights in
``tests/unit/test_weights_files.py``.
"""

from __future__ import annotations

import ast
import http.client
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fluxcore import FluxPipeline
from tests.service.conftest import PATIENCE_S, Start, StartLive, encode, error_of
from tests.service.processes import ROOT

FORBIDDEN_IMPORTS = frozenset(
    ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "subprocess", "pty", "yaml")
)
# They run fixed commands: one asks macOS for the name of the chip, one builds fluxd's own products
# with g++ as a model is loaded, and one, in fluxd's own terminal commands and never in the service,
# asks tmux about the terminal around it.
ASK_THE_SYSTEM = (
    ROOT / "fluxcore" / "runtime" / "choosing.py",
    ROOT / "fluxcore" / "runtime" / "amx_products.py",
    ROOT / "app" / "cli" / "terminal" / "tmux.py",
)
FORBIDDEN_CALLS = frozenset(
    ("eval", "exec", "compile", "__import__", "torch.load", "os.system", "os.popen", "numpy.load")
)
BODY = {"prompt": "a fox", "width": 64, "height": 64, "steps": 1}
# A refusal takes milliseconds; on a machine that is busy with other things, somewhat more.
AT_ONCE_S = 20.0


def _modules() -> list[Path]:
    return sorted([*(ROOT / "app").rglob("*.py"), *(ROOT / "fluxcore").rglob("*.py")])


def test_nothing_unpickles_evaluates_or_starts_programs() -> None:
    found = []
    for path in _modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name.partition(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").partition(".")[0]]
            if FORBIDDEN_IMPORTS.intersection(names) and path not in ASK_THE_SYSTEM:
                found.append((path.name, names))
            if isinstance(node, ast.Call) and ast.unparse(node.func) in FORBIDDEN_CALLS:
                found.append((path.name, [ast.unparse(node)]))
    assert found == []
    assert len(_modules()) > 80


def test_no_answer_and_no_picture_tells_a_path(
    start: Start, tiny_pipeline: FluxPipeline, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Every address, right and wrong requests, of a real model with kept jobs."""
    client = start(tiny_pipeline, data_dir=str(tmp_path / "data"))
    picture = encode(Image.effect_noise((64, 64), 60).convert("RGB"))
    answers = [client.request("GET", path) for path in ("/nothing", "/v1/jobs/x", "/files/x")]
    accepted = client.post("/v1/jobs", json=BODY)
    job = accepted.headers["location"]
    answers.append(accepted)
    deadline_s = time.monotonic() + PATIENCE_S
    while client.get(job).json()["status"] != "completed":
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    paths = client.get("/openapi.json").json()["paths"]
    for path, operations in paths.items():
        for method in operations:
            address = path.replace("{job_id}", job.rpartition("/")[2]).replace("{name}", "0")
            answers.append(client.request(method, address.replace("{id}", "x")))
            if method == "post":
                for fields in (BODY, {**BODY, "images": [picture]}, {"prompt": 1}, {"x": 1}, []):
                    answers.append(client.post(address, json=fields))
                answers.append(client.post(address, data={"prompt": "x"}, files={"image": b"x"}))
    for kind in ("png", "jpeg", "webp"):
        answers.append(client.post("/v1/generate", json=BODY, headers={"Accept": f"image/{kind}"}))
    assert {answer.status_code for answer in answers} >= {200, 202, 400, 404, 415}
    secrets = [str(tiny_checkpoint.parent), str(tmp_path), str(ROOT), str(Path.home())]
    for answer in answers:
        told = answer.content + str(answer.headers).encode()
        for secret in (*secrets, tempfile.gettempdir(), "Traceback", '.py"', "site-packages"):
            assert secret.encode() not in told, (answer.request.url, secret)


@pytest.mark.parametrize("prompt", ["fail", "fault", "oom", "unpackable"])
@pytest.mark.parametrize("path", ["/v1/generate", "/v1/images/generations"])
def test_no_failure_tells_its_reason_or_its_place(start: Start, prompt: str, path: str) -> None:
    answer = start().post(path, json={"prompt": prompt})
    assert answer.status_code >= 500
    error_of(answer)
    for told in ("secret", "Traceback", "RuntimeError", ".py", "/work", "File "):
        assert told not in answer.text


@pytest.mark.parametrize(
    "name",
    ["output_path", "save_path", "filename", "output_dir", "file", "path", "model_path", "lora"],
)
def test_nothing_is_saved_or_read_where_a_client_says(
    start: Start, tmp_path: Path, name: str
) -> None:
    client = start()
    target = tmp_path / "written.png"
    refused = client.post("/v1/generate", json={**BODY, name: str(target)})
    assert (refused.status_code, error_of(refused)["param"]) == (400, name)
    # OpenAI's clients send many fields; what has no meaning is ignored.
    ignored = client.post("/v1/images/generations", json={"prompt": "x", name: str(target)})
    assert ignored.status_code == 200
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["../../written.png", "/written.png", "..\\written.png", "%2e%2e%2fwritten.png"]
)
def test_the_name_of_an_uploaded_file_leads_nowhere(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    target = io.BytesIO()
    Image.effect_noise((64, 64), 60).convert("RGB").save(target, "PNG")
    client = start()
    answer = client.post(
        "/v1/images/edits",
        data={"prompt": "x"},
        files={"image": (name, target.getvalue())},
    )
    assert answer.status_code == 200
    assert list(tmp_path.rglob("*written*")) == []


@pytest.mark.parametrize(
    "text", ["file:///etc/passwd", "/etc/passwd", "../../etc/passwd", "C:\\Windows\\win.ini", "~/x"]
)
def test_no_picture_is_read_from_this_machines_files(start: Start, text: str) -> None:
    client = start(remote_images=True, remote_image_networks=("127.0.0.1",))
    for fields in (
        {"images": [text]},
        {"images": [encode(Image.new("L", (64, 64)))], "mask": text},
    ):
        answer = client.post("/v1/generate", json={"prompt": "x", **fields})
        assert answer.status_code == 400
        assert error_of(answer)["param"] in ("images[0]", "mask")
        assert "root:" not in answer.text


def test_paths_are_taken_as_they_are_sent(start_live: StartLive, tmp_path: Path) -> None:
    """Neither dots nor their encodings climb out of an address."""
    (tmp_path / "secret.png").write_bytes(b"what only the owner knows")
    live = start_live(settings={"data_dir": str(tmp_path / "data")})
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=PATIENCE_S)
    try:
        for path in (
            "/files/../../../../../../etc/passwd",
            "/files/..%2f..%2f..%2fetc%2fpasswd",
            "/files/%2e%2e/%2e%2e/secret.png",
            "/files//etc/passwd",
            "/files/..%252f..%252fsecret.png",
            "/files/%00",
            "/files/%ff%fe",
            "/v1/jobs/../../secret.png",
            "/v1/jobs/..%2f..%2fsecret.png/images/0",
            "/v1/jobs/..%2f..%2fsecret.png/events",
            f"/v1/jobs/job_{'0' * 32}/images/..%2f..%2f..%2fsecret.png",
            "/v1/models/..%2f..%2fsecret.png",
            "/%2e%2e/%2e%2e/etc/passwd",
            "//etc/passwd",
            "http://127.0.0.1/etc/passwd",
        ):
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read()
            assert answer.status == 404, path
            assert set(json.loads(body)) == {"error"}
            assert b"root:" not in body and b"owner" not in body
    finally:
        connection.close()


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/images/edits", "/v1/jobs"])
def test_forms_that_cost_a_server_much_are_refused_at_once(
    start: Start, tmp_path: Path, path: str
) -> None:
    client = start(max_body_bytes=8 * 2**20, data_dir=str(tmp_path / "data"))
    head = b'--b\r\nContent-Disposition: form-data; name="'
    floods: dict[str, bytes] = {
        "parts": (head + b'x"\r\n\r\ny\r\n') * 50_000 + b"--b--\r\n",
        "files": (head + b'image"; filename="x"\r\n\r\ny\r\n') * 50_000 + b"--b--\r\n",
        "header": b"--b\r\nX: " + b"y" * (7 * 2**20) + b"\r\n\r\n\r\n--b--\r\n",
        "headers": b"--b\r\n" + b"X: y\r\n" * 500_000 + b"\r\n\r\n--b--\r\n",
        "name": head + b"n" * (7 * 2**20) + b'"\r\n\r\ny\r\n--b--\r\n',
        "preamble": b"\r\n" * (3 * 2**20) + b"--b--\r\n",
        "no end": head + b'prompt"\r\n\r\n' + b"y" * (7 * 2**20),
        "boundaries": b"\r\n--" * (2 * 2**20),
        "no boundary": b"y" * (7 * 2**20),
        "empty": b"",
    }
    for name, body in floods.items():
        started_s = time.monotonic()
        answer = client.post(
            path, content=body, headers={"Content-Type": "multipart/form-data; boundary=b"}
        )
        assert answer.status_code in (400, 413), (name, answer.text[:200])
        error_of(answer)
        assert time.monotonic() - started_s < AT_ONCE_S, name
    works = client.post("/v1/generate", json=BODY)
    assert works.status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=" + "b" * 10_000,
        'multipart/form-data; boundary="',
        "multipart/form-data; boundary=\xe9",
        "multipart/form-data; " + "a=b; " * 2000 + "boundary=b",
        "multipart/form-data; boundary*=utf-8''b",
        "application/json; charset=utf-7",
        "application/json; charset=nonsense",
    ],
)
def test_strange_types_of_a_body_are_refused_or_read(start: Start, sent: str) -> None:
    client = start()
    for path in ("/v1/generate", "/v1/images/edits", "/v1/images/variations"):
        answer = client.post(path, content=b"{}", headers={"Content-Type": sent.encode("latin-1")})
        assert answer.status_code in (400, 415), answer.text
        error_of(answer)


def test_answers_are_of_the_type_that_they_say(start: Start) -> None:
    """No text of a client comes back as something that a browser would run."""
    client = start()
    attack: dict[str, Any] = {"<script>alert(1)</script>": "<script>alert(1)</script>"}
    for answer in (
        client.get("/<script>alert(1)</script>"),
        client.post("/v1/generate", json={"prompt": "x", **attack}),
        client.get("/files/<script>alert(1)</script>.html"),
        client.get("/v1/models/<script>"),
    ):
        assert answer.status_code in (400, 404)
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
