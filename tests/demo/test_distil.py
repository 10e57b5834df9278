"""The distillation's own parts: the teacher's pool and the straight line."""

from __future__ import annotations

import argparse

import pytest
import torch

from demo.batches import Prompts
from demo.distil import StraightLoss, draw_pool
from demo.learner import Learner
from demo.run import Run, load
from demo.steps import Lesson
from fluxcore.bundled import bundled_model
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


@pytest.fixture(scope="module")
def pool(learner: Learner) -> list[Lesson]:
    prompts = Prompts(bundled_model() / "tokenizer", 64)
    examples = Few(bundled_model() / "tokenizer", 64, 0, seed=3)
    batches = iter([examples.make(0, prompts)])
    asked = argparse.Namespace(pool=2, pool_seconds=1e9, teacher_steps=2, guidance=1.0)
    torch.manual_seed(5)
    return draw_pool(learner, batches, Run(CPU, rank=0, world=1), prompts, asked)


def test_the_pool_holds_what_the_teacher_draws_from_the_noise(
    learner: Learner, pool: list[Lesson]
) -> None:
    (lesson,) = pool
    assert lesson.noise is not None
    assert lesson.batch.scenes == ()
    again = learner.draw(
        lesson.noise.float(), (), lesson.batch.ids, lesson.batch.count, lesson.batch.kind, 2
    )
    distance = (again - lesson.clean.float()).norm() / again.norm()
    assert float(distance) < 0.03  # the pool is kept in bfloat16


def test_a_model_that_goes_straight_already_has_little_to_learn(
    learner: Learner, pool: list[Lesson]
) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        own = float(StraightLoss()(learner, pool[0]))
        fresh = float(StraightLoss()(Learner(bundled_model(), CPU), pool[0]))
    assert own < 0.2 < 1.0 < fresh
