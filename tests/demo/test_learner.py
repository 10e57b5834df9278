"""Training sees the networks as drawing does."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from demo.batches import (
    DRAW,
    EDIT,
    EDITED_SIZES,
    MIXES,
    OTHER_SIZES,
    Kind,
    Prompts,
    kind_of,
)
from demo.judge import picture_of, to_pixels
from demo.learner import Learner
from demo.optimisers import Muon, make_optimisers
from demo.render import SceneBatch
from demo.run import Curve, Run, load, save
from demo.scenes import random_scene
from demo.steps import Lesson, Steps
from demo.train import arguments_of, flow_loss
from fluxcore import FluxPipeline, GenerationParams
from fluxcore.bundled import bundled_model
from fluxcore.errors import CheckpointError
from fluxcore.pipeline.latents import draw_noise
from tests.demo.conftest import Few

CPU = torch.device("cpu")

# Weights stay in float32 while autocast computes in bfloat16: a slower norm on the CPU, no fault.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")


@pytest.fixture(scope="module")
def learner() -> Learner:
    learner = Learner(bundled_model(), CPU)
    transformer, text_encoder = learner.networks()
    load(bundled_model(), transformer=transformer, text_encoder=text_encoder)
    return learner


def test_a_batch_draws_what_the_pipeline_draws(learner: Learner) -> None:
    """Same noise, same prompts, padded to 512 tokens; bfloat16 against float32."""
    prompts = ["a red circle", "a large blue star in the top left on a yellow background"]
    pipe = FluxPipeline.load(bundled_model(), device="cpu", dtype="float32")
    ids, count = Prompts(bundled_model() / "tokenizer", 512).encode(prompts)
    noise = torch.cat([draw_noise(seed, learner.channels, (16, 16)) for seed in (3, 4)])
    together = learner.decode(learner.draw(noise, (), ids, count, DRAW, 4), DRAW)
    for picture, prompt, seed in zip(together, prompts, (3, 4), strict=True):
        params = GenerationParams(prompt=prompt, width=256, height=256, seed=seed)
        alone = to_pixels(pipe.generate(params).images[0])
        assert float((picture - alone).abs().mean()) < 0.01


def test_references_reach_the_learner_as_they_reach_the_pipeline(learner: Learner) -> None:
    scene = random_scene(random.Random(8))
    pipe = FluxPipeline.load(bundled_model(), device="cpu", dtype="float32")
    params = GenerationParams(prompt="x", references=(picture_of(scene),), seed=0)
    theirs = pipe.encode_references(pipe.prepare(params)).tokens
    ours = learner._encoded(to_pixels(picture_of(scene))[None])
    assert theirs is not None
    assert float((ours.float() - theirs).norm() / theirs.norm()) < 0.03  # bfloat16


def test_the_loss_is_small_on_the_trained_and_large_on_fresh_networks(learner: Learner) -> None:
    examples = Few(bundled_model() / "tokenizer", 512, 0, seed=3)
    batch = examples.make(1, Prompts(bundled_model() / "tokenizer", 512))
    assert batch.kind == EDIT
    clean, *references = learner.latents(batch)
    lesson = Lesson(batch, clean, tuple(references))
    torch.manual_seed(0)
    with torch.no_grad():
        trained = float(flow_loss(learner, lesson))
        fresh = float(flow_loss(Learner(bundled_model(), CPU), lesson))
    assert trained < 0.3 < 1.5 < fresh


def test_a_step_of_training_moves_every_parameter_and_helps(tmp_path: Path) -> None:
    """Four steps on one small batch, from a fresh start."""
    torch.manual_seed(1)
    learner = Learner(bundled_model(), CPU)
    networks = learner.networks()
    examples = Few(bundled_model() / "tokenizer", 64, 0, seed=3)
    batch = examples.make(0, Prompts(bundled_model() / "tokenizer", 64))
    clean, *references = learner.latents(batch)
    lesson = Lesson(batch, clean, tuple(references))
    arguments = arguments_of("").parse_args(["--no-compile", "--warm-up", "1", "--steps", "4"])
    run = Run(CPU, rank=0, world=1)
    steps = Steps(learner, run, flow_loss, Curve(tmp_path / "curve.jsonl", run), arguments)
    losses = []
    for seed in (5, 5, 5, 5):  # the same noise, so that losses compare
        torch.manual_seed(seed)
        steps.take(lesson)
        torch.manual_seed(seed)
        with torch.no_grad():
            losses.append(float(flow_loss(learner, lesson)))
    assert losses[-1] < losses[0]
    assert steps.step == 4
    idle = [n for m in networks for n, p in m.named_parameters() if not p.grad.any()]
    assert idle == []
    first = json.loads((tmp_path / "curve.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0 and first["examples"] == len(clean) and first["loss_draw"] > 0


def test_other_sizes_come_in_turn_and_some_with_a_reference() -> None:
    kinds = Counter(kind_of(step, MIXES["hard"]) for step in range(20 * 12))
    sizes = {(kind.width, kind.height) for kind in kinds}
    assert sizes == {(256, 256), *OTHER_SIZES}
    assert {kind for kind in kinds if kind.task == "edit"} == {
        EDIT,
        *(Kind("edit", *size) for size in EDITED_SIZES),
    }


def test_muon_takes_the_matrices_of_blocks_and_nothing_else(learner: Learner) -> None:
    muon, other = make_optimisers(learner.networks(), 1e-3, 1e-3)
    assert isinstance(muon, Muon)
    assert all(p.ndim == 2 for group in muon.param_groups for p in group["params"])
    everything = sum(p.numel() for m in learner.networks() for p in m.parameters())
    taken = [p for o in (muon, other) for group in o.param_groups for p in group["params"]]
    assert sum(p.numel() for p in taken) == everything


def test_networks_are_saved_and_gone_on_from(
    learner: Learner, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("run") / "networks.pt"
    save(path, transformer=learner.transformer)
    fresh = Learner(bundled_model(), CPU)
    load(path, transformer=fresh.transformer)
    for (name, a), b in zip(
        fresh.transformer.named_parameters(), learner.transformer.parameters(), strict=True
    ):
        assert torch.equal(a, b), name  # what was loaded is bfloat16 already


def test_a_file_that_cannot_be_gone_on_from_is_named(learner: Learner, tmp_path: Path) -> None:
    save(tmp_path / "vae.pt", vae=learner.vae)
    (tmp_path / "text.pt").write_text("not weights")
    for name, message in (
        ("vae.pt", "must hold transformer; it holds vae"),
        ("text.pt", "not a file that training wrote"),
        ("none.pt", "is not there"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / name, transformer=learner.transformer)


def test_a_batch_of_scenes_of_two_sizes_is_refused() -> None:
    rng = random.Random(1)
    scenes = [random_scene(rng, 256, 256), random_scene(rng, 128, 128)]
    with pytest.raises(ValueError, match="one size"):
        SceneBatch.of(scenes)
