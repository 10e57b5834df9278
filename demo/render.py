"""Scenes to pixels: anti-aliased, in batches, on any device.

Every shape is a signed distance in pixels; how much of a pixel it covers follows
from the distance, so edges are smooth at every size. The judge gets the masks
from the same distances.

The distance functions are the well-known ones for two dimensions (Inigo Quilez,
"2D distance functions", MIT); polygons are intersections of half-planes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from demo.language import SHAPES
from demo.scenes import Scene

MOST_FIGURES = 3
OUTLINE_WIDTH = 0.14
"""Of an outline, as a share of the figure's radius; it lies inside the shape."""
STRIPES = 8
"""Stripes, or cells of a checkerboard, along the shorter side."""

BACKGROUND_KINDS = ("plain", "gradient", "stripes", "checks")

Distance = Callable[[Tensor, Tensor], Tensor]
"""(x, y) in units of the radius, y down -> signed distance in the same units, below 0 inside."""


def _half_planes(*corners: tuple[float, float]) -> Distance:
    """A convex polygon from its corners, clockwise on the screen."""
    planes = []
    for (x0, y0), (x1, y1) in zip(corners, (*corners[1:], corners[0]), strict=True):
        length = math.hypot(x1 - x0, y1 - y0)
        normal = ((y1 - y0) / length, -(x1 - x0) / length)
        planes.append((*normal, normal[0] * x0 + normal[1] * y0))

    def distance(x: Tensor, y: Tensor) -> Tensor:
        nx, ny, offset = planes[0]
        inside = nx * x + ny * y - offset
        for nx, ny, offset in planes[1:]:
            inside = torch.maximum(inside, nx * x + ny * y - offset)
        return inside

    return distance


def _regular(sides: int) -> Distance:
    turns = [2 * math.pi * i / sides for i in range(sides)]
    return _half_planes(*((math.sin(a), -math.cos(a)) for a in turns))


def _box(half_width: float, half_height: float) -> Distance:
    def distance(x: Tensor, y: Tensor) -> Tensor:
        return torch.maximum(x.abs() - half_width, y.abs() - half_height)

    return distance


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 1


def _oval(x: Tensor, y: Tensor) -> Tensor:
    wide, high = 1.0, 0.62
    scaled = torch.hypot(x / wide, y / high)
    slope = torch.hypot(x / wide**2, y / high**2)
    return scaled * (scaled - 1) / slope.clamp_min(1e-6)


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five points: folded into one half of one point, which is a half-plane."""
    inner = 0.42
    sector = 2 * math.pi / 5
    angle = torch.atan2(x, -y)
    folded = (angle - sector * torch.round(angle / sector)).abs()  # 0 at a tip
    radius = torch.hypot(x, y)
    px, py = radius * torch.sin(folded), radius * torch.cos(folded)
    ix, iy = inner * math.sin(sector / 2), inner * math.cos(sector / 2)
    length = math.hypot(ix, 1 - iy)
    normal = ((1 - iy) / length, ix / length)
    return normal[0] * px + normal[1] * (py - 1)


def _heart(x: Tensor, y: Tensor) -> Tensor:
    """A square on its corner and two half-discs on its upper sides."""
    size = 1 / 1.207
    y = y - 0.1 * size
    square = (x.abs() + y.abs() - size) / math.sqrt(2)
    lobe = torch.hypot(x.abs() - size / 2, y + size / 2) - size / math.sqrt(2)
    return torch.minimum(square, lobe)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(1.0, 0.34)(x, y), _box(0.34, 1.0)(x, y))


def _ring(x: Tensor, y: Tensor) -> Tensor:
    inner = 0.55
    return (torch.hypot(x, y) - (1 + inner) / 2).abs() - (1 - inner) / 2


def _crescent(x: Tensor, y: Tensor) -> Tensor:
    bite = 0.8 - torch.hypot(x - 0.5, y)
    return torch.maximum(_circle(x, y), bite)


def _arrow(x: Tensor, y: Tensor) -> Tensor:
    shaft = _box(0.55, 0.26)(x + 0.45, y)
    head = _half_planes((0.0, -0.75), (1.0, 0.0), (0.0, 0.75))(x, y)
    return torch.minimum(shaft, head)


DISTANCES: dict[str, Distance] = {
    "circle": _circle,
    "square": _box(0.85, 0.85),
    "triangle": _regular(3),
    "rectangle": _box(1.0, 0.55),
    "diamond": _half_planes((0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0)),
    "pentagon": _regular(5),
    "hexagon": _regular(6),
    "star": _star,
    "heart": _heart,
    "cross": _cross,
    "ring": _ring,
    "crescent": _crescent,
    "arrow": _arrow,
    "oval": _oval,
}


@dataclass(frozen=True, slots=True)
class SceneBatch:
    """Scenes of one size as tensors.

    Shapes: shape [B, 3] int64, -1 where there is no figure; geometry [B, 3, 3] (x, y,
    radius in pixels); colour, outline [B, 3, 3]; has_outline [B, 3] bool; kind [B] int64
    (0 plain, 1 gradient, 2 stripes, 3 checks); across [B] bool; back [B, 2, 3].
    """

    width: int
    height: int
    shape: Tensor
    geometry: Tensor
    colour: Tensor
    outline: Tensor
    has_outline: Tensor
    kind: Tensor
    across: Tensor
    back: Tensor

    @classmethod
    def of(cls, scenes: Sequence[Scene]) -> SceneBatch:
        """Raises ValueError where the scenes differ in size."""
        sizes = {(s.width, s.height) for s in scenes}
        if len(sizes) != 1:
            raise ValueError(f"scenes of one batch must have one size; got {sorted(sizes)}")
        ((width, height),) = sizes
        count = len(scenes)
        shape = np.full((count, MOST_FIGURES), -1, dtype=np.int64)
        numbers = np.zeros((count, MOST_FIGURES, 9), dtype=np.float32)
        numbers[:, :, 2] = 1  # a radius that can be divided by
        has_outline = np.zeros((count, MOST_FIGURES), dtype=bool)
        for i, scene in enumerate(scenes):
            for j, figure in enumerate(scene.figures):
                shape[i, j] = SHAPES.index(figure.shape)
                line = figure.outline_shade or figure.shade
                numbers[i, j] = (figure.x, figure.y, figure.radius, *figure.shade, *line)
                has_outline[i, j] = figure.outline_shade is not None
        backs = [s.background for s in scenes]
        geometry, colour, outline = torch.from_numpy(numbers).split(3, dim=-1)
        return cls(
            width=width,
            height=height,
            shape=torch.from_numpy(shape),
            geometry=geometry,
            colour=colour,
            outline=outline,
            has_outline=torch.from_numpy(has_outline),
            kind=torch.tensor([BACKGROUND_KINDS.index(b.kind) for b in backs]),
            across=torch.tensor([b.direction == "across" for b in backs]),
            back=torch.tensor([(b.shades[0], b.shades[-1]) for b in backs]),
        )

    def to(self, device: torch.device | str) -> SceneBatch:
        """On a device. The shapes' numbers stay on the host, where the work is sorted by them."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in self._tensors()
            if name != "shape"
        }
        return replace(self, **moved)

    def split(self, count: int) -> Iterator[SceneBatch]:
        """Parts of at most ``count`` scenes."""
        for start in range(0, len(self.shape), count):
            part = slice(start, start + count)
            yield replace(self, **{name: getattr(self, name)[part] for name in self._tensors()})

    def _tensors(self) -> list[str]:
        return [f.name for f in fields(self) if f.name not in ("width", "height")]


def render(batch: SceneBatch) -> Tensor:
    """Shapes: -> [B, 3, H, W] float32 in [0, 1]."""
    picture = background(batch)
    for j in range(MOST_FIGURES):
        cover, inner = coverage(batch, j)  # [B, H, W] each
        outlined = batch.has_outline[:, j, None, None]
        inner = torch.where(outlined, inner, cover)[:, None]
        fill = batch.colour[:, j, :, None, None]
        line = batch.outline[:, j, :, None, None]
        paint = inner * fill + (1 - inner) * line  # [B, 3, H, W]
        picture = picture + cover[:, None] * (paint - picture)
    return picture


def background(batch: SceneBatch) -> Tensor:
    """What the figures stand on. Shapes: -> [B, 3, H, W]."""
    x, y = _pixel_centres(batch)
    cell = min(batch.width, batch.height) / STRIPES
    across = batch.across[:, None, None]
    share = torch.where(across, x / batch.width, y / batch.height)  # [B, H, W]
    along = torch.where(across, x, y)
    odd_x, odd_y = _odd(x, cell), _odd(y, cell)
    checks = odd_x + odd_y - 2 * odd_x * odd_y
    kind = batch.kind[:, None, None]
    mix = torch.zeros_like(share)
    mix = torch.where(kind == 1, share, mix)
    mix = torch.where(kind == 2, _odd(along, cell), mix)
    mix = torch.where(kind == 3, checks.expand_as(mix), mix)[:, None]
    first, last = batch.back[:, 0, :, None, None], batch.back[:, 1, :, None, None]
    return first + mix * (last - first)


def coverage(batch: SceneBatch, figure: int) -> tuple[Tensor, Tensor]:
    """How much of each pixel a figure covers: with its outline, and without.

    Shapes: -> two [B, H, W] in [0, 1]; zeros where a scene has no such figure.
    """
    x, y = _pixel_centres(batch)
    middle_x, middle_y, radius = batch.geometry[:, figure, :, None, None].unbind(1)
    u, v = (x - middle_x) / radius, (y - middle_y) / radius  # [B, 1, W], [B, H, 1]
    kinds = batch.shape[:, figure]  # on the host
    cover = u.new_zeros(len(kinds), batch.height, batch.width)
    inner = torch.zeros_like(cover)
    for number, name in enumerate(SHAPES):
        rows = (kinds == number).nonzero()[:, 0]
        if rows.numel() == 0:
            continue
        rows = rows.to(cover.device, non_blocking=True)
        distance = DISTANCES[name](u[rows], v[rows]) * radius[rows]  # pixels
        cover[rows] = (0.5 - distance).clamp(0, 1)
        inner[rows] = (0.5 - distance - OUTLINE_WIDTH * radius[rows]).clamp(0, 1)
    return cover, inner


def _pixel_centres(batch: SceneBatch) -> tuple[Tensor, Tensor]:
    """x [1, 1, W] and y [1, H, 1]."""
    device = batch.kind.device
    x = torch.arange(batch.width, device=device) + 0.5
    y = torch.arange(batch.height, device=device) + 0.5
    return x[None, None, :], y[None, :, None]


def _odd(position: Tensor, cell: float) -> Tensor:
    """1 in every second cell, 0 in the others, smooth over one pixel at the borders."""
    into = torch.remainder(position, 2 * cell) - cell  # from -cell to cell
    half_width = cell / 2
    return (0.5 + half_width - (into - half_width).abs()).clamp(0, 1)
