"""What slices are thought to cost, and what is left of a job."""

from __future__ import annotations

import pytest
from PIL import Image

from app.engine.costs import CostModel, Unit, WorkLeft
from fluxcore.params import GenerationParams
from tests.service.fake_pipeline import FakePipeline, slices_of
from tests.service.simulated_device import make


def test_costs_come_from_measurements_and_are_scaled_to_other_sizes() -> None:
    costs = CostModel()
    small, large = Unit("denoise", 768), Unit("denoise", 1536)
    guess_s = costs.estimate_s(large)
    assert guess_s > costs.estimate_s(small) > 0
    costs.observe(small, 0.1)
    assert costs.estimate_s(small) == 0.1
    assert 0.2 <= costs.estimate_s(large) <= 0.25
    assert costs.estimate_s(large._replace(times=2)) == 2 * costs.estimate_s(large)
    for _ in range(30):
        costs.observe(large, 0.5)
    assert costs.estimate_s(large) == pytest.approx(0.5, rel=0.11)
    assert costs.estimate_s(small) == 0.1


def test_a_warm_up_sets_the_first_guesses() -> None:
    costs = CostModel()
    work = [Unit("text", 1), Unit("denoise", 1536), Unit("decode", 512 * 512)]
    costs.calibrate(512, 512, 0.02)
    assert costs.is_measured
    assert sum(costs.estimate_s(unit) for unit in work) == pytest.approx(0.02)
    costs.calibrate(512, 512, 0.04)
    assert sum(costs.estimate_s(unit) for unit in work) == pytest.approx(0.04)


def test_the_first_measured_stages_scale_the_guesses_of_the_others() -> None:
    costs, fresh = CostModel(), CostModel()
    step, picture = Unit("denoise", 1536), Unit("decode", 512 * 512)
    costs.observe(Unit("text", 1), 0.01 * fresh.estimate_s(Unit("text", 1)))
    assert costs.estimate_s(step) == pytest.approx(0.01 * fresh.estimate_s(step))
    costs.observe(step, 0.01 * fresh.estimate_s(step))
    assert costs.estimate_s(picture) == pytest.approx(0.01 * fresh.estimate_s(picture))


def test_a_single_slow_slice_does_not_stay_in_the_estimate() -> None:
    costs, unit = CostModel(), Unit("denoise", 1536)
    costs.observe(unit, 30.0)
    for _ in range(12):
        costs.observe(unit, 1.0)
    assert costs.estimate_s(unit) < 1.5


def test_the_work_left_counts_every_slice() -> None:
    job = make(side=512, steps=6, n=2)
    left = WorkLeft(job.params, job.resolved, previews=2)
    costs = CostModel()
    per_image = 6 * costs.estimate_s(left.unit("denoise"))
    decodes = 2 * (1 + 2) * costs.estimate_s(left.unit("decode"))
    whole = costs.estimate_s(left.unit("text")) + 2 * per_image + decodes
    assert left.estimate_s(costs) == pytest.approx(whole)
    assert left.pixels == 2 * 512 * 512
    for done in slices_of(job.resolved):
        left.done(done.stage)
    assert left.estimate_s(costs) == pytest.approx(4 * costs.estimate_s(left.unit("decode")))


def test_each_reference_is_a_slice_of_its_own_size() -> None:
    sizes = [(512, 512), (256, 256)]
    params = GenerationParams(
        prompt="x", steps=1, seed=0, references=tuple(Image.new("RGB", size) for size in sizes)
    )
    left = WorkLeft(params, FakePipeline().prepare(params).params, previews=0)
    costs = CostModel()
    before_s = left.estimate_s(costs)
    assert left.next_unit.stage == "text"
    left.done("text")
    for tokens in (1024, 256):
        unit = left.next_unit
        assert unit == left.unit("references") == Unit("references", tokens)
        rest_s = left.estimate_s(costs)
        left.done("references")
        assert left.estimate_s(costs) == pytest.approx(rest_s - costs.estimate_s(unit))
    assert left.next_unit.stage == "denoise"
    assert left.estimate_s(costs) < before_s
