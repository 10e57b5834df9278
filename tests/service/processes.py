"""Programs that tests start: their output as it comes, and their certain end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

from tests.service.conftest import PATIENCE_S, wait_until

ROOT = Path(__file__).parents[2]
FLUXD = (sys.executable, "-c", "from app.cli import main; main()")


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without settings of fluxd, and with the ones given.

    Without ``FLUXD_DATA_DIR``, nothing is kept on the disk.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FLUXD_")}
    return {**kept, "PYTHONPATH": str(ROOT), "FLUXD_DATA_DIR": "off", **variables}


class ServerProcess:
    """A service in a process of its own. Use it as a context manager."""

    def __init__(self, *command: str, **variables: str) -> None:
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        assert self._process.stdout is not None
        self._process.stdout.close()

    @property
    def output(self) -> str:
        """All it has said."""
        return "".join(self.lines)

    def url(self) -> str:
        """Its address, once it listens."""
        pattern = re.compile(r"listening on (http://\S+)")
        wait_until(lambda: pattern.search(self.output) or self._process.poll() is not None)
        found = pattern.search(self.output)
        assert found is not None, self.output
        return found[1]

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def status(self) -> int:
        """Its exit status, once it has ended."""
        status = self._process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return status

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line)
