"""Every route against its own description, with requests that schemathesis makes up from it.

All checks but one: after DELETE a job is cancelled, not gone (``?forget=true`` removes it),
so ``use_after_free`` does not apply. Nothing may be answered with 5xx or in a way that the
document does not tell of, no valid request may be refused, no wrong one accepted.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.service.processes import ServerProcess, environment

SEED = 1
# One request. The longest job of the fake pipeline takes a second or two beside other work.
REQUEST_TIMEOUT_S = 60
HOOKS = "tests.fuzz.hooks"


def _fuzz(directory: Path, *options: str, timeout_s: float) -> None:
    command = (sys.executable, "-m", "tests.fuzz.server")
    with ServerProcess(*command, FLUXD_DATA_DIR=str(directory / "data")) as server:
        document = f"{server.url()}/openapi.json"
        done = subprocess.run(
            [
                Path(sys.executable).parent / "schemathesis",
                "run",
                document,
                "--checks=all",
                "--exclude-checks=use_after_free",
                f"--request-timeout={REQUEST_TIMEOUT_S}",
                f"--max-response-time={REQUEST_TIMEOUT_S}",
                f"--seed={SEED}",
                "--warnings=off",
                # On a busy machine, that generating is slow says nothing about the service.
                "--suppress-health-check=too_slow",
                "--continue-on-failure",
                *options,
            ],
            cwd=directory,
            env=environment(
                SCHEMATHESIS_HOOKS=HOOKS,
                HYPOTHESIS_STORAGE_DIRECTORY=str(directory / "hypothesis"),
            ),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
        assert "Traceback" not in server.output and " ERROR " not in server.output


def test_a_few_requests_of_every_kind_keep_to_the_document(tmp_path: Path) -> None:
    _fuzz(tmp_path, "--phases=fuzzing", "--max-examples=5", timeout_s=110)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_thousands_of_requests_keep_to_the_document(tmp_path: Path) -> None:
    workers = f"--workers={min(4, os.cpu_count() or 1)}"
    _fuzz(tmp_path, "--max-examples=100", "--max-time=900", workers, timeout_s=1400)
