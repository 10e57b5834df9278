"""The judge passes what is right, and fails each thing that can be wrong."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch

from demo.captions import caption
from demo.exam import Tally, group_of, held_out_captions, held_out_edits
from demo.judge import (
    Verdict,
    judge,
    judge_edit,
    nearest_colour,
    picture_of,
    to_pixels,
)
from demo.language import COLOURS
from demo.scenes import Background, Figure, Scene, place_xy


def scene(**given: object) -> Scene:
    figure = Figure("star", "red", COLOURS["red"], 128, 128, 60.0)
    back = Background("plain", ("white",), (COLOURS["white"],))
    figure_fields = {k: v for k, v in given.items() if k != "background"}
    return Scene(
        256,
        256,
        (replace(figure, **figure_fields),),
        given.get("background", back),  # type: ignore[arg-type]
    )


def verdict_on(drawn: Scene, wanted: Scene) -> Verdict:
    return judge(to_pixels(picture_of(drawn)), wanted)


def test_ideal_pictures_are_right() -> None:
    for _, wanted in held_out_captions(40):
        assert verdict_on(wanted, wanted).is_right
    for edit in held_out_edits(30):
        assert judge_edit(to_pixels(picture_of(edit.target)), edit).is_right


def test_pictures_of_other_captions_are_wrong() -> None:
    scenes = [wanted for _, wanted in held_out_captions(30)]
    for wanted, other in itertools.pairwise(scenes):
        assert not verdict_on(other, wanted).is_right


@pytest.mark.parametrize(
    ("wrong", "criterion"),
    [
        ({"colour": "orange", "shade": COLOURS["orange"]}, "colour"),
        ({"shape": "pentagon"}, "shape"),
        ({"radius": 45.0}, "shape"),
        ({"x": 100.0}, "place"),
        ({"background": Background("plain", ("grey",), (COLOURS["grey"],))}, "background"),
        (
            {
                "background": Background(
                    "stripes", ("white", "grey"), (COLOURS["white"], COLOURS["grey"])
                )
            },
            "background",
        ),
    ],
)
def test_one_planted_fault_is_found(wrong: dict[str, object], criterion: str) -> None:
    assert verdict_on(scene(), scene()).is_right
    assert not getattr(verdict_on(scene(**wrong), scene()), criterion)


def test_a_missing_outline_is_found() -> None:
    wanted = scene(outline="black", outline_shade=COLOURS["black"])
    assert verdict_on(wanted, wanted).is_right
    assert not verdict_on(scene(), wanted).outline


def test_a_noisy_or_blank_picture_is_wrong() -> None:
    generator = torch.Generator().manual_seed(0)
    assert not judge(torch.rand(3, 256, 256, generator=generator), scene()).is_right
    assert not judge(torch.full((3, 256, 256), 0.98), scene()).is_right


def test_a_second_figure_that_nobody_asked_for_is_wrong() -> None:
    x, y = place_xy("top left", 25.0, 256, 256)
    extra = Figure("circle", "red", COLOURS["red"], x, y, 25.0)
    crowded = replace(scene(), figures=(*scene().figures, extra))
    assert not verdict_on(crowded, scene()).is_right


def test_a_small_figure_of_another_colour_is_wrong_too() -> None:
    extra = Figure("triangle", "yellow", COLOURS["yellow"], 35.0, 35.0, 25.0)
    crowded = replace(scene(), figures=(*scene().figures, extra))
    assert not verdict_on(crowded, scene()).background


def test_an_outline_that_nobody_asked_for_is_wrong() -> None:
    assert not verdict_on(scene(outline="brown", outline_shade=COLOURS["brown"]), scene()).colour


def test_a_figure_of_two_colours_is_wrong() -> None:
    picture = to_pixels(picture_of(scene()))
    other = to_pixels(picture_of(scene(colour="orange", shade=COLOURS["orange"])))
    picture[:, :, 130:] = other[:, :, 130:]
    assert not judge(picture, scene()).colour


def test_a_blurred_figure_is_wrong() -> None:
    picture = to_pixels(picture_of(scene()))
    for _ in range(3):
        picture = torch.nn.functional.avg_pool2d(picture, 13, 1, 6, count_include_pad=False)
    assert not judge(picture, scene()).is_right


def test_figures_behind_each_other_have_an_order() -> None:
    (figure,) = scene().figures
    back = replace(figure, shape="square", x=150.0, y=106.0)
    front = replace(figure, shape="circle", colour="blue", shade=COLOURS["blue"], x=106.0, y=150.0)
    wanted = replace(scene(), figures=(back, front), relation="behind")
    assert verdict_on(wanted, wanted).is_right
    assert not verdict_on(replace(wanted, figures=(front, back)), wanted).place


def test_an_edit_that_was_not_made_is_wrong() -> None:
    for edit in held_out_edits(30):
        assert not judge_edit(to_pixels(picture_of(edit.references[0])), edit).is_right


def test_an_edit_leaves_no_colour_open() -> None:
    """Also that of a figure whose colour a caption would not name."""
    edit = next(e for e in held_out_edits(60) if e.kind == "recolour")
    (figure, *others) = edit.target.figures
    loose = replace(edit.target, figures=(replace(figure, colour_named=False), *others))
    wrong = next(c for c in COLOURS if c not in {f.colour for f in edit.target.figures})
    drawn = replace(loose, figures=(replace(figure, colour=wrong, shade=COLOURS[wrong]), *others))
    verdict = judge_edit(to_pixels(picture_of(drawn)), replace(edit, target=loose))
    assert not verdict.colour


def test_what_an_edit_does_not_speak_of_must_stay() -> None:
    edit = next(e for e in held_out_edits(60) if e.kind == "recolour")
    assert judge_edit(to_pixels(picture_of(edit.target)), edit).unchanged
    shifted = to_pixels(picture_of(edit.target)).roll(20, dims=2)
    assert not judge_edit(shifted, edit).is_right


def test_an_unnamed_colour_may_be_any() -> None:
    wanted = scene(colour_named=False)
    assert verdict_on(scene(colour="blue", shade=COLOURS["blue"]), wanted).is_right


def test_names_of_colours_and_the_table() -> None:
    assert all(nearest_colour(torch.tensor(rgb)) == name for name, rgb in COLOURS.items())
    tally = Tally.empty()
    tally.add("one object", Verdict())
    tally.add("one object", Verdict(shape=False))
    assert tally.share("one object") == 0.5
    assert "| one object | 2 | 50.0 % | 0 / 1 / 0 / 0 / 0 / 0 |" in tally.table()


def test_the_held_out_captions_are_always_the_same() -> None:
    assert [t for t, _ in held_out_captions(5)] == [t for t, _ in held_out_captions(5)]
    wanted = next(w for _, w in held_out_captions(50) if group_of(w) == "one object")
    assert caption(wanted, random.Random(0)) == caption(wanted, random.Random(0))
