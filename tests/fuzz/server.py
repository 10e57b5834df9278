"""A service that draws small grey pictures at once, whatever size is asked for.

Started by the test of the OpenAPI document as ``python -m tests.fuzz.server``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator

from PIL import Image

from app.main import create_engine, serve
from app.settings import Settings
from app.telemetry import configure_logging
from fluxcore.drawn import DrawnPicture
from fluxcore.params import GenerationParams
from tests.service.fake_pipeline import (
    FakePipeline,
    FakeResult,
    FakeSlice,
    as_drawn,
    loader_of,
)

SMALL_PX = 64


class SmallPipeline(FakePipeline):
    """Packing thousands of large pictures would tell nothing more."""

    def run(
        self, params: GenerationParams, *, alone: bool = False
    ) -> Generator[FakeSlice, None, FakeResult]:
        result = yield from super().run(params)
        small = as_drawn(Image.new("RGB", (SMALL_PX, SMALL_PX), "grey"))
        return FakeResult(
            pictures=[small] * params.n,
            seeds=result.seeds,
            timings=result.timings,
            warnings=[],
            params=result.params,
        )

    def decode(self, latents: int, width: int, height: int) -> DrawnPicture:
        return super().decode(latents % 256, SMALL_PX, SMALL_PX)


def main() -> int:
    """Serve until a signal comes."""
    configure_logging("info", "plain")
    settings = Settings(
        port=0, warm_up_sizes=(), shutdown_grace_s=1.0, data_dir=os.environ["FLUXD_DATA_DIR"]
    )
    return serve(settings, create_engine(settings, loader_of(SmallPipeline())))


if __name__ == "__main__":
    sys.exit(main())
