"""A service around a slow fake pipeline, as a process of its own.

Started by the tests of signals as ``python -m tests.service.slow_server [GRACE_S]``. Its jobs
take about a second; the job ``stuck`` never comes back from its first slice.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Generator

from app.engine import engine
from app.main import create_engine, serve
from app.settings import Settings
from app.telemetry import configure_logging
from fluxcore.params import GenerationParams
from tests.service.fake_pipeline import FakePipeline, FakeResult, FakeSlice, loader_of

SLICE_S = 0.1
# Many slices, and yet short enough for a test to wait for it in vain.
LAST_SLICE_S = 2.0


class SlowPipeline(FakePipeline):
    """Takes a tenth of a second for each of its slices."""

    def run(
        self, params: GenerationParams, *, alone: bool = False
    ) -> Generator[FakeSlice, None, FakeResult]:
        slices = super().run(params)
        if params.prompt == "stuck":
            threading.Event().wait()
        while True:
            time.sleep(SLICE_S)
            try:
                done = next(slices)
            except StopIteration as end:
                result: FakeResult = end.value
                return result
            yield done


def main() -> int:
    """Serve until a signal comes."""
    configure_logging("info", "plain")
    engine.LAST_SLICE_S = LAST_SLICE_S
    grace_s = float(sys.argv[1]) if len(sys.argv) > 1 else 30.0
    data_dir = os.environ["FLUXD_DATA_DIR"]
    settings = Settings(port=0, warm_up_sizes=(), shutdown_grace_s=grace_s, data_dir=data_dir)
    return serve(settings, create_engine(settings, loader_of(SlowPipeline())))


if __name__ == "__main__":
    sys.exit(main())
