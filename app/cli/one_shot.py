"""``fluxd generate``: load, draw, write files, say how long it took.

Everything that can be wrong with the request is found before the model is loaded.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from app.cli.terminal import UsageError, load_progress, say, step_progress
from app.engine.contract import LoadStep, Pipeline, Result
from app.engine.metadata import provenance
from app.engine.packing import Packing, PictureFormat, pack_picture
from app.engine.pictures import PictureError, read_mask, read_picture
from app.main import BUNDLED_NOTE, pipeline_loader
from app.settings import Settings
from app.telemetry import configure_logging
from fluxcore.params import GenerationParams

STANDARD = "-"
FORMAT_OF_SUFFIX: dict[str, PictureFormat] = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".webp": "webp",
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """The command's arguments. ``params`` are fields of ``GenerationParams``."""

    prompt: str
    output: str
    params: Mapping[str, Any]
    references: tuple[Path, ...]
    mask: Path | None
    quality: int


def draw(wanted: Wanted, settings: Settings) -> None:
    """Run the command.

    Raises:
        UsageError, InvalidParamsError: the request cannot work.
        FluxError, OSError: loading, drawing or writing failed.
    """
    configure_logging("error" if settings.log_level == "error" else "warning", settings.log_format)
    params = _params(wanted, settings)
    packing = Packing(_output_format(wanted.output, params.n), wanted.quality)
    if settings.model is None:
        say(BUNDLED_NOTE)
    started_s = time.monotonic()
    pipeline = _load(settings.model, settings)
    load_ms = (time.monotonic() - started_s) * 1000
    result = _run(pipeline, params)
    pack_started_s = time.monotonic()
    packed = [
        pack_picture(image, packing, provenance(params, result.params, seed, pipeline.info.name))
        for image, seed in zip(result.images, result.seeds, strict=True)
    ]
    pack_ms = (time.monotonic() - pack_started_s) * 1000
    for path, picture in zip(_paths(wanted.output, params.n), packed, strict=True):
        if path is None:
            sys.stdout.buffer.write(picture.data)
            sys.stdout.buffer.flush()
        else:
            path.write_bytes(picture.data)
        size = f"{picture.width}x{picture.height}"
        say(f"{path or 'standard output'}  {size}  seed {picture.seed}")
    for warning in result.warnings:
        say(f"warning: {warning}")
    timings = {"load": load_ms, **result.timings, "pack": pack_ms}
    say("  ".join(f"{name} {ms:.0f} ms" for name, ms in timings.items()))


def _params(wanted: Wanted, settings: Settings) -> GenerationParams:
    prompt = sys.stdin.read().strip() if wanted.prompt == STANDARD else wanted.prompt
    given = {name: value for name, value in wanted.params.items() if value is not None}
    for name in ("prompt", "negative_prompt"):
        text = prompt if name == "prompt" else given.get(name, "")
        if not _is_unicode(text):
            raise UsageError(f"the {name.replace('_', ' ')} is not valid UTF-8")
    if not wanted.references:
        given = {"width": settings.default_width, "height": settings.default_height, **given}
    if len(wanted.references) > settings.max_references:
        raise UsageError(
            f"at most {settings.max_references} --image are allowed; got {len(wanted.references)}"
        )
    # What is cheap to check comes before the pictures are read.
    GenerationParams(prompt=prompt, **{**given, "strength": 1.0})
    limit = settings.max_image_pixels
    references = tuple(_read(path, read_picture, limit) for path in wanted.references)
    mask = None if wanted.mask is None else _read(wanted.mask, read_mask, limit)
    return GenerationParams(prompt=prompt, references=references, mask=mask, **given)


def _is_unicode(text: str) -> bool:
    """False for bytes of the command line that were no text, which Python keeps as surrogates."""
    return not any(0xD800 <= ord(character) <= 0xDFFF for character in text)


def _read(path: Path, read: Callable[[bytes, int], Image.Image], max_pixels: int) -> Image.Image:
    try:
        return read(path.read_bytes(), max_pixels)
    except PictureError as error:
        raise UsageError(f"{path} {error}") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def _output_format(output: str, n: int) -> PictureFormat:
    if output == STANDARD:
        if n > 1:
            raise UsageError("standard output takes one picture; give a file name or --n 1")
        if sys.stdout.isatty():
            raise UsageError("standard output is a terminal; redirect it or give a file name")
        return "png"
    path = Path(output)
    found = FORMAT_OF_SUFFIX.get(path.suffix.lower())
    if found is None:
        allowed = ", ".join(FORMAT_OF_SUFFIX)
        raise UsageError(f"the output's name must end in one of {allowed}; got {output!r}")
    if not path.parent.is_dir():
        raise UsageError(f"there is no directory {path.parent}; create it first")
    return found


def _paths(output: str, n: int) -> Sequence[Path | None]:
    if output == STANDARD:
        return [None]
    path = Path(output)
    if n == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{index}{path.suffix}") for index in range(1, n + 1)]


def _load(model: Path | None, settings: Settings) -> Pipeline:
    with load_progress() as report:

        def progress(step: LoadStep) -> None:
            report(step.done_bytes, step.total_bytes, step.component)

        # Both pay off over many pictures only.
        once = settings.model_copy(update={"compile": "off", "cuda_graphs": 0})
        return pipeline_loader(model, once)(progress)


def _run(pipeline: Pipeline, params: GenerationParams) -> Result:
    slices = pipeline.run(params)
    with step_progress() as report:
        while True:
            try:
                done = next(slices)
            except StopIteration as end:
                result: Result = end.value
                return result
            total = done.steps * params.n
            report(done.image_index * done.steps + done.step, total, done.stage)
