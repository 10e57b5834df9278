"""The autoencoder's own rules: patches, normalisation, shapes, rows that do not mix."""

from __future__ import annotations

import pytest
import torch
from diffusers import Flux2KleinPipeline

from fluxcore import FluxPipeline
from fluxcore.config import VaeConfig
from fluxcore.kernels import Kernels, plain_attention
from fluxcore.models import AutoEncoder
from fluxcore.models.vae import AttentionBlock, Downsample, Upsample, patchify, unpatchify
from fluxcore.runtime.attention import chunked_attention

PLAIN = Kernels(attention=plain_attention, vae_attention=plain_attention)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def vae(tiny_pipeline: FluxPipeline) -> AutoEncoder:
    return tiny_pipeline.vae


def test_patches_go_into_channels_as_the_reference_puts_them() -> None:
    latents = random(2, 3, 8, 6)
    patched = patchify(latents)
    assert patched.shape == (2, 12, 4, 3)
    assert torch.equal(patched, Flux2KleinPipeline._patchify_latents(latents))
    assert torch.equal(unpatchify(patched), latents)
    assert torch.equal(unpatchify(patched), Flux2KleinPipeline._unpatchify_latents(patched))


@torch.inference_mode()
@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (5, 3), (1, 7)])
def test_one_token_covers_16_by_16_pixels(vae: AutoEncoder, rows: int, columns: int) -> None:
    pixels = vae.decode(random(1, 128, rows, columns))
    assert pixels.shape == (1, 3, 16 * rows, 16 * columns)
    assert vae.encode(pixels).shape == (1, 128, rows, columns)


@torch.inference_mode()
def test_latents_are_normalised_by_the_running_statistics(vae: AutoEncoder) -> None:
    """Source: Flux2KleinPipeline._encode_vae_image; batch_norm_eps is part of it."""
    pixels = random(1, 3, 32, 48).clamp(-1, 1)
    assert vae.quant_conv is not None
    moments = vae.quant_conv(vae.encoder(pixels))
    mean = patchify(moments[:, :32])
    shape = (1, 128, 1, 1)
    deviation = torch.sqrt(vae.latent_variance.view(shape) + 1e-4)
    assert vae.config.batch_norm_eps == 1e-4
    expected = (mean - vae.latent_mean.view(shape)) / deviation
    assert torch.allclose(vae.encode(pixels), expected, atol=1e-5)

    latents = random(1, 128, 2, 3)
    raw = unpatchify(latents * deviation + vae.latent_mean.view(shape))
    assert vae.post_quant_conv is not None
    assert torch.allclose(vae.decode(latents), vae.decoder(vae.post_quant_conv(raw)), atol=1e-5)


@torch.inference_mode()
def test_encoding_takes_the_mode_and_draws_nothing(vae: AutoEncoder) -> None:
    pixels = random(1, 3, 32, 32)
    torch.manual_seed(0)
    first = vae.encode(pixels)
    torch.manual_seed(1)
    assert torch.equal(vae.encode(pixels), first)


@torch.inference_mode()
def test_pictures_of_a_batch_do_not_mix(vae: AutoEncoder) -> None:
    latents = random(3, 128, 2, 2)
    together = vae.decode(latents)
    for i in range(3):
        assert torch.allclose(together[i : i + 1], vae.decode(latents[i : i + 1]), atol=1e-5)
    encoded = vae.encode(together)
    for i in range(3):
        assert torch.allclose(encoded[i : i + 1], vae.encode(together[i : i + 1]), atol=1e-4)


@torch.inference_mode()
def test_attention_mixes_all_places_and_chunks_change_nothing() -> None:
    torch.manual_seed(0)
    block = AttentionBlock(16, 4, PLAIN)
    x = random(1, 16, 50, 45)  # 2250 places: more than one chunk
    expected = block(x)
    block.attention = chunked_attention
    assert torch.allclose(block(x), expected, atol=1e-5)
    moved = x.clone()
    moved[0, :, 49, 44] += 5
    assert not torch.equal(block(moved)[0, :, 0, 0], expected[0, :, 0, 0])


def test_resampling_halves_and_doubles() -> None:
    half, double = Downsample(2), Upsample(2)
    assert half(random(1, 2, 10, 6)).shape == (1, 2, 5, 3)
    assert double(random(1, 2, 5, 3)).shape == (1, 2, 10, 6)


def test_downsampling_pads_on_the_right_and_below_only() -> None:
    half = Downsample(1)
    with torch.no_grad():
        half.conv.weight.fill_(1.0)
        half.conv.bias.zero_()  # type: ignore[union-attr]
        sums = half(torch.ones(1, 1, 4, 4))
    assert sums[0, 0].tolist() == [[9, 6], [6, 4]]


def test_a_decoder_of_other_widths_fits_the_same_latents() -> None:
    """As FLUX.2-small-decoder has."""
    config = VaeConfig(
        sample_side_px=1024,
        image_channels=3,
        latent_channels=8,
        encoder_channels=(8, 8, 16, 16),
        decoder_channels=(4, 8, 8, 24),
        layers_per_block=1,
        norm_groups=4,
        mid_attention=True,
        quant_conv=False,
        post_quant_conv=False,
        batch_norm_eps=1e-4,
    )
    torch.manual_seed(0)
    vae = AutoEncoder(config, PLAIN).eval()
    assert [level.blocks[0].conv1.out_channels for level in vae.decoder.levels] == [24, 8, 8, 4]
    with torch.inference_mode():
        assert vae.decode(vae.encode(random(1, 3, 32, 48))).shape == (1, 3, 32, 48)
