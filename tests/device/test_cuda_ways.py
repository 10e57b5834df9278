"""CUDA graphs, compiled networks, fp8 and the GPU's own attention, each against the plain form."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fluxcore import FluxPipeline, GenerationParams
from fluxcore.kernels import plain_attention
from fluxcore.pipeline import DenoiseStep, GenerationResult
from fluxcore.pipeline.denoise import step_together
from fluxcore.pipeline.encoded import NO_REFERENCES, EncodedJob
from fluxcore.pipeline.latents import draw_noise
from fluxcore.pipeline.run import Run
from fluxcore.residues import filtered, strip_height
from fluxcore.runtime import choose_runtime
from fluxcore.runtime.attention import SCORED_ROWS, cudnn_attention, wide_attention
from fluxcore.runtime.graphs import CudaRecorder, Graphs
from fluxcore.runtime.quantised import FP8, plain_product, plain_unscaled

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

PICTURE = Image.effect_noise((96, 80), 60).convert("RGB")
MASK = Image.linear_gradient("L").resize(PICTURE.size)
REQUESTS = {
    "text": GenerationParams(prompt="a red fox", width=128, height=96, steps=3, seed=5),
    "other size": GenerationParams(prompt="a red fox", width=64, height=192, steps=3, seed=5),
    "references": GenerationParams(prompt="the same", references=(PICTURE, PICTURE), seed=6),
    "inpaint": GenerationParams(prompt="a star", references=(PICTURE,), mask=MASK, seed=7),
}


def _pipeline(
    checkpoint: Path, *, compile_networks: str, cuda_graphs: int, kernels: str = "fused"
) -> FluxPipeline:
    return FluxPipeline.load(
        checkpoint,
        "cuda",
        kernels=kernels,
        compile_networks=compile_networks,
        cuda_graphs=cuda_graphs,
    )


@pytest.fixture(scope="module")
def plain(tiny_checkpoint: Path) -> FluxPipeline:
    return _pipeline(tiny_checkpoint, compile_networks="off", cuda_graphs=0)


@pytest.fixture(scope="module")
def compiled(tiny_checkpoint: Path) -> FluxPipeline:
    return _pipeline(tiny_checkpoint, compile_networks="on", cuda_graphs=0)


def _relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return float((a - b).norm() / b.norm())


def _latents(pipe: FluxPipeline, params: GenerationParams) -> Tensor:
    return [step.latents for step in pipe.denoise(pipe.prepare(params))][-1]


def _bytes(pipe: FluxPipeline, params: GenerationParams) -> bytes:
    pipe.conditioning_cache.clear()
    return pipe.generate(params).images[0].tobytes()


def _result(run: Run) -> GenerationResult:
    while True:
        try:
            next(run)
        except StopIteration as end:
            result: GenerationResult = end.value
            return result


def test_noise_is_the_same_in_pinned_memory() -> None:
    pinned = draw_noise(7, 128, (16, 16), pinned=True)
    assert pinned.is_pinned()
    assert torch.equal(pinned, draw_noise(7, 128, (16, 16)))


def test_graphs_change_no_bit(plain: FluxPipeline, tiny_checkpoint: Path) -> None:
    graphed = _pipeline(tiny_checkpoint, compile_networks="off", cuda_graphs=24)
    for name, params in REQUESTS.items():
        expected = _bytes(plain, params)
        for use in ("recorded", "played", "played again"):
            assert _bytes(graphed, params) == expected, f"{name}, {use}"
    assert graphed.runtime.graphs is not None
    assert len(graphed.runtime.graphs) > 4


def test_what_is_queued_waits_for_nothing(tiny_checkpoint: Path) -> None:
    """From the text on: noise, steps and decoding are queued while the device is busy."""
    pipe = _pipeline(tiny_checkpoint, compile_networks="off", cuda_graphs=24)
    params = REQUESTS["text"]
    expected = [pipe.generate(params).pictures[0].pixels for _ in "12"][1]
    job = pipe.prepare(params)
    encoded = EncodedJob(*pipe.encode_text(job), NO_REFERENCES)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            picture = pipe.denoising(job, 0, encoded)
            while not picture.is_over:
                (step,) = step_together((picture,), pipe.joint.velocities)
            decoding = pipe.begin_decode(step.latents, params.width, params.height)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert np.array_equal(decoding().pixels, expected)


@pytest.mark.parametrize("known", ["new", "new size", "in memory", "on disk"])
def test_a_job_that_begins_behind_another_waits_for_nothing(
    tiny_checkpoint: Path, tmp_path: Path, known: str
) -> None:
    pipe = FluxPipeline.load(
        tiny_checkpoint, "cuda", conditioning_store=tmp_path, conditioning_store_bytes=2**30
    )
    assert pipe.begins_ahead and pipe.conditioning_store is not None
    first, second = REQUESTS["text"], replace(REQUESTS["other size"], prompt="a blue star")
    expected = [
        [pipe.generate(asked).pictures[0].pixels for _ in "12"][1] for asked in (first, second)
    ]
    pipe.conditioning_store.wait()
    if known == "new size":
        assert pipe.runtime.graphs is not None
        pipe.runtime.graphs.clear()
        pipe.generate(first)
    if known.startswith("new"):
        pipe.conditioning_cache.clear()
    elif known == "on disk":
        pipe.conditioning_cache.forget_memory()
        second_ids = pipe.tokenizer.encode(second.prompt).key
        assert pipe.conditioning_store.load(second_ids) is not None, "pinned memory is there"
    ending, ahead = pipe.run(first), pipe.run(second)
    queued: list[bool] = []
    ending.meanwhile(lambda: queued.append(True))
    while not queued:
        next(ending)
    pipe.conditioning_store.wait()
    busy = torch.cuda.Event()
    torch.cuda._sleep(10**9)
    busy.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ahead.begin()
        is_behind = not busy.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert is_behind, "it has waited until the device was done"
    for run, pixels in zip((ending, ahead), expected, strict=True):
        assert np.array_equal(_result(run).pictures[0].pixels, pixels)


def test_the_peak_of_memory_is_pytorch_s_own() -> None:
    runtime = choose_runtime("cuda", "float32")
    runtime.reset_peak()
    block = torch.empty(2**26, device="cuda", dtype=torch.uint8)
    assert runtime.peak_bytes() == torch.cuda.max_memory_allocated() >= block.nbytes
    del block


def test_what_cannot_be_recorded_leaves_the_stream_as_it_was() -> None:
    graphs = Graphs(2, CudaRecorder(torch.device("cuda")))
    call = graphs.wrap(lambda x: x * x.sum().item(), most_tokens=100)
    before = torch.cuda.current_stream()
    for _ in range(2):
        assert call(torch.ones(1, 4, device="cuda")).tolist() == [[4.0] * 4]
    assert torch.cuda.current_stream() == before
    assert graphs.describe() == "2 (shapes without one: 1)"


def test_graphs_of_few_shapes_are_kept(plain: FluxPipeline, tiny_checkpoint: Path) -> None:
    graphed = _pipeline(tiny_checkpoint, compile_networks="off", cuda_graphs=2)
    for _ in range(2):
        for name, params in REQUESTS.items():
            assert _bytes(graphed, params) == _bytes(plain, params), name
    assert graphed.runtime.graphs is not None
    assert len(graphed.runtime.graphs) == 2
    graphed.runtime.release_memory()
    assert len(graphed.runtime.graphs) == 0
    assert _bytes(graphed, REQUESTS["text"]) == _bytes(plain, REQUESTS["text"])


def test_jobs_that_take_turns_do_not_mix(plain: FluxPipeline, tiny_checkpoint: Path) -> None:
    """Both play the same recording, whose inputs and result lie in one place."""
    graphed = _pipeline(tiny_checkpoint, compile_networks="off", cuda_graphs=24)
    requests = [
        GenerationParams(prompt=prompt, width=128, height=96, steps=4, seed=seed)
        for prompt, seed in (("a red fox", 1), ("a blue star", 2))
    ]
    expected = [_latents(plain, params) for params in requests]
    loops: list[Iterator[DenoiseStep]] = [graphed.denoise(graphed.prepare(p)) for p in requests]
    turns = list(zip(*loops, strict=True))
    for found, exact in zip(turns[-1], expected, strict=True):
        assert torch.equal(found.latents, exact)


def test_compiled_networks_draw_the_same(plain: FluxPipeline, compiled: FluxPipeline) -> None:
    for name, params in REQUESTS.items():
        assert _relative(_latents(compiled, params), _latents(plain, params)) < 0.05, name


def test_a_new_size_is_not_compiled_anew(compiled: FluxPipeline) -> None:
    for params in REQUESTS.values():
        compiled.generate(params)
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for width, height in ((112, 80), (160, 144), (256, 256)):
        compiled.generate(GenerationParams(prompt="a", width=width, height=height, seed=1))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made


def test_graphs_of_compiled_networks_change_no_bit(
    compiled: FluxPipeline, tiny_checkpoint: Path
) -> None:
    graphed = _pipeline(tiny_checkpoint, compile_networks="on", cuda_graphs=24)
    for name, params in REQUESTS.items():
        expected = _bytes(compiled, params)
        for use in ("recorded", "played"):
            assert _bytes(graphed, params) == expected, f"{name}, {use}"


def test_fp8_draws_nearly_the_same(plain: FluxPipeline, tiny_checkpoint: Path) -> None:
    pipe = FluxPipeline.load(tiny_checkpoint, "cuda", precision="fp8")
    assert pipe.runtime.describe()["precision"] == "fp8"
    assert pipe.info.weight_bytes < plain.info.weight_bytes
    for name, params in REQUESTS.items():
        assert 0 < _relative(_latents(pipe, params), _latents(plain, params)) < 0.2, name


@pytest.mark.parametrize(("rows", "n", "k"), [(1, 16, 16), (7, 48, 80), (300, 256, 512)])
def test_fp8_products_are_those_of_the_plain_form(rows: int, n: int, k: int) -> None:
    x = torch.randn(rows, k, device="cuda").bfloat16() * 30
    weight = torch.randn(n, k, device="cuda").bfloat16() / 30
    (x8, x_scale), (weight8, weight_scale) = FP8.round_rows(x), FP8.round_rows(weight)
    args = (x8, x_scale, weight8, weight_scale.t().contiguous())
    product = FP8.product(*args, torch.bfloat16)
    assert _relative(product, plain_product(*args, torch.bfloat16)) < 5e-3
    assert _relative(product, x.double() @ weight.double().t()) < 0.06
    assert FP8.unscaled is not None
    unscaled = FP8.unscaled(x8, weight8)
    assert unscaled.dtype == torch.bfloat16
    assert _relative(unscaled, plain_unscaled(x8, weight8)) < 5e-3
    assert _relative(unscaled * x_scale * weight_scale.t(), product) < 5e-3


def test_the_gpu_s_own_attention_is_right() -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("used from Hopper on")
    q, k, v = torch.randn(3, 1, 300, 4, 64, device="cuda").bfloat16().transpose(2, 3)
    exact = plain_attention(q.double(), k.double(), v.double(), None)
    assert _relative(cudnn_attention(q, k, v, None), exact) < 0.01
    mask = torch.ones(300, 300, device="cuda", dtype=torch.bool).tril()[None, None]
    exact = plain_attention(q.double(), k[:, :2].double(), v[:, :2].double(), mask)
    assert _relative(cudnn_attention(q, k[:, :2], v[:, :2], mask), exact) < 0.01


def test_fused_attention_draws_the_same(plain: FluxPipeline, tiny_checkpoint: Path) -> None:
    chosen = FluxPipeline.load(tiny_checkpoint, "cuda")
    for name, params in REQUESTS.items():
        assert _relative(_latents(plain, params), _latents(chosen, params)) < 0.05, name


@pytest.mark.parametrize("is_fused", [False, True], ids=["library", "own kernel"])
def test_attention_of_wide_heads_is_right(is_fused: bool) -> None:
    attention = wide_attention
    if is_fused:
        pytest.importorskip("triton", reason="Triton is not installed")
        attention = importlib.import_module("fluxcore.runtime.triton_vae").wide_attention
    q, k, v = torch.randn(3, 1, 1, SCORED_ROWS + 100, 512, device="cuda").bfloat16()
    exact = plain_attention(q.float(), k.float(), v.float(), None)
    assert _relative(attention(q, k, v, None), exact) < 0.01


@pytest.mark.parametrize("kernels", ["plain", "fused"])
@pytest.mark.parametrize("cuda_graphs", [0, 24], ids=["launched", "recorded"])
def test_rows_are_filtered_as_on_the_host(
    tiny_checkpoint: Path, cuda_graphs: int, kernels: str
) -> None:
    pipe = _pipeline(
        tiny_checkpoint, compile_networks="off", cuda_graphs=cuda_graphs, kernels=kernels
    )
    for seed in range(3):
        params = GenerationParams(prompt="x", width=512, height=384, steps=1, seed=seed)
        (picture,) = pipe.generate(params).pictures
        rows = picture.pixels.reshape(384, -1)
        expected = np.concatenate(list(filtered(rows, strip_height(*rows.shape))))
        if kernels == "plain":
            assert picture.lines is not None and np.array_equal(picture.lines, expected)
            continue
        assert picture.lines is None and picture.deflated is not None, "noise has no runs"
        stream, adler = picture.deflated
        assert zlib.decompress(stream.tobytes(), -zlib.MAX_WBITS) == expected.tobytes()
        assert adler == zlib.adler32(expected.tobytes())


def test_what_comes_to_the_host_is_whole() -> None:
    sent = [torch.randint(0, 255, (700, 900, 3), device="cuda", dtype=torch.uint8) for _ in "ab"]
    for tensor, found in zip(sent, choose_runtime("cuda").to_host(*sent), strict=True):
        assert found.device.type == "cpu"
        assert torch.equal(tensor.cpu(), found)
