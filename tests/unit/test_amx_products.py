"""Products in the tiles of AMX: as PyTorch's, for every size, and only where they can be used."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxcore import FluxPipeline, GenerationParams
from fluxcore.kernels import plain_attention
from fluxcore.runtime import amx_products as module
from fluxcore.runtime import choose_runtime
from fluxcore.runtime.amx_products import AmxLinear, AmxProducts, amx_products, fits, pack_layer
from fluxcore.runtime.quantised import INT8, Precision, plain_product

HAS_AMX = module._instructions() >= module.INSTRUCTIONS and shutil.which("g++") is not None
needs_amx = pytest.mark.skipif(not HAS_AMX, reason="the processor has no AMX, or there is no g++")
LATENTS_APART = {"bf16": 0.03, "int8": 0.06}
"""Most; 0.008 and 0.015 were measured."""

SIZES = [
    # rows, inner, columns: less than a tile, odd rows, a slice that is cut, a group that is cut,
    # several blocks, and more than one slice and group of all.
    (1, 64, 32),
    (33, 64, 32),
    (4, 320, 96),
    (40, 576, 288),
    (800, 128, 320),
    (257, 1088, 544),
]


@pytest.fixture(scope="module")
def products() -> AmxProducts:
    found = amx_products()
    assert found is not None, "the processor has AMX and there is g++, but no products: see the log"
    return found


@pytest.fixture
def built_anew() -> Iterator[None]:
    amx_products.cache_clear()
    yield
    amx_products.cache_clear()


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).bfloat16()


def distance(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


@needs_amx
@pytest.mark.parametrize(("rows", "inner", "columns"), SIZES)
def test_bf16_is_the_exact_product_rounded_once(
    rows: int, inner: int, columns: int, products: AmxProducts
) -> None:
    x, weight = random(rows, inner), random(columns, inner)
    made = products.linear(x, products.packed(weight))
    exact = x.float() @ weight.float().t()
    # 3.2e-3 measured of few numbers and 1.7e-3 of many, and for F.linear the same.
    assert distance(made, exact) < 5e-3
    assert distance(made, F.linear(x, weight)) < 5e-4  # 5e-5 measured


@needs_amx
@pytest.mark.parametrize(("rows", "inner", "columns"), SIZES)
def test_int8_is_the_plain_product_of_rounded_rows(
    rows: int, inner: int, columns: int, products: AmxProducts
) -> None:
    x, weight = random(rows, inner), random(columns, inner)
    narrow, scales = INT8.round_rows(weight)
    made = products.int8_linear(x, products.packed(narrow), scales.flatten())
    plain = plain_product(*INT8.round_rows(x), narrow, scales.t(), torch.bfloat16)
    # 8e-4 measured: a number just between two is rounded the other way when a scale is in float32.
    assert distance(made, plain) < 5e-3


@needs_amx
def test_int8_takes_rows_of_zeros_and_of_great_numbers(products: AmxProducts) -> None:
    x, weight = random(3, 64), random(32, 64)
    x[0], x[1] = 0, x[1] * 1e10
    narrow, scales = INT8.round_rows(weight)
    made = products.int8_linear(x, products.packed(narrow), scales.flatten())
    assert not made[0].any()
    assert distance(made[1], x[1].float() @ weight.float().t()) < 0.02


@needs_amx
def test_rows_may_lie_apart_and_in_more_dimensions(products: AmxProducts) -> None:
    whole, weight = random(2, 50, 192), random(64, 128)
    packed = products.packed(weight)
    for x in (whole[..., :128], whole[:1, 7:31, 64:], whole[0, 3, :128], whole[:, :0, :128]):
        made = products.linear(x, packed)
        assert made.shape == (*x.shape[:-1], 64)
        assert torch.equal(made, products.linear(x.contiguous(), packed))
    turned = random(128, 40).t()  # numbers of a row lie apart
    assert torch.equal(
        products.linear(turned, packed), products.linear(turned.contiguous(), packed)
    )


@needs_amx
def test_other_rows_and_threads_change_no_bit(products: AmxProducts) -> None:
    x, packed = random(700, 640), products.packed(random(288, 640))
    whole = products.linear(x, packed)
    for rows in (slice(0, 1), slice(31, 33), slice(100, 500)):
        assert torch.equal(products.linear(x[rows], packed), whole[rows])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(products.linear(x, packed), whole)
    finally:
        torch.set_num_threads(threads)


@needs_amx
@pytest.mark.parametrize(
    ("heads", "queries", "tokens", "width"),
    [(1, 1, 1, 32), (3, 45, 77, 64), (24, 32, 96, 128), (2, 300, 300, 128), (5, 64, 1030, 256)],
)
def test_attention_is_as_exact_as_pytorch_s(
    heads: int, queries: int, tokens: int, width: int, products: AmxProducts
) -> None:
    q = random(2, queries, heads, width).transpose(1, 2) * 3
    k, v = random(2, heads, tokens, width), random(2, heads, tokens, width + 64)[..., 64:]
    made = products.attention(q, k, v, None)
    exact = plain_attention(q.float(), k.float(), v.float(), None)
    assert made.shape == exact.shape
    assert distance(made, exact) < 6e-3  # 1.9e-3 to 3e-3 measured, and for PyTorch's the same
    assert torch.equal(products.attention(q[1:], k[1:], v[1:], None), made[1:])


@needs_amx
def test_attention_of_keys_far_apart_and_of_nonsense(products: AmxProducts) -> None:
    q, k, v = (random(1, 2, 70, 64) for _ in "qkv")
    q[..., 5, :] *= 1000  # one key takes all the weight
    exact = plain_attention(q.float(), k.float(), v.float(), None)
    assert distance(products.attention(q, k, v, None), exact) < 6e-3
    v[0, 1, 3, 0] = torch.nan
    made = products.attention(q, k, v, None)
    assert made[0, 1, :, 0].isnan().all()
    assert made[0, 0].isfinite().all()
    v[0, 1, 3, 0] = 1
    for name, spoilt in (("q", q), ("k", k)):
        for nonsense in (torch.nan, torch.inf, -torch.inf):
            before, spoilt[0, 0, 5, 2] = spoilt[0, 0, 5, 2].clone(), nonsense
            ours, plain = (form(q, k, v, None) for form in (products.attention, plain_attention))
            assert not (ours.isfinite() & ~plain.isfinite()).any(), (name, nonsense)
            spoilt[0, 0, 5, 2] = before


@needs_amx
def test_masks_and_grouped_heads_are_pytorch_s(products: AmxProducts) -> None:
    q, k, v = random(1, 4, 40, 64), random(1, 2, 40, 64), random(1, 2, 40, 64)
    mask = torch.ones(40, 40, dtype=torch.bool).tril()[None, None]
    none = k[:, :, :0]
    for grouped, seen in (((k, v), None), ((k, v), mask), ((q, q), mask), ((none, none), None)):
        made = products.attention(q, *grouped, seen)
        assert torch.equal(made, plain_attention(q, *grouped, seen))


@needs_amx
def test_layers_whose_sides_tiles_divide_are_replaced(products: AmxProducts) -> None:
    network = nn.Sequential(
        nn.Linear(64, 32, bias=False), nn.Linear(32, 32, bias=False), nn.LayerNorm(32)
    ).bfloat16()
    network.requires_grad_(False)
    x = random(5, 64)
    before = network[0](x)
    for name, _ in list(network.named_parameters()):
        pack_layer(network, name, products)
    assert isinstance(network[0], AmxLinear)
    assert type(network[1]) is nn.Linear, "32 numbers are half a step in int8"
    assert distance(network[0](x), before) < 5e-4
    assert torch.equal(copy.deepcopy(network)[0](x), network[0](x))
    with pytest.raises(TypeError, match="plain"):
        network.state_dict()
    with pytest.raises(TypeError, match="plain"):
        network[0].load_state_dict({"weight": torch.zeros(32, 64)})


@needs_amx
def test_weights_are_packed_where_they_lie(products: AmxProducts) -> None:
    weight = random(32 * 21, 640)  # two groups and a part
    packed = products.packed(weight)
    products.pack(weight)
    assert torch.equal(weight, packed)
    with pytest.raises(AssertionError, match="no gradients"):
        products.linear(random(3, 640).requires_grad_(), packed)


def test_a_layer_with_a_bias_stays() -> None:
    layer = nn.Sequential(nn.Linear(64, 32)).bfloat16()
    pack_layer(layer, "0.weight", products=None)  # type: ignore[arg-type] # never asked
    assert type(layer[0]) is nn.Linear


def test_matrices_that_tiles_divide() -> None:
    assert fits(torch.empty(32, 64))
    assert not fits(torch.empty(31, 64))
    assert not fits(torch.empty(32, 96))
    assert not fits(torch.empty(64))
    assert not fits(torch.empty(32, 0))


@needs_amx
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_the_bundled_model_draws_the_same_with_and_without(
    precision: Precision, products: AmxProducts
) -> None:
    latents = {}
    for kernels in ("plain", "auto"):
        pipe = FluxPipeline.load(
            device="cpu", dtype="bfloat16", precision=precision, kernels=kernels
        )
        assert pipe.runtime.describe()["kernels"] == ("fused" if kernels == "auto" else "plain")
        block, layer = pipe.transformer.single_blocks[0], pipe.text_encoder.layers[0]
        if precision == "int8":
            assert (block.out.format.linear is None) == (kernels == "plain")
        else:
            assert isinstance(block.out, AmxLinear) == (kernels == "auto")
        assert isinstance(layer.down, AmxLinear) == (kernels == "auto")
        assert (block.attention is plain_attention) == (kernels == "plain")
        params = GenerationParams(prompt="a red circle", width=128, height=128, steps=4, seed=1)
        latents[kernels] = [step.latents for step in pipe.denoise(pipe.prepare(params))][-1]
    assert 0 < distance(latents["auto"], latents["plain"]) < LATENTS_APART[precision]


def test_only_a_cpu_in_bfloat16_that_compiles_nothing_gets_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = object()
    monkeypatch.setattr("fluxcore.runtime.choosing.amx_products", lambda: made)
    assert choose_runtime("cpu", "bfloat16").amx is made
    assert choose_runtime("cpu", "bfloat16").describe()["kernels"] == "fused"
    assert choose_runtime("cpu", "bfloat16", kernels="fused").amx is made
    assert choose_runtime("cpu", "bfloat16", kernels="plain").amx is None
    assert choose_runtime("cpu", "float32").amx is None
    monkeypatch.setattr("fluxcore.runtime.choosing.compiles", lambda kind, asked: True)
    assert choose_runtime("cpu", "bfloat16", compile_networks="on").amx is None


def test_without_amx_nothing_is_built_and_nothing_said(
    built_anew: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_instructions", lambda: module.INSTRUCTIONS - {"amx_int8"})
    monkeypatch.setattr(module, "_built", lambda *args: pytest.fail("it was built"))
    assert amx_products() is None
    assert not caplog.records


def test_the_processor_s_instructions_are_read_where_there_are_some() -> None:
    assert torch.cpu._is_amx_tile_supported() == ("amx_tile" in module._instructions())


@pytest.fixture
def with_amx(built_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Linux machine with AMX, as far as the module can tell."""
    monkeypatch.setattr(module, "_instructions", lambda: module.INSTRUCTIONS)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: True)
    monkeypatch.setattr("platform.system", lambda: "Linux")


def test_without_a_compiler_the_log_says_what_to_install(
    with_amx: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    assert amx_products() is None
    assert "install g++ 11 or newer" in caplog.text


def test_a_system_that_keeps_the_registers_is_told_of(
    with_amx: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/g++")
    assert amx_products() is None
    assert "use Linux 5.16 or newer" in caplog.text


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo 'x.cpp: error: unrecognized option' >&2; exit 1", "error: unrecognized option"),
        ("exit 3", "no message"),
        ("true", "set TMPDIR"),  # it makes no file
    ],
)
def test_a_compiler_that_cannot_is_told_of_with_its_error(
    script: str,
    told: str,
    with_amx: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert amx_products() is None
    assert told in caplog.text
