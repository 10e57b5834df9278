"""What a client does with ``/v1/jobs``: accept, look, wait, read events."""

from __future__ import annotations

import json
from typing import Any

import httpx2
from starlette.testclient import TestClient

from tests.service.conftest import wait_until

Client = TestClient | httpx2.Client
# The form of an id, but nobody's.
NO_JOB = f"job_{0:032x}"


def accept(client: Client, prompt: str = "a fox", **given: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "width": 64, "height": 64, **given}
    answer = client.post("/v1/jobs", json=body)
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    assert answer.headers["location"] == job["urls"]["job"]
    return job


def look(client: Client, job: dict[str, Any]) -> dict[str, Any]:
    answer = client.get(job["urls"]["job"])
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


def wait_for(client: Client, job: dict[str, Any], status: str = "completed") -> dict[str, Any]:
    wait_until(lambda: look(client, job)["status"] == status)
    return look(client, job)


def events_in(text: str) -> list[tuple[str, str, dict[str, Any]]]:
    """(id, name, data) of each event."""
    found = []
    for block in text.split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if lines:
            fields = dict(line.split(": ", 1) for line in lines)
            found.append((fields["id"], fields["event"], json.loads(fields["data"])))
    return found
