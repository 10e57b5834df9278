"""Operations counted from the architecture against those that PyTorch sees being run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fluxcore import FluxPipeline, GenerationParams
from fluxcore.bench.operations import (
    Attention,
    Convolution,
    Product,
    decoder_work,
    operations,
    stage_work,
    step_work,
    text_work,
)
from fluxcore.config import Qwen3Config, TransformerConfig, VaeConfig

KLEIN_4B = TransformerConfig(
    in_channels=128,
    out_channels=128,
    double_blocks=5,
    single_blocks=20,
    heads=24,
    head_width=128,
    text_width=7680,
    mlp_ratio=3.0,
    rope_axes=(32, 32, 32, 32),
    rope_theta=2000.0,
    time_channels=256,
    norm_eps=1e-6,
)
QWEN3_4B = Qwen3Config(
    vocabulary=151_936,
    width=2560,
    mlp_width=9728,
    layers=36,
    heads=32,
    kv_heads=8,
    head_width=128,
    rope_theta=1e6,
    norm_eps=1e-6,
)
FLUX2_VAE = VaeConfig(
    image_channels=3,
    latent_channels=32,
    encoder_channels=(128, 256, 512, 512),
    decoder_channels=(128, 256, 512, 512),
    layers_per_block=2,
    norm_groups=32,
    mid_attention=True,
    quant_conv=True,
    post_quant_conv=True,
    batch_norm_eps=1e-4,
    sample_side_px=1024,
)


def seen(run: Callable[[], object]) -> int:
    """What PyTorch counts, with attention as plain products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(("width", "height"), [(64, 64), (128, 96)])
def test_all_stages_are_counted_as_pytorch_counts_them(
    tiny_pipeline: FluxPipeline, width: int, height: int
) -> None:
    pipe, steps = tiny_pipeline, 3
    job = pipe.prepare(
        GenerationParams(prompt="a fox", width=width, height=height, steps=steps, seed=1)
    )
    work = stage_work(pipe.config, width, height, steps)
    pipe.conditioning_cache.forget_memory()
    assert operations(work["text"]) == seen(lambda: pipe.encode_text(job))
    latents = torch.zeros(0)

    def draw() -> None:
        nonlocal latents
        for step in pipe.denoise(job):
            latents = step.latents

    pipe.modulations.clear()
    once = operations(work["text tokens"]) + operations(work["schedule"])
    assert once + steps * operations(work["step"]) == seen(draw)
    assert operations(work["vae"]) == seen(lambda: pipe.decode(latents, width, height))


def test_decoders_of_other_widths_and_without_attention(tiny_pipeline: FluxPipeline) -> None:
    from fluxcore.models import AutoEncoder

    config = replace(
        tiny_pipeline.config.vae,
        decoder_channels=(32, 32, 64, 32),
        layers_per_block=1,
        mid_attention=False,
        post_quant_conv=False,
    )
    vae = AutoEncoder(config, tiny_pipeline.runtime.kernels())
    latents = torch.zeros(1, config.token_channels, 3, 5)
    assert operations(decoder_work(config, 3, 5)) == seen(lambda: vae.decode(latents))


def test_the_real_model_takes_what_is_known_of_it() -> None:
    # 10**12 operations, worked out independently from the published sizes.
    for side_px, expected in ((256, 4.85), (512, 10.10), (1024, 34.7)):
        tokens = (side_px // 16) ** 2
        assert operations(step_work(KLEIN_4B, tokens)) / 1e12 == pytest.approx(expected, rel=0.01)
    assert operations(text_work(QWEN3_4B)) / 1e12 == pytest.approx(2.9, rel=0.02)
    for side_px, expected in ((256, 0.62), (512, 2.52), (1024, 10.5)):
        rows = side_px // 16
        counted = operations(decoder_work(FLUX2_VAE, rows, rows)) / 1e12
        assert counted == pytest.approx(expected, rel=0.02)


def test_a_part_counts_a_fused_pair_as_two() -> None:
    assert Product(2, 3, 5).operations == 60
    assert Attention(2, 1, 7, 4).operations == 2 * (2 * 7 * 7 * 4) * 2
    assert Convolution(3, 4, 3, 5, 6).operations == 2 * 3 * 4 * 9 * 30
