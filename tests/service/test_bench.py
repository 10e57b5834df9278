"""``fluxd bench``: that what it prints is of this model, whole, and adds up."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner, Result

from app.cli import cli
from app.cli.bench_chart import COLOURS, TOP_PX, draw_chart
from fluxcore import FluxPipeline
from fluxcore.bench import Rates, Spread
from fluxcore.bench.operations import Attention, Convolution, Product, Work, operations
from fluxcore.runtime.quantised import FORMATS, PLAIN_FP8

SPANS = ["tokenise", "text", "text, cached", "step 1", "step 2", "vae", "host copy", "pack"]


@pytest.fixture(autouse=True)
def clean_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("FLUXD_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["bench", *map(str, arguments)])


@pytest.fixture(scope="module")
def measured(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Any], Path]:
    """One run of the command: what people read, what programs read, and the chart."""
    chart = tmp_path_factory.mktemp("chart") / "chart.png"
    with pytest.MonkeyPatch.context() as patch:
        # Nobody reads these rates.
        patch.setattr("fluxcore.bench.rates.BATCH_S", 0.0)
        patch.setattr("fluxcore.bench.rates.BATCHES", 1)
        result = run(
            *("--model", tiny_checkpoint, "--device", "cpu", "--set", "warm_up_sizes=64x64"),
            *("--sizes", 64, "96x64", "--runs", 1, "--steps", 2, "--chart", chart),
            *("--vary", "dtype=float32,bfloat16"),
        )
    assert result.exit_code == 0, result.output
    table, _, last = result.stdout.rstrip().rpartition("\n")
    return table, json.loads(last), chart


def test_every_combination_and_size_is_measured(
    measured: tuple[str, dict[str, Any], Path],
) -> None:
    variants = measured[1]["variants"]
    assert [v["settings"] for v in variants] == [{"dtype": "float32"}, {"dtype": "bfloat16"}]
    assert [v["runtime"]["dtype"] for v in variants] == ["float32", "bfloat16"]
    for variant in variants:
        sizes = [(size["width"], size["height"]) for size in variant["sizes"]]
        assert sizes == [(64, 64), (96, 64)]
        assert variant["start"]["load_s"] > 0 and variant["start"]["warm_up_s"] > 0
        assert variant["parameters"]["transformer"] > 0 and variant["weight_bytes"] > 0
    starts = [variant["start"] for variant in variants]
    assert starts[0]["ready_s"] > starts[0]["load_s"] + starts[0]["warm_up_s"]
    assert starts[1]["ready_s"] is None


def test_times_and_floors_add_up(measured: tuple[str, dict[str, Any], Path]) -> None:
    for variant in measured[1]["variants"]:
        for size in variant["sizes"]:
            # Of one run, so that medians add up.
            ms = {name: spread["median"] for name, spread in size["spans"].items()}
            assert list(ms) == [*SPANS, "denoise", "total"]
            assert all(size["first"][name] >= 0 for name in ms)
            assert ms["denoise"] == pytest.approx(ms["step 1"] + ms["step 2"])
            parts = sum(ms[name] for name in SPANS if name != "text, cached")
            assert ms["total"] == pytest.approx(parts)
            floor, reached = size["floor"], size["reached"]
            assert list(floor) == ["text", "denoise", "vae", "host copy", "total"]
            assert floor["total"] == pytest.approx(sum(floor.values()) - floor["total"])
            for stage in ("text", "denoise", "vae"):
                assert reached[stage] == pytest.approx(floor[stage] / ms[stage])
                assert size["rates_teraflops"][stage] == pytest.approx(
                    size["teraflop"][stage] / floor[stage] * 1000
                )
            assert reached["total"] == pytest.approx(floor["total"] / (ms["total"] - ms["pack"]))
            assert size["host_peak_bytes"] > 10**7 and size["device_peak_bytes"] > 10**7
        small, large = (size["teraflop"] for size in variant["sizes"])
        assert large["vae"] == pytest.approx(1.5 * small["vae"], rel=0.1)
        assert large["text"] == small["text"]


def test_people_see_all_stages(measured: tuple[str, dict[str, Any], Path]) -> None:
    table = measured[0]
    for word in (*SPANS, "denoise", "total", "floor", "64x64", "96x64", "bfloat16", "ready"):
        assert word in table


def test_the_chart_shows_every_stage_of_every_row(
    measured: tuple[str, dict[str, Any], Path],
) -> None:
    chart = Image.open(measured[2])
    rows = {colour for _, colour in chart.crop((250, TOP_PX, 1400, chart.height)).getcolors(10**6)}
    for stage in ("text", "denoise", "vae"):
        wanted = tuple(int(COLOURS[stage][i : i + 2], 16) for i in (1, 3, 5))
        assert wanted in rows, stage
    taller = draw_chart(measured[1]["variants"])
    assert taller.height - draw_chart(measured[1]["variants"][:1]).height > 100


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--sizes", 100), "multiple of 16"),
        (("--sizes", "large"), "--sizes takes"),
        (("--vary", "dtype"), "NAME=VALUE,VALUE"),
        (("--vary", "dtype=int8"), "int8"),
        (("--vary", "colour=red"), "colour"),
        (("--chart", "chart.jpg"), ".png"),
        (("--chart", "absent/chart.png"), "no directory"),
    ],
)
def test_wrong_usage_is_said_before_anything_is_loaded(
    arguments: tuple[object, ...], says: str
) -> None:
    result = run("--model", "absent", *arguments)
    assert result.exit_code == 2
    assert says in result.stderr and result.stderr.startswith("fluxd: ")


def test_parts_are_timed_once_and_summed(tiny_pipeline: FluxPipeline) -> None:
    rates = Rates(tiny_pipeline.runtime)
    parts = (
        Product(64, 32, 48),
        Attention(4, 2, 32, 16, is_masked=True),
        Attention(1, 1, 64, 32, is_vae=True),
        Convolution(8, 16, 3, 12, 20),
        Convolution(8, 16, 1, 12, 20),
    )
    work = Work({part: 1 + number for number, part in enumerate(parts)})
    expected = sum(rates.milliseconds(part) * count for part, count in work.items())
    assert rates.floor_ms(work) == expected > 0
    assert rates.teraflops(work) == pytest.approx(operations(work) / expected / 1e9)


def test_blocks_in_eight_bits_have_a_floor_of_their_own(
    tiny_pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []

    def product(*factors: Tensor) -> Tensor:
        shapes.append((factors[0].shape, factors[2].shape, factors[0].dtype))
        return PLAIN_FP8.product(*factors)  # type: ignore[arg-type]

    monkeypatch.setitem(FORMATS, "fp8", replace(PLAIN_FP8, product=product))
    rates = Rates(replace(tiny_pipeline.runtime, precision="fp8"))
    for part in (Product(8, 32, 48), Product(8, 40, 48, is_block=True)):
        rates.milliseconds(part)
    assert shapes == []
    rates.milliseconds(Product(8, 32, 48, is_block=True))
    assert set(shapes) == {((8, 32), (48, 32), PLAIN_FP8.dtype)}
    shapes.clear()
    rates.milliseconds(Product(8, 64, 48, is_layer=True))
    assert set(shapes) == {((8, 64), (48, 64), PLAIN_FP8.dtype)}


def test_the_encoder_s_layers_have_that_floor_only_where_they_are_in_eight_bits(
    tiny_pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse = replace(PLAIN_FP8, product=lambda *_: pytest.fail("multiplied in eight bits"))
    monkeypatch.setitem(FORMATS, "fp8", refuse)
    balanced = replace(tiny_pipeline.runtime, precision="fp8", residency="balanced")
    Rates(balanced).milliseconds(Product(8, 32, 48, is_layer=True))


def test_a_spread_is_of_all_values() -> None:
    spread = Spread.of([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (spread.median, spread.least, spread.most) == (3.0, 1.0, 5.0)
    assert 4.0 < spread.p90 <= 5.0
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 7.0)
