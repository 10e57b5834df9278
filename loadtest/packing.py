"""What a PNG file costs, by encoder: milliseconds and bytes.

    python loadtest/packing.py [PICTURE ...] --sizes 256 512 1024

Pictures: the given files, and for each size fractal noise under a little grain, which is
to an encoder what a photograph is. Every encoder must give the pixels back. Measured are
Pillow, what the service does (app.engine.png, on one thread and on more), and of
OpenCV, imagecodecs, isal and libdeflate ("deflate") those that are installed. Wall time
is the least of the runs, since other work on the machine only adds to it; beside it
stand the processor's milliseconds, the median. The last line is JSON.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from app.engine import packing, png
from fluxcore import residues

Encode = Callable[[Image.Image], bytes]
PILLOW_STRATEGIES = {"filtered": 1, "huffman": 2, "runs": 3}
THREADS = (1, 2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", type=Path, nargs="*")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    pictures = {path.stem: Image.open(path).convert("RGB") for path in args.pictures}
    pictures |= {f"photographic {side}": photographic(side) for side in args.sizes}
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    report: dict[str, Any] = {}
    for name, picture in pictures.items():
        print(f"\n{name}, {picture.width}x{picture.height}      wall   processor     bytes")
        for encoder, encode in encoders():
            found = report.setdefault(name, {})[encoder] = measure(encode, picture, args.runs)
            print(
                f"  {encoder:34} {found['wall_ms']:8.1f} ms {found['processor_ms']:7.1f} ms "
                f"{found['bytes']:9}"
            )
    print(json.dumps(report))


def photographic(side: int) -> Image.Image:
    """Noise whose strength falls with frequency, and grain of 1.5 of 255."""
    chance = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1

    def fractal() -> np.ndarray:
        spectrum = np.fft.rfft2(chance.standard_normal((side, side))) / frequency**1.2
        smooth = np.fft.irfft2(spectrum)
        return smooth / smooth.std()

    shared = fractal()
    channels = [
        128 + 45 * (shared + 0.4 * fractal()) + 1.5 * chance.standard_normal((side, side))
        for _ in range(3)
    ]
    return Image.fromarray(np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8))


def measure(encode: Encode, picture: Image.Image, runs: int) -> dict[str, float]:
    """Check that nothing is lost, then time it."""
    data = encode(picture)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(picture))
    walls, processor = [], []
    for _ in range(runs):
        wall, spent = time.perf_counter(), time.process_time()
        encode(picture)
        processor.append((time.process_time() - spent) * 1000)
        walls.append((time.perf_counter() - wall) * 1000)
    return {
        "wall_ms": min(walls),
        "processor_ms": statistics.median(processor),
        "bytes": len(data),
    }


def encoders() -> Iterator[tuple[str, Encode]]:
    """(name, encoder) of all that can be had here."""
    for level in (0, 1, 3, 6, 9):
        yield f"Pillow, level {level}", partial(_pillow, compress_level=level)
    for name, number in PILLOW_STRATEGIES.items():
        yield f"Pillow, {name}", partial(_pillow, compress_type=number)
    for threads in THREADS:
        # The thread that packs is one of them.
        packing.STRIP_THREADS = max(1, threads - 1)
        pool = packing.PackingPool()
        spread = map if threads == 1 else pool._spread
        yield f"fluxd, threads {threads}", partial(_fluxd, spread=spread)
        pool.close()
    if cv2 := _installed("cv2"):
        cv2.setNumThreads(1)
        for level, strategy in ((1, 3), (1, 2), (3, 0)):
            options = (16, level, 17, strategy)  # IMWRITE_PNG_COMPRESSION, ..._STRATEGY
            yield f"OpenCV, level {level} strategy {strategy}", partial(_opencv, cv2, options)
    if codecs := _installed("imagecodecs"):
        for level in (1, 6):
            yield f"imagecodecs, level {level}", partial(_imagecodecs, codecs, level)
    if isal := _installed("isal.isal_zlib"):
        yield (
            "fluxd's filters, isal level 1",
            partial(_with_deflate, partial(isal.compress, level=1)),
        )
    if libdeflate := _installed("deflate"):
        yield (
            "fluxd's filters, libdeflate level 1",
            partial(_with_deflate, partial(libdeflate.zlib_compress, compresslevel=1)),
        )


def _installed(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        return None


def _pillow(picture: Image.Image, **options: int) -> bytes:
    target = io.BytesIO()
    picture.save(target, "PNG", **options)
    return target.getvalue()


def _fluxd(picture: Image.Image, spread: Any) -> bytes:
    return png.write_png(picture, [], spread)


def _opencv(cv2: Any, options: tuple[int, ...], picture: Image.Image) -> bytes:
    return cv2.imencode(".png", np.asarray(picture)[:, :, ::-1], options)[1].tobytes()


def _imagecodecs(codecs: Any, level: int, picture: Image.Image) -> bytes:
    return codecs.png_encode(np.asarray(picture), level=level)


def _with_deflate(compress: Callable[[bytes], bytes], picture: Image.Image) -> bytes:
    """The whole picture as one strip, filtered as ours are, through another deflate."""
    pixels = np.asarray(picture)
    rows = pixels.reshape(len(pixels), -1)
    (lines,) = residues.filtered(rows, -len(rows) // residues.SAMPLED * -residues.SAMPLED)
    head = png.struct.pack(">IIBBBBB", picture.width, picture.height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", bytes(compress(lines.tobytes()))), (b"IEND", b""))
    return png.SIGNATURE + b"".join(png._chunk(*chunk) for chunk in chunks)


if __name__ == "__main__":
    main()
