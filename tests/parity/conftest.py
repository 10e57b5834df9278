"""Architectures that parity is tested on; each is written once per run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fluxcore.weights.random_architecture import (
    PRESETS,
    Architecture,
    TextEncoderShape,
    TransformerShape,
    VaeShape,
)
from fluxcore.weights.random_checkpoint import write_random_checkpoint
from tests.parity.twins import Twins

TINY = PRESETS["tiny"]

ARCHITECTURES = {
    "tiny": TINY,
    "deep": Architecture(
        transformer=TransformerShape(
            num_layers=3,
            num_single_layers=5,
            num_attention_heads=3,
            attention_head_dim=24,
            axes_dims_rope=(4, 8, 8, 4),
            mlp_ratio=2.0,
            timestep_guidance_channels=64,
        ),
        text_encoder=TextEncoderShape(
            hidden_size=48,
            intermediate_size=112,
            num_hidden_layers=27,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=16,
            vocab_size=640,
            tie_word_embeddings=False,
            rope_theta=10_000,
        ),
        vae=VaeShape(
            block_out_channels=(8, 16, 16, 24),
            decoder_block_out_channels=(8, 8, 16, 32),
            norm_num_groups=4,
            layers_per_block=1,
        ),
    ),
    "bare": Architecture(
        transformer=TransformerShape(
            num_layers=1,
            num_single_layers=1,
            num_attention_heads=1,
            attention_head_dim=64,
            axes_dims_rope=(16, 16, 16, 16),
            rope_theta=500,
        ),
        text_encoder=TINY.text_encoder,
        vae=VaeShape(
            block_out_channels=(16, 16, 24, 24),
            latent_channels=16,
            norm_num_groups=8,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
        ),
    ),
}

TwinsOf = Callable[..., Twins]


@pytest.fixture(scope="session")
def twins_of(tmp_path_factory: pytest.TempPathFactory) -> TwinsOf:
    """(architecture, distilled, dtype) -> the loaded pair, kept for the session."""
    directories: dict[tuple[str, bool], Path] = {}
    loaded: dict[tuple[str, bool, str], Twins] = {}

    def get(name: str, *, distilled: bool = True, dtype: str = "float32") -> Twins:
        if (name, distilled) not in directories:
            directories[name, distilled] = write_random_checkpoint(
                tmp_path_factory.mktemp("parity") / name,
                architecture=ARCHITECTURES[name],
                is_distilled=distilled,
                seed=len(name),
            )
        key = (name, distilled, dtype)
        if key not in loaded:
            loaded[key] = Twins.load(directories[name, distilled], dtype)
        return loaded[key]

    return get
