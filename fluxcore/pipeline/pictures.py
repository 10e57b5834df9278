"""Pictures in and out: references and masks to tensors, decoded pixels to bytes.

Source: diffusers Flux2ImageProcessor, Flux2KleinPipeline.__call__ (references) and
Flux2KleinInpaintPipeline.__call__ (picture and mask).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from fluxcore.drawn import DeflatedLines, DrawnPicture
from fluxcore.errors import DeviceFaultError
from fluxcore.fitting import limit_area, whole_tokens
from fluxcore.models import AutoEncoder
from fluxcore.params import SIZE_MULTIPLE
from fluxcore.pipeline.latents import unpack
from fluxcore.residues import CHANNELS, FILTERS, LOOKED_AT, SAMPLED, adler_of, strip_height

Deflate = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""``fluxcore.runtime.triton_deflate.deflate_lines``, or nothing like it."""

LEAST_BITS = 2
"""Of a byte. Where the device needs fewer, there are runs, which it does not look for: a picture of
that kind is left to the host, whose file is smaller."""


def opaque(picture: Image.Image) -> Image.Image:
    """RGB without transparency.

    Differs from diffusers, which drops alpha and shows whatever colour lay under it:
    transparent parts become white, as viewers show them on a page.
    """
    picture = _eight_bit(picture)
    if "A" in picture.getbands() or "transparency" in picture.info:
        layered = picture.convert("RGBA")
        white = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(white, layered).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def fit_reference(picture: Image.Image) -> Image.Image:
    """At most 1024 x 1024 pixels in area, cropped at the centre to multiples of 16."""
    picture = limit_area(opaque(picture))
    width, height = whole_tokens(picture)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def fit_inpainted(picture: Image.Image) -> Image.Image:
    """The picture to paint in: area as for references, then stretched to multiples of 16."""
    picture = limit_area(opaque(picture))
    return picture.resize(whole_tokens(picture), Image.Resampling.LANCZOS)


def to_pixels(picture: Image.Image) -> Tensor:
    """Shapes: RGB picture -> [1, 3, height, width] float32 in [-1, 1], on the host."""
    values = np.asarray(picture, dtype=np.float32) / 255.0
    return torch.from_numpy(values).permute(2, 0, 1)[None] * 2.0 - 1.0


def to_token_mask(mask: Image.Image, size: tuple[int, int]) -> Tensor:
    """The share of each token that is drawn again.

    Shapes: mask of any size -> [1, h w, 1] float32, 0 keeps and 1 draws, on the host.
    """
    grey = _eight_bit(mask).resize(size, Image.Resampling.LANCZOS).convert("L")
    values = torch.from_numpy(np.asarray(grey, dtype=np.float32) / 255.0)
    binary = (values >= 0.5).float()[None, None]  # [1, 1, height, width]
    grid = (size[1] // SIZE_MULTIPLE, size[0] // SIZE_MULTIPLE)
    tokens = F.interpolate(binary, size=grid, mode="bilinear")  # [1, 1, h, w]
    return tokens.flatten(2).transpose(1, 2)  # [1, h w, 1]


class PictureDecoder(nn.Module):
    """Latents all the way to bytes on the device, as one thing to compile and to record.

    Shapes: latents [1, h w, C] -> as ``to_bytes``, height = 16 h and width = 16 w.
    """

    def __init__(self, vae: AutoEncoder, dtype: torch.dtype, layout: torch.memory_format) -> None:
        super().__init__()
        self.vae = vae
        self.dtype = dtype
        self.layout = layout

    def forward(self, latents: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        unpacked = unpack(latents, (rows, columns)).to(self.dtype)  # [1, C, h, w]
        return to_bytes(self.vae.decode(unpacked.contiguous(memory_format=self.layout)))


def to_bytes(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Decoded pixels as bytes, and whether they are a picture at all; waits for nothing.

    Shapes: [1, 3, height, width] in [-1, 1] -> [height, width, 3] uint8, [2] bool (all are
    finite; not all are the same).
    """
    sound = torch.stack((torch.isfinite(pixels).all(), pixels.amax() != pixels.amin()))
    shown = (pixels * 0.5 + 0.5).clamp(0, 1).float()
    bytes_ = (shown * 255).round().to(torch.uint8)[0].permute(1, 2, 0).contiguous()  # [H, W, 3]
    return bytes_, sound


def with_lines(
    decode: Callable[..., tuple[Tensor, Tensor]], deflate: Deflate | None
) -> Callable[..., tuple[Tensor, ...]]:
    """A ``PictureDecoder`` that gives ``to_lines`` of its bytes, too, and what deflate makes of it.

    Around it and not within: a compiled form is to serve all sizes, and how high strips are
    depends on each.
    """

    def decode_and_filter(latents: Tensor, rows: int, columns: int) -> tuple[Tensor, ...]:
        bytes_, sound = decode(latents, rows, columns)
        lines = to_lines(bytes_)
        if deflate is None:
            return bytes_, sound, lines
        height, stride = bytes_.flatten(1).shape
        return bytes_, sound, lines, *deflate(lines, strip_height(height, stride))

    return decode_and_filter


def to_lines(bytes_: Tensor) -> Tensor:
    """Rows filtered for a PNG file; waits for nothing.

    The same bytes as of ``fluxcore.residues.filtered``, in one go: what a strip's rows are with
    each filter, and then of the one that leaves the least.

    Shapes: [height, width, 3] uint8 -> [height, 1 + 3 width] uint8, the filter first.
    """
    rows = bytes_.flatten(1)  # [height, 3 width]
    height, stride = rows.shape
    count = strip_height(height, stride)
    strips = -(-height // count)
    # With what stands to the left of each row and above all, which is 0 outside of the picture.
    framed = F.pad(rows, (CHANNELS, 0, 1, 0))
    left, up = framed[1:, :stride], framed[:-1, CHANNELS:]
    mean = ((left ^ up) >> 1) + (left & up)  # rounded down, without a wider type
    residues = rows - torch.stack((left, up, mean))  # [filter, height, 3 width]
    sample = residues[:, LOOKED_AT]
    left_over = torch.minimum(sample, -sample).sum(dim=2)  # [filter, rows] int64
    # Rows that a last strip does not have leave nothing: without any, the first filter is taken.
    missing = strips * count // SAMPLED - left_over.shape[1]
    of_strips = F.pad(left_over, (0, missing)).unflatten(1, (strips, -1)).sum(dim=2)
    best = of_strips.argmin(dim=0)  # [strips]
    of_rows = best[:, None].expand(strips, count).flatten()[:height, None]  # [height, 1]
    chosen = residues.gather(0, of_rows.expand(1, height, stride))[0]  # [height, 3 width]
    # The filters' numbers follow one another.
    return torch.cat(((of_rows + FILTERS[0]).to(torch.uint8), chosen), dim=1)


def to_picture(
    bytes_: Tensor, sound: Tensor, lines: Tensor | None = None, *deflated: Tensor
) -> DrawnPicture:
    """The 8-bit picture of what ``with_lines`` gave, on the host; no copy.

    Raises:
        DeviceFaultError: some value is not finite, or all are the same, which is
            what a GPU fault leaves behind and a model does not draw.
    """
    finite, varied = sound.tolist()
    if not finite or not varied:
        fault = "values that are not finite" if not finite else "one constant colour"
        raise DeviceFaultError(
            f"the device returned a picture of {fault}; try again, and if it stays so, restart "
            "the program and try dtype float32"
        )
    if lines is None:
        return DrawnPicture(bytes_.numpy())
    compressed = _deflated(lines.numel(), *deflated) if deflated else None
    # What nobody needs is let go of.
    kept = lines.numpy() if compressed is None else None
    return DrawnPicture(bytes_.numpy(), kept, compressed)


def _deflated(count: int, stream: Tensor, told: Tensor) -> DeflatedLines | None:
    """What the device compressed, if it is all there and worth having.

    Args:
        count: bytes of the lines.
    """
    bits, total, weighted = told.tolist()
    if not LEAST_BITS * count <= bits <= 8 * stream.numel():
        return None
    return DeflatedLines(stream[: -(-bits // 8)].numpy(), adler_of(count, total, weighted))


def _eight_bit(picture: Image.Image) -> Image.Image:
    """16-bit greyscale scaled to 8 bits; PIL's own conversion clips it to white."""
    if not picture.mode.startswith("I;16"):
        return picture
    return Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
