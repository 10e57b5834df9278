"""Whether a picture shows what its caption says: by measuring, not by looking.

The judge renders what the caption means and compares: the colour inside each figure
with the twelve named ones, the figure's outline with that of every shape, its place,
and the background. It is strict: a picture is right when everything in it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from demo.edits import Edit
from demo.language import COLOURS, SHAPES
from demo.render import SceneBatch, background, coverage, render
from demo.scenes import Scene

LEAST_IOU = 0.7
NEAR = 0.15
"""Colours closer than this, as a distance in RGB, pass for the same."""
PLAIN_SHARE, PATTERN_SHARE = 0.97, 0.90
"""Of background pixels that must be near what is expected; stripes may be a pixel off."""
PLACE_SHARE = 0.06
"""How far a figure's middle may be off, as a share of the shorter side."""
SPOT_SHARE = 0.012
"""Half the width of the smallest thing that nobody asked for, as a share of the side."""
STRANGE_SHARE = 0.08
"""Of a figure that may have a colour that is nobody's, edges not counted."""
UNCHANGED_SHARE = 0.95
"""Of pixels that an edit does not speak of that must be near the reference's."""
CRITERIA = ("colour", "shape", "place", "background", "outline", "unchanged")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is right about one picture.

    Attributes:
        least_iou: of the figure that overlaps least with its expected mask; 1 without figures.
    """

    colour: bool = True
    shape: bool = True
    place: bool = True
    background: bool = True
    outline: bool = True
    unchanged: bool = True
    least_iou: float = 1.0

    @property
    def is_right(self) -> bool:
        return all(getattr(self, name) for name in CRITERIA)


def judge(picture: Tensor, scene: Scene) -> Verdict:
    """Compare a picture with the scene that it should show.

    Shapes: picture [3, H, W] in [0, 1], on the CPU.
    """
    wanted = SceneBatch.of([scene])
    masks, fills, lines = _expected_masks(wanted, len(scene.figures))
    backdrop = background(wanted)[0]  # [3, H, W]
    covered = torch.zeros_like(picture[0], dtype=torch.bool)
    for mask in masks:
        covered |= mask
    fits = (picture - backdrop).norm(dim=0) < NEAR  # [H, W]
    free = ~_grown(covered, 3)
    share = float(fits[free].float().mean()) if bool(free.any()) else 1.0
    plain = scene.background.kind in ("plain", "gradient")
    fits_well = share >= (PLAIN_SHARE if plain else PATTERN_SHARE)
    far = ~_grown(covered, round(PLACE_SHARE * min(scene.width, scene.height)))
    verdict = Verdict(background=fits_well and not _has_spot(~fits & far))
    if scene.background.kind == "plain" and nearest_colour(_median(picture, free)) not in (
        scene.background.colours
    ):
        verdict = replace(verdict, background=False)
    if not scene.figures:
        return verdict
    return _judge_figures(picture, scene, verdict, backdrop, masks, fills, lines)


def _judge_figures(
    picture: Tensor,
    scene: Scene,
    verdict: Verdict,
    backdrop: Tensor,
    masks: list[Tensor],
    fills: list[Tensor],
    lines: list[Tensor],
) -> Verdict:
    inks = [_median(picture, _shrunk(fill, 2)) for fill in fills]
    line_inks = [_median(picture, _shrunk(line, 1)) for line in lines]
    owners = _owners(picture, scene, backdrop, inks, line_inks)
    strange = ~_grown(_near_any(picture, scene, backdrop, inks, line_inks), 1)
    colour = shape = outline = True
    place = _is_in_order(owners, scene)
    least = 1.0
    side = min(scene.width, scene.height)
    for i, figure in enumerate(scene.figures):
        colour &= int((strange & masks[i]).sum()) <= STRANGE_SHARE * int(masks[i].sum())
        if figure.colour_named:
            colour &= nearest_colour(inks[i]) == figure.colour
        if figure.outline is not None:
            outline &= nearest_colour(line_inks[i]) == figure.outline
        drawn, possible = owners == i, _as_every_shape(scene, i)
        ious = {name: _iou(drawn, mask) for name, mask in possible.items()}
        best = max(ious, key=lambda name: ious[name])
        meant = figure.shape if figure.shape_named else best
        least = min(least, ious[meant])
        shape &= ious[meant] > LEAST_IOU and best == meant
        place &= _apart(drawn, possible[meant]) <= PLACE_SHARE * side
    return replace(
        verdict, colour=colour, shape=shape, place=place, outline=outline, least_iou=least
    )


def judge_edit(picture: Tensor, edit: Edit) -> Verdict:
    """Compare with the target, and what should have stayed with the first reference.

    The references and the instruction leave nothing open, whatever a caption would name.
    """
    named = [replace(f, colour_named=True, shape_named=True) for f in edit.target.figures]
    verdict = judge(picture, replace(edit.target, figures=tuple(named)))
    before = render(SceneBatch.of([edit.references[0]]))[0]
    after = render(SceneBatch.of([edit.target]))[0]
    changed = (before - after).abs().amax(dim=0) > 0.02
    same = ~_grown(changed, 3)
    if not bool(same.any()):
        return verdict
    near = (picture - before).norm(dim=0) < NEAR
    share = float(near[same].float().mean())
    return replace(verdict, unchanged=share >= UNCHANGED_SHARE)


def nearest_colour(rgb: Tensor) -> str:
    """The name of the closest colour. Shapes: [3]."""
    names = list(COLOURS)
    palette = torch.tensor([COLOURS[name] for name in names])
    return names[int((palette - rgb).norm(dim=1).argmin())]


def _expected_masks(
    wanted: SceneBatch, figures: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """For each figure: what is seen of it, of its inside, of its outline. Shapes: [H, W] each."""
    masks, fills, lines = [], [], []
    hidden = torch.zeros(wanted.height, wanted.width, dtype=torch.bool)
    for i in reversed(range(figures)):
        cover, inner = (part[0] > 0.5 for part in coverage(wanted, i))
        if not bool(wanted.has_outline[0, i]):
            inner = cover
        masks.append(cover & ~hidden)
        fills.append(inner & ~hidden)
        lines.append(cover & ~inner & ~hidden)
        hidden = hidden | cover
    return masks[::-1], fills[::-1], lines[::-1]


def _owners(
    picture: Tensor, scene: Scene, backdrop: Tensor, inks: list[Tensor], line_inks: list[Tensor]
) -> Tensor:
    """The figure that each pixel belongs to by its colour, -1 for the background.

    Of figures of one colour, the one whose middle is nearer. Shapes: -> [H, W] int64.
    """
    distances = [(picture - backdrop).norm(dim=0)]
    owner = [-1]
    rows = torch.arange(scene.height)[:, None] + 0.5
    columns = torch.arange(scene.width)[None, :] + 0.5
    for i, figure in enumerate(scene.figures):
        away = torch.hypot(columns - figure.x, rows - figure.y) / max(scene.width, scene.height)
        for ink in [inks[i]] + ([line_inks[i]] if figure.outline is not None else []):
            # The distance on the screen only decides between colours that are the same.
            distances.append((picture - ink[:, None, None]).norm(dim=0) + 0.04 * away)
            owner.append(i)
    return torch.tensor(owner)[torch.stack(distances).argmin(dim=0)]


def _near_any(
    picture: Tensor, scene: Scene, backdrop: Tensor, inks: list[Tensor], line_inks: list[Tensor]
) -> Tensor:
    """Where a picture has a colour that the scene has: its background's, or a figure's."""
    colours = [backdrop, *(ink[:, None, None] for ink in inks)]
    for figure, ink in zip(scene.figures, line_inks, strict=True):
        if figure.outline is not None:
            colours.append(ink[:, None, None])
    return torch.stack([(picture - c).norm(dim=0) < NEAR for c in colours]).any(dim=0)


def _is_in_order(owners: Tensor, scene: Scene) -> bool:
    """Whether figures that overlap cover each other in the scene's order."""
    batch = SceneBatch.of([scene])
    covers = [coverage(batch, i)[0][0] > 0.5 for i in range(len(scene.figures))]
    for front in range(1, len(covers)):
        later = torch.zeros_like(covers[0])
        for cover in covers[front + 1 :]:
            later |= cover
        for cover in covers[:front]:
            both = ~_grown(~(cover & covers[front] & ~later), 2)
            if bool(both.any()) and float((owners[both] == front).float().mean()) < 0.5:
                return False
    return True


def _as_every_shape(scene: Scene, index: int) -> dict[str, Tensor]:
    """What would be seen of a figure if it had each of the shapes."""
    variants = []
    for shape in SHAPES:
        figures = list(scene.figures)
        figures[index] = replace(figures[index], shape=shape)
        variants.append(replace(scene, figures=tuple(figures)))
    batch = SceneBatch.of(variants)
    hidden = torch.zeros(len(SHAPES), scene.height, scene.width, dtype=torch.bool)
    for later in range(index + 1, len(scene.figures)):
        hidden |= coverage(batch, later)[0] > 0.5
    seen = (coverage(batch, index)[0] > 0.5) & ~hidden
    return dict(zip(SHAPES, seen, strict=True))


def _iou(a: Tensor, b: Tensor) -> float:
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 0.0


def _apart(a: Tensor, b: Tensor) -> float:
    """Between the middles of two masks, in pixels; infinite where one is empty."""
    if not bool(a.any()) or not bool(b.any()):
        return float("inf")
    return float((a.nonzero().float().mean(dim=0) - b.nonzero().float().mean(dim=0)).norm())


def _median(picture: Tensor, mask: Tensor) -> Tensor:
    """Shapes: [3, H, W], [H, W] -> [3]. Grey where the mask is empty."""
    inside = picture[:, mask]
    return inside.median(dim=1).values if inside.shape[1] else torch.full((3,), 0.5)


def _grown(mask: Tensor, pixels: int) -> Tensor:
    """By a square: first upright, then sideways, which takes a fraction of the comparisons."""
    size = 2 * pixels + 1
    upright = F.max_pool2d(mask.float()[None, None], (size, 1), 1, (pixels, 0))
    return F.max_pool2d(upright, (1, size), 1, (0, pixels))[0, 0] > 0


def _has_spot(wrong: Tensor) -> bool:
    """Whether wrong pixels fill a square somewhere."""
    pixels = max(1, round(SPOT_SHARE * min(wrong.shape)))
    return not bool(_grown(~wrong, pixels).all())


def _shrunk(mask: Tensor, pixels: int) -> Tensor:
    """The inside of a mask; the mask itself where it is too thin to have one."""
    inside = ~_grown(~mask, pixels)
    return inside if bool(inside.any()) else mask


def picture_of(scene: Scene) -> Image.Image:
    """A scene as an 8-bit picture, to be given as a reference."""
    pixels = render(SceneBatch.of([scene]))[0].permute(1, 2, 0)
    return Image.fromarray((pixels * 255).round().to(torch.uint8).numpy())


def to_pixels(image: Image.Image) -> Tensor:
    """Shapes: -> [3, H, W] in [0, 1]."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)
