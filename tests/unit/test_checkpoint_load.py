"""Whole checkpoint directories: only what is used is read, faults never leave half a model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxcore import FluxPipeline
from fluxcore.errors import (
    CheckpointConfigError,
    CheckpointError,
    CheckpointFileError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
)
from fluxcore.weights import LoadProgress
from fluxcore.weights.files import StoredTensor
from fluxcore.weights.random_architecture import PRESETS, TransformerShape
from fluxcore.weights.random_checkpoint import write_random_checkpoint
from tests.unit.checkpoint_copies import copy_checkpoint, edit_json, split_safetensors, weight_file

TINY = PRESETS["tiny"]
NEVER_READ = ("model.layers.27.", "model.layers.28.", "model.norm.", "lm_head.")


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose text encoder has a language-model head, which nothing needs."""
    text_encoder = replace(TINY.text_encoder, tie_word_embeddings=False)
    return write_random_checkpoint(
        tmp_path_factory.mktemp("untied") / "untied",
        architecture=replace(TINY, text_encoder=text_encoder),
    )


def load(path: Path, dtype: str = "float32") -> FluxPipeline:
    return FluxPipeline.load(path, device="cpu", dtype=dtype)


def failure(path: Path) -> CheckpointError:
    """Why a directory cannot be loaded; the component at fault was not begun."""
    told: list[LoadProgress] = []
    with pytest.raises(CheckpointError) as caught:
        FluxPipeline.load(path, device="cpu", dtype="float32", progress=told.append)
    at_fault = [
        part for part in ("transformer", "text_encoder", "vae") if part in str(caught.value)
    ]
    assert not {progress.component for progress in told} & set(at_fault)
    return caught.value


def weights(pipe: FluxPipeline) -> dict[str, torch.Tensor]:
    parts = {"text": pipe.text_encoder, "transformer": pipe.transformer, "vae": pipe.vae}
    return {
        f"{part}.{name}": value
        for part, network in parts.items()
        for name, value in network.state_dict().items()
    }


def assert_equal_weights(one: FluxPipeline, two: FluxPipeline) -> None:
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def test_shards_and_a_single_file_make_the_same_model(
    tiny_pipeline: FluxPipeline, tmp_path: Path
) -> None:
    sharded = write_random_checkpoint(tmp_path / "sharded", max_shard_bytes=300_000)
    for component in ("transformer", "text_encoder", "vae"):
        assert len(list((sharded / component).glob("*-of-*.safetensors"))) > 1
    assert_equal_weights(load(sharded), tiny_pipeline)


def test_the_text_encoder_is_read_up_to_the_last_layer_that_counts(
    untied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = weight_file(untied, "text_encoder")
    header, _ = split_safetensors(file.read_bytes())
    start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    name_at = {start + e["data_offsets"][0]: name for name, e in header.items() if "dtype" in e}
    read: list[str] = []
    whole = StoredTensor.read_into

    def watched(self: StoredTensor, target: torch.Tensor, first: int = 0) -> None:
        if self.file == file:
            read.append(name_at[self.offset])
        whole(self, target, first)

    monkeypatch.setattr(StoredTensor, "read_into", watched)
    pipe = load(untied)

    unread = {name for name in name_at.values() if name.startswith(NEVER_READ)}
    assert {prefix for prefix in NEVER_READ if any(n.startswith(prefix) for n in unread)} == set(
        NEVER_READ
    )
    assert sorted(read) == sorted(set(name_at.values()) - unread)
    sizes = {name: value.nbytes for name, value in load_file(file).items()}
    report = {report.component: report for report in pipe.info.load}["text_encoder"]
    assert report.skipped_bytes == sum(sizes[name] for name in unread)
    assert report.read_bytes == sum(sizes[name] for name in read)


def test_unused_tensors_may_be_absent_or_of_any_shape(
    untied: Path, tmp_path: Path, tiny_pipeline: FluxPipeline
) -> None:
    for name, keep in (("absent", False), ("odd", True)):
        checkpoint = copy_checkpoint(untied, tmp_path / name, "text_encoder")
        file = weight_file(checkpoint, "text_encoder")
        tensors = load_file(file)
        for unused in [n for n in tensors if n.startswith(NEVER_READ)]:
            del tensors[unused]
            if keep:
                tensors[unused] = torch.ones(3, 1, 2)
        save_file(tensors, file)
        assert_equal_weights(load(checkpoint), tiny_pipeline)


def test_what_was_loaded_is_told(tiny_pipeline: FluxPipeline, tiny_checkpoint: Path) -> None:
    info = tiny_pipeline.info
    assert info.name == "tiny"
    assert info.path == tiny_checkpoint.resolve()
    assert (info.is_distilled, info.default_steps, info.default_guidance) == (True, 4, None)
    networks = {
        "transformer": tiny_pipeline.transformer,
        "text_encoder": tiny_pipeline.text_encoder,
        "vae": tiny_pipeline.vae,
    }
    for name, network in networks.items():
        assert info.parameters[name] == sum(v.numel() for v in network.state_dict().values())
    assert info.weight_bytes == 4 * sum(info.parameters.values())
    assert {report.component for report in info.load} == set(networks)


def test_a_base_model_has_defaults_of_its_own(tiny_base_checkpoint: Path) -> None:
    info = load(tiny_base_checkpoint).info
    assert (info.is_distilled, info.default_steps, info.default_guidance) == (False, 50, 4.0)


@pytest.mark.parametrize(
    ("dtype", "weights_dtype", "vae_dtype", "norm_dtype"),
    [
        ("float32", torch.float32, torch.float32, torch.float32),
        ("bfloat16", torch.bfloat16, torch.bfloat16, torch.bfloat16),
        ("float16", torch.float16, torch.float32, torch.float32),
    ],
)
def test_each_part_is_kept_in_its_dtype(
    tiny_checkpoint: Path,
    tiny_pipeline: FluxPipeline,
    dtype: str,
    weights_dtype: torch.dtype,
    vae_dtype: torch.dtype,
    norm_dtype: torch.dtype,
) -> None:
    pipe = FluxPipeline.load(tiny_checkpoint, device="cpu", dtype=dtype, kernels="plain")
    exact = weights(tiny_pipeline)
    for name, value in weights(pipe).items():
        expected = vae_dtype if name.startswith("vae.") else weights_dtype
        if name.endswith(("attention_norm.weight", "mlp_norm.weight")):
            expected = norm_dtype
        assert value.dtype == expected, name
        assert torch.equal(value, exact[name].to(expected)), name
    assert pipe.info.weight_bytes == sum(value.nbytes for value in weights(pipe).values())


def test_convolutions_are_channels_last_on_the_cpu(tiny_pipeline: FluxPipeline) -> None:
    matrices = [v for v in tiny_pipeline.vae.state_dict().values() if v.dim() == 4]
    assert len(matrices) > 50
    assert all(v.is_contiguous(memory_format=torch.channels_last) for v in matrices)


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae"])
def test_a_component_without_weights_is_named(
    tiny_checkpoint: Path, tmp_path: Path, component: str
) -> None:
    checkpoint = copy_checkpoint(tiny_checkpoint, tmp_path / "copy", component)
    weight_file(checkpoint, component).unlink()
    error = failure(checkpoint)
    assert isinstance(error, CheckpointNotFoundError)
    assert str(checkpoint / component) in str(error)


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae"])
def test_a_component_that_ends_early_is_named(
    tiny_checkpoint: Path, tmp_path: Path, component: str
) -> None:
    checkpoint = copy_checkpoint(tiny_checkpoint, tmp_path / "copy", component)
    file = weight_file(checkpoint, component)
    os.truncate(file, file.stat().st_size // 2)
    error = failure(checkpoint)
    assert isinstance(error, CheckpointFileError)
    assert str(file) in str(error)


@pytest.mark.parametrize(
    ("component", "changes"),
    [
        ("transformer", {"num_layers": 3}),
        ("transformer", {"num_single_layers": 1}),
        ("transformer", {"num_attention_heads": 4}),
        ("transformer", {"mlp_ratio": 4.0}),
        ("text_encoder", {"intermediate_size": 96}),
        ("text_encoder", {"num_key_value_heads": 4}),
        ("text_encoder", {"num_hidden_layers": 28}),
        ("vae", {"layers_per_block": 1}),
        ("vae", {"use_quant_conv": False}),
        ("vae", {"mid_block_add_attention": False}),
        ("vae", {"decoder_block_out_channels": [16, 16, 24, 32]}),
    ],
)
def test_weights_of_another_architecture_are_refused(
    tiny_checkpoint: Path, tmp_path: Path, component: str, changes: dict[str, object]
) -> None:
    checkpoint = copy_checkpoint(tiny_checkpoint, tmp_path / "copy", component)
    edit_json(checkpoint / component / "config.json", changes)
    error = failure(checkpoint)
    assert isinstance(error, CheckpointMismatchError)
    assert error.directory == checkpoint / component
    assert error.missing or error.unexpected or error.misshapen


def test_weights_of_another_component_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = copy_checkpoint(tiny_checkpoint, tmp_path / "copy", "vae")
    wrong = weight_file(tiny_checkpoint, "transformer").read_bytes()
    weight_file(checkpoint, "vae").write_bytes(wrong)
    error = failure(checkpoint)
    assert isinstance(error, CheckpointMismatchError)
    assert "conv_in.weight" in str(error)
    assert len(error.unexpected) == len(split_safetensors(wrong)[0]) - 1


def test_a_tokenizer_with_more_tokens_than_the_encoder_is_refused(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = copy_checkpoint(tiny_checkpoint, tmp_path / "copy", "tokenizer")
    path = checkpoint / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    largest = max(token["id"] for token in content["added_tokens"])
    for i in range(largest + 1, TINY.text_encoder.vocab_size + 1):
        token = content["added_tokens"][-1] | {"id": i, "content": f"<|extra_{i}|>"}
        content["added_tokens"].append(token)
    path.write_text(json.dumps(content))
    error = failure(checkpoint)
    assert isinstance(error, CheckpointConfigError)
    assert f"token ids up to {TINY.text_encoder.vocab_size}" in str(error)
    assert "different models" in str(error)


MEASURE = """
import sys
from pathlib import Path

from fluxcore import FluxPipeline

def kibibytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

FluxPipeline.load(sys.argv[1], device="cpu", dtype="bfloat16")
before = kibibytes("VmRSS")
pipe = FluxPipeline.load(sys.argv[2], device="cpu", dtype="bfloat16")
print(kibibytes("VmHWM") - before, sum(report.read_bytes for report in pipe.info.load) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_loading_takes_hardly_more_memory_than_the_weights(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """The kernel's own high-water mark, in a process that has loaded a tiny model before.

    Measured: 0.98 of 261 MB, because some of what the tiny one took is used again.
    """
    transformer = TransformerShape(
        num_layers=2,
        num_single_layers=4,
        num_attention_heads=16,
        attention_head_dim=64,
        axes_dims_rope=(16, 16, 16, 16),
    )
    large = write_random_checkpoint(
        tmp_path / "large", architecture=replace(TINY, transformer=transformer)
    )
    command = [sys.executable, "-c", MEASURE, str(tiny_checkpoint), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    weight_file(large, "transformer").unlink()  # a quarter of a gigabyte that pytest would keep
    grown, read = map(int, done.stdout.split())
    assert read > 200_000
    assert grown > 0.9 * read, "the measurement saw no weights"
    assert grown < 1.15 * read


def test_a_misfit_of_the_last_component_is_found_before_any_weight_is_read(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, directory)
    config = directory / "transformer" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"num_layers": values["num_layers"] + 1}))
    read: list[StoredTensor] = []
    monkeypatch.setattr(StoredTensor, "read_into", lambda self, _: read.append(self))
    with pytest.raises(CheckpointMismatchError, match="transformer"):
        FluxPipeline.load(directory, device="cpu")
    assert not read
