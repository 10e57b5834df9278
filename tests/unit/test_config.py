"""Reading the config files: the sizes of published models, and every refusal by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxcore.config import ConfigFile, read_checkpoint_config
from fluxcore.errors import CheckpointConfigError, CheckpointError, CheckpointNotFoundError
from fluxcore.weights.random_architecture import (
    PRESETS,
    model_index,
    scheduler_config,
    text_encoder_config,
    transformer_config,
    vae_config,
)
from tests.unit.checkpoint_copies import edit_json

FILES = {
    "index": "model_index.json",
    "transformer": "transformer/config.json",
    "text_encoder": "text_encoder/config.json",
    "vae": "vae/config.json",
    "scheduler": "scheduler/scheduler_config.json",
}


def write_configs(directory: Path, preset: str = "tiny", *, is_distilled: bool = True) -> Path:
    """The config files of a checkpoint, without any weights."""
    architecture = PRESETS[preset]
    contents = {
        "index": model_index(is_distilled=is_distilled),
        "transformer": transformer_config(architecture),
        "text_encoder": text_encoder_config(
            architecture, dtype="bfloat16", bos_token_id=1, eos_token_id=2
        ),
        "vae": vae_config(architecture),
        "scheduler": scheduler_config(),
    }
    for part, content in contents.items():
        path = directory / FILES[part]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return directory


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    return write_configs(tmp_path / "model")


def test_the_published_4b_model_is_read_as_its_facts_say(tmp_path: Path) -> None:
    config = read_checkpoint_config(write_configs(tmp_path, "4b"))
    transformer, text, vae = config.transformer, config.text_encoder, config.vae
    assert config.is_distilled
    assert (transformer.width, transformer.heads, transformer.head_width) == (3072, 24, 128)
    assert (transformer.double_blocks, transformer.single_blocks) == (5, 20)
    assert transformer.mlp_width == 9216
    assert (transformer.in_channels, transformer.out_channels) == (128, 128)
    assert (text.width, text.layers, text.used_layers, text.kv_heads) == (2560, 36, 27, 8)
    assert text.conditioning_width == transformer.text_width == 7680
    assert text.rope_theta == 1_000_000
    assert (vae.pixels_per_latent, vae.pixels_per_token, vae.token_channels) == (8, 16, 128)
    assert vae.decoder_channels == vae.encoder_channels == (128, 256, 512, 512)


def test_the_published_9b_base_model_is_read_as_its_facts_say(tmp_path: Path) -> None:
    config = read_checkpoint_config(write_configs(tmp_path, "9b", is_distilled=False))
    assert not config.is_distilled
    assert (config.transformer.width, config.transformer.heads) == (4096, 32)
    assert (config.transformer.double_blocks, config.transformer.single_blocks) == (8, 24)
    assert config.text_encoder.conditioning_width == 12_288


def test_a_model_that_does_not_say_is_a_base_model(configs: Path) -> None:
    """As diffusers' pipeline defaults."""
    edit_json(configs / FILES["index"], {"is_distilled": ...})
    assert not read_checkpoint_config(configs).is_distilled


def test_a_decoder_may_have_widths_of_its_own(configs: Path) -> None:
    edit_json(configs / FILES["vae"], {"decoder_block_out_channels": [8, 16, 16, 24]})
    vae = read_checkpoint_config(configs).vae
    assert vae.decoder_channels == (8, 16, 16, 24)
    assert vae.encoder_channels == (16, 24, 32, 32)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 5e5},
        {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": {"rope_theta": 5e5}},
        {"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 500000}},
        {"rope_theta": 500_000, "rope_parameters": {"rope_type": "default"}},
    ],
)
def test_both_spellings_of_the_rope_base_are_read(configs: Path, changes: dict[str, Any]) -> None:
    edit_json(configs / FILES["text_encoder"], changes)
    assert read_checkpoint_config(configs).text_encoder.rope_theta == 500_000


def test_a_missing_directory_is_named_with_the_layout_that_is_expected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"model_index\.json") as caught:
        read_checkpoint_config(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in str(caught.value)
    assert isinstance(caught.value, FileNotFoundError)


def test_a_file_is_no_directory(configs: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        read_checkpoint_config(configs / "model_index.json")


@pytest.mark.parametrize("part", FILES)
def test_a_missing_file_is_named(configs: Path, part: str) -> None:
    (configs / FILES[part]).unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"missing.*download it again") as caught:
        read_checkpoint_config(configs)
    assert str(configs / FILES[part]) in str(caught.value)


@pytest.mark.parametrize("part", FILES)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"_class_name": "Flux2',
        b"\xff\xfe{}",
        b"null",
        b"[1, 2]",
        b'"text"',
        b"{} {}",
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": ' + b"[" * 100_000,
    ],
    ids=["empty", "cut", "not utf-8", "null", "list", "text", "two", "huge number", "deep"],
)
def test_a_broken_file_is_named(configs: Path, part: str, content: bytes) -> None:
    (configs / FILES[part]).write_bytes(content)
    with pytest.raises(CheckpointConfigError) as caught:
        read_checkpoint_config(configs)
    assert str(configs / FILES[part]) in str(caught.value)


def test_a_directory_in_place_of_a_file_is_named(configs: Path) -> None:
    (configs / FILES["vae"]).unlink()
    (configs / FILES["vae"]).mkdir()
    with pytest.raises(CheckpointConfigError, match="cannot be read"):
        read_checkpoint_config(configs)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("index", "_class_name", "StableDiffusionPipeline"),
        ("index", "_class_name", "Flux2Pipeline"),
        ("index", "is_distilled", "yes"),
        ("index", "is_distilled", 1),
        ("transformer", "_class_name", "FluxTransformer2DModel"),
        ("transformer", "patch_size", 2),
        ("transformer", "guidance_embeds", True),
        ("transformer", "num_layers", ...),
        ("transformer", "num_layers", 0),
        ("transformer", "num_layers", 2.0),
        ("transformer", "num_single_layers", "2"),
        ("transformer", "num_attention_heads", True),
        ("transformer", "num_attention_heads", -2),
        ("transformer", "joint_attention_dim", ...),
        ("transformer", "attention_head_dim", 34),
        ("transformer", "axes_dims_rope", [8, 8, 16]),
        ("transformer", "axes_dims_rope", [7, 9, 8, 8]),
        ("transformer", "axes_dims_rope", [8, 8, 8, 16]),
        ("transformer", "axes_dims_rope", []),
        ("transformer", "axes_dims_rope", [8, 8, 8, 8.0]),
        ("transformer", "mlp_ratio", 0),
        ("transformer", "mlp_ratio", -3.0),
        ("transformer", "mlp_ratio", float("nan")),
        ("transformer", "mlp_ratio", float("inf")),
        ("transformer", "mlp_ratio", "3"),
        ("transformer", "mlp_ratio", True),
        ("transformer", "mlp_ratio", 10**400),
        ("transformer", "rope_theta", 0),
        ("transformer", "rope_theta", float("nan")),
        ("transformer", "eps", -1e-6),
        ("transformer", "timestep_guidance_channels", 255),
        ("text_encoder", "model_type", "qwen2"),
        ("text_encoder", "hidden_act", "gelu"),
        ("text_encoder", "attention_bias", True),
        ("text_encoder", "use_sliding_window", True),
        ("text_encoder", "hidden_size", ...),
        ("text_encoder", "num_hidden_layers", 26),
        ("text_encoder", "num_key_value_heads", 3),
        ("text_encoder", "head_dim", 31),
        ("text_encoder", "rms_norm_eps", float("nan")),
        ("text_encoder", "rope_theta", ...),
        ("text_encoder", "rope_theta", 0),
        ("text_encoder", "rope_theta", "10000"),
        ("text_encoder", "rope_theta", True),
        ("text_encoder", "rope_theta", float("nan")),
        ("text_encoder", "rope_theta", float("inf")),
        ("text_encoder", "rope_theta", 10**400),
        ("text_encoder", "rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("text_encoder", "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6}),
        ("text_encoder", "rope_parameters", [1e6]),
        ("vae", "_class_name", "AutoencoderKL"),
        ("vae", "act_fn", "relu"),
        ("vae", "patch_size", [1, 1]),
        ("vae", "in_channels", 4),
        ("vae", "out_channels", 4),
        ("vae", "down_block_types", ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"]),
        ("vae", "up_block_types", ["UpDecoderBlock2D"] * 3),
        ("vae", "block_out_channels", "16"),
        ("vae", "block_out_channels", [16, 24, 0, 32]),
        ("vae", "decoder_block_out_channels", [16, 24, 32]),
        ("vae", "decoder_block_out_channels", [16, 24, 32, 36]),
        ("vae", "norm_num_groups", 5),
        ("vae", "mid_block_add_attention", "true"),
        ("vae", "batch_norm_eps", float("nan")),
        ("vae", "batch_norm_eps", -1.0),
        ("scheduler", "_class_name", "EulerDiscreteScheduler"),
        ("scheduler", "use_dynamic_shifting", False),
        ("scheduler", "time_shift_type", "linear"),
        ("scheduler", "num_train_timesteps", 100),
        ("scheduler", "shift_terminal", 0.02),
        ("scheduler", "invert_sigmas", True),
        ("scheduler", "stochastic_sampling", True),
        ("scheduler", "use_karras_sigmas", True),
        ("scheduler", "use_exponential_sigmas", True),
        ("scheduler", "use_beta_sigmas", True),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_field_that_is_not_implemented_is_named(
    configs: Path, part: str, field: str, value: Any
) -> None:
    edit_json(configs / FILES[part], {field: value})
    with pytest.raises(CheckpointConfigError) as caught:
        read_checkpoint_config(configs)
    message = str(caught.value)
    assert str(configs / FILES[part]) in message
    named = "norm_num_groups" if field == "decoder_block_out_channels" else field
    aliases = {"rope_parameters": "rope_theta", "attention_head_dim": "axes_dims_rope"}
    assert re.search(rf"{field}|{named}|{aliases.get(field, field)}", message)


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("text_encoder", {"hidden_size": 32, "head_dim": 32}, ["192", "96", "different models"]),
        ("transformer", {"joint_attention_dim": 7680}, ["7680", "192"]),
        ("transformer", {"in_channels": 64}, ["64", "128"]),
        ("transformer", {"out_channels": 64}, ["64, 128", "128"]),
        ("vae", {"latent_channels": 16}, ["128", "64"]),
        (
            "vae",
            {
                "block_out_channels": [16, 24, 32],
                "down_block_types": ["DownEncoderBlock2D"] * 3,
                "up_block_types": ["UpDecoderBlock2D"] * 3,
            },
            ["16 x 16 pixels", "8"],
        ),
    ],
)
def test_components_of_different_models_are_told_apart(
    configs: Path, part: str, changes: dict[str, Any], words: list[str]
) -> None:
    edit_json(configs / FILES[part], changes)
    with pytest.raises(CheckpointConfigError) as caught:
        read_checkpoint_config(configs)
    for word in [str(configs), *words]:
        assert word in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(part=st.sampled_from(["transformer", "text_encoder", "vae"]), data=st.data())
def test_any_value_of_any_field_is_read_or_refused_as_a_checkpoint_error(
    part: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = write_configs(tmp_path_factory.mktemp("fuzz"))
    names = sorted(json.loads((directory / FILES[part]).read_text()))
    field = data.draw(st.sampled_from(names))
    value = data.draw(JSON)
    edit_json(directory / FILES[part], {field: value})
    failure = None
    try:
        config = read_checkpoint_config(directory)
        assert config.transformer.mlp_width > 0
    except CheckpointError as error:
        failure = error
    assert failure is None or str(directory) in str(failure)


def test_values_are_typed(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"one": 1, "half": 0.5, "none": null, "yes": true}')
    file = ConfigFile(path)
    assert file.get("one", float) == 1.0
    assert isinstance(file.get("one", float), float)
    assert file.get("none", int, 7) == 7
    assert file.get("absent", str, "x") == "x"
    assert file.get("yes", bool) is True
    for name, kind in (("half", int), ("yes", int), ("yes", float), ("one", bool), ("one", str)):
        with pytest.raises(CheckpointConfigError, match=f"'{name}' must be of type"):
            file.get(name, kind)
    with pytest.raises(CheckpointConfigError, match="'absent' is missing"):
        file.get("absent", int)
