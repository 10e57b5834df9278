"""What a picture file says about how it was made.

Owns the names and notations under which other programs look: the ``parameters``
text of the Stable Diffusion web UIs, the standard PNG keywords, and EXIF. Nothing
in it depends on the time or the machine, so equal pictures are equal files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from app.engine.contract import Resolved
from fluxcore.params import GenerationParams
from fluxcore.version import __version__

SOFTWARE = "fluxd"
TITLE_CHARS = 80
# EXIF must fit into one JPEG segment of 65533 bytes: a prompt stands there in UTF-8 and in
# UTF-16, a negative prompt in UTF-16, each with up to 4 bytes a character.
EXIF_PROMPT_CHARS = 5_000

# Source: Exif 2.32, tables 4 and 7.
_IMAGE_DESCRIPTION = 0x010E
_SOFTWARE = 0x0131
_EXIF_IFD = 0x8769
_USER_COMMENT = 0x9286


@dataclass(frozen=True, slots=True)
class Provenance:
    """How one picture was made. Units: pixels."""

    prompt: str
    negative_prompt: str | None
    seed: int
    width: int
    height: int
    steps: int
    guidance: float | None
    schedule: str
    model: str
    version: str

    @property
    def software(self) -> str:
        """The program and its version."""
        return f"{SOFTWARE} {self.version}"


def provenance(params: GenerationParams, resolved: Resolved, seed: int, model: str) -> Provenance:
    """How the picture of a seed was made."""
    return Provenance(
        prompt=params.prompt,
        negative_prompt=params.negative_prompt,
        seed=seed,
        width=resolved.width,
        height=resolved.height,
        steps=resolved.steps,
        guidance=resolved.guidance,
        schedule=params.schedule,
        model=model,
        version=__version__,
    )


def parameters_text(made: Provenance, prompt_chars: int | None = None) -> str:
    """The text that Stable Diffusion web UIs write, and that viewers parse.

    Args:
        prompt_chars: cut each prompt to so many characters, where space is short.

    The form is: prompt, "Negative prompt:" line, one line of "Name: value" pairs.
    """
    lines = [_cut(made.prompt, prompt_chars)]
    if made.negative_prompt:
        lines.append(f"Negative prompt: {_cut(made.negative_prompt, prompt_chars)}")
    pairs = {
        "Steps": made.steps,
        "Sampler": "Euler",
        "Schedule type": made.schedule,
        # Scale 1 is how these programs write "no guidance".
        "CFG scale": f"{1.0 if made.guidance is None else made.guidance:g}",
        "Seed": made.seed,
        "Size": f"{made.width}x{made.height}",
        "Model": made.model,
        "Version": made.software,
    }
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in pairs.items()))
    return "\n".join(lines)


def png_text(made: Provenance) -> list[tuple[bytes, bytes]]:
    """Text chunks as (type, data): ``parameters`` and the standard keywords.

    Latin-1 text goes into tEXt chunks, all other text into iTXt ones.
    Source: PNG specification, third edition, 11.3.3.1 (keywords).
    """
    chunks = PngInfo()
    title = made.prompt.strip().splitlines()[0]
    for keyword, text in (
        ("parameters", parameters_text(made)),
        ("Title", _cut(title, TITLE_CHARS)),
        ("Description", made.prompt),
        ("Software", made.software),
        ("Source", made.model),
        ("Comment", _comment(made)),
    ):
        # A zero byte ends a field in this format.
        chunks.add_text(keyword, text.replace("\0", ""))
    return [(kind, data) for kind, data, *_ in chunks.chunks]


def exif(made: Provenance) -> Image.Exif:
    """The same for JPEG and WebP: UserComment, ImageDescription and Software."""
    tags = Image.Exif()
    description = _cut(made.prompt, EXIF_PROMPT_CHARS).replace("\0", "")
    tags[_IMAGE_DESCRIPTION] = description.encode()
    tags[_SOFTWARE] = made.software
    comment = parameters_text(made, EXIF_PROMPT_CHARS)
    # Big-endian, as in the web UIs' files and as Pillow writes the file's own header: some
    # readers go by the one, some by the other.
    tags.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + comment.encode("utf-16-be")
    return tags


def _comment(made: Provenance) -> str:
    return json.dumps(
        {
            "seed": made.seed,
            "width": made.width,
            "height": made.height,
            "steps": made.steps,
            "guidance": made.guidance,
            "schedule": made.schedule,
            "negative_prompt": made.negative_prompt,
            "model": made.model,
            "version": made.version,
        },
        ensure_ascii=False,
    )


def _quoted(text: str) -> str:
    """Values that would break the line of pairs are written as JSON strings."""
    if any(sign in text for sign in ',:\n"'):
        return json.dumps(text, ensure_ascii=False)
    return text


def _cut(text: str, limit: int | None) -> str:
    return text if limit is None or len(text) <= limit else f"{text[: limit - 1]}…"
