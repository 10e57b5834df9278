"""Scenes, their words and their pixels fit together."""

from __future__ import annotations

import random

import pytest
import torch

from demo.batches import COMBINE, DRAW, EDIT, Examples, Kind, Prompts, example, language_sample
from demo.captions import caption
from demo.edits import random_edit
from demo.language import SHAPES, SYNONYMS
from demo.render import DISTANCES, SceneBatch, coverage, render
from demo.scenes import Figure, Scene, default_background, random_scene
from fluxcore.bundled import bundled_model


def words_for(name: str) -> tuple[str, ...]:
    return (name, *SYNONYMS.get(name, ()))


def lone(shape: str, size: int = 256, radius: float = 80.0) -> Scene:
    figure = Figure(shape, "red", (1.0, 0.0, 0.0), size / 2, size / 2, radius)
    return Scene(size, size, (figure,), default_background(("red",), random.Random(0)))


def test_the_same_seed_gives_the_same_scene_and_words() -> None:
    one, two = (random_scene(random.Random(5)) for _ in range(2))
    assert one == two
    assert caption(one, random.Random(1)) == caption(two, random.Random(1))


def test_a_caption_names_all_that_it_says_is_named() -> None:
    rng = random.Random(11)
    for _ in range(500):
        scene = random_scene(rng)
        text = caption(scene, rng).lower()
        for figure in scene.figures:
            if figure.shape_named:
                assert any(w in text for w in words_for(figure.shape)), text
            if figure.colour_named:
                assert any(w in text for w in words_for(figure.colour)), text
            if figure.size is not None:
                assert any(w in text for w in words_for(figure.size)), text
            if figure.outline is not None:
                assert any(w in text for w in words_for(figure.outline)), text
        for colour in scene.background.colours if scene.background_named else ():
            assert any(w in text for w in words_for(colour)), text


def test_held_out_scenes_are_a_twentieth_and_never_trained_on() -> None:
    rng = random.Random(2)
    assert not any(random_scene(rng).is_held_out for _ in range(200))
    assert all(random_scene(rng, held_out=True).is_held_out for _ in range(50))
    assert not any(example(EDIT, rng)[1][0].is_held_out for _ in range(100))


@pytest.mark.parametrize("kind", [DRAW, EDIT, COMBINE, Kind("draw", 384, 256)])
def test_figures_lie_inside_the_picture(kind: Kind) -> None:
    rng = random.Random(3)
    for _ in range(200):
        for scene in example(kind, rng)[1]:
            for f in scene.figures:
                assert f.radius <= f.x <= scene.width - f.radius
                assert f.radius <= f.y <= scene.height - f.radius


def test_an_edit_changes_only_what_it_speaks_of() -> None:
    rng = random.Random(4)
    seen = set()
    for _ in range(300):
        edit = random_edit(rng)
        before, after = edit.references[0], edit.target
        seen.add(edit.kind)
        if edit.kind != "background":
            assert after.background == before.background
        if edit.kind in ("recolour", "move", "resize", "reshape", "outline"):
            changed = sum(a != b for a, b in zip(before.figures, after.figures, strict=True))
            assert changed == 1
        if edit.kind == "remove":
            assert len(after.figures) == len(before.figures) - 1
            assert set(after.figures) < set(before.figures)
        if edit.kind == "add":
            assert after.figures[:-1] == before.figures
    assert seen == {
        "recolour", "move", "resize", "reshape", "outline", "background", "add", "remove",
    }  # fmt: skip


def test_every_shape_differs_clearly_from_every_other() -> None:
    covers = {s: coverage(SceneBatch.of([lone(s)]), 0)[0][0] > 0.5 for s in SHAPES}
    assert set(covers) == set(DISTANCES)
    for one in SHAPES:
        for two in SHAPES:
            if one < two:
                both, either = covers[one] & covers[two], covers[one] | covers[two]
                assert int(both.sum()) / int(either.sum()) < 0.9, (one, two)


def test_edges_are_smooth_and_colours_exact() -> None:
    picture = render(SceneBatch.of([lone("circle")]))[0]
    assert torch.equal(picture[:, 128, 128], torch.tensor([1.0, 0.0, 0.0]))
    between = (picture[1] > 0.05) & (picture[1] < 0.9)
    assert 100 < int(between.sum()) < 2000  # about the circumference of 502 pixels


def test_a_picture_of_twice_the_size_is_the_same_picture() -> None:
    for shape in SHAPES:
        small = render(SceneBatch.of([lone(shape)]))
        large = render(SceneBatch.of([lone(shape, 512, 160.0)]))
        halved = torch.nn.functional.avg_pool2d(large, 2)
        assert float((small - halved).abs().mean()) < 0.002, shape


def test_a_batch_draws_each_scene_as_alone() -> None:
    rng = random.Random(6)
    scenes = [random_scene(rng) for _ in range(6)]
    together = render(SceneBatch.of(scenes))
    for scene, picture in zip(scenes, together, strict=True):
        assert torch.allclose(render(SceneBatch.of([scene]))[0], picture, atol=1e-6)


def test_prompts_of_training_fit_and_no_known_word_falls_to_bytes() -> None:
    prompts = Prompts(bundled_model() / "tokenizer", 512)
    texts = list(language_sample(400, seed=9))
    assert all(prompts.fits(text) for text in texts)
    _, count = prompts.encode(["a large red circle in the center on a white background"])
    assert int(count) <= 12 + 12  # the template, and about a token a word


def test_batches_are_the_same_again_and_differ_between_gpus() -> None:
    tokenizer = bundled_model() / "tokenizer"
    prompts = Prompts(tokenizer, 64)
    first = Examples(tokenizer, 64, 3000, seed=1).make(1, prompts)
    again = Examples(tokenizer, 64, 3000, seed=1).make(1, prompts)
    other = Examples(tokenizer, 64, 3000, seed=1, rank=1).make(1, prompts)
    assert torch.equal(first.ids, again.ids)
    assert first.kind == other.kind
    assert not torch.equal(first.ids, other.ids)
