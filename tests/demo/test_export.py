"""From networks to a checkpoint and back."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline

from demo import finish
from demo.architecture import (
    DEMO,
    LARGEST_BYTES,
    LARGEST_FILE_BYTES,
    build_modules,
    read_config,
)
from demo.export import export_checkpoint
from fluxcore import FluxPipeline, GenerationParams
from fluxcore.errors import CheckpointConfigError, CheckpointError
from tests.demo.conftest import Networks
from tests.parity.twins import Twins, byte_differences, painting, worst_errors

TOLERANCE = 1e-5
"""As in tests/parity; the worst error of any stage was 2.7e-6."""


def state(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def test_the_demo_model_is_small_enough_to_ship(exported: Path) -> None:
    sizes = {path: path.stat().st_size for path in exported.rglob("*") if path.is_file()}
    assert sum(sizes.values()) < LARGEST_BYTES
    assert max(sizes.values()) < LARGEST_FILE_BYTES
    assert (exported / "transformer/diffusion_pytorch_model-00001-of-00002.safetensors") in sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_comes_back_bit_for_bit(
    dtype: torch.dtype, demo_networks: Networks, demo_tokenizer: Path, tmp_path: Path
) -> None:
    directory = export_checkpoint(
        tmp_path / "model", DEMO, *demo_networks, demo_tokenizer, dtype=dtype
    )
    pipeline = FluxPipeline.load(directory, device="cpu", dtype="float32")
    loaded = (pipeline.transformer, pipeline.text_encoder, pipeline.vae)
    for before, after in zip(demo_networks, loaded, strict=True):
        expected, found = state(before), state(after)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value.detach().to(dtype).float()), name
    assert pipeline.info.is_distilled
    assert pipeline.config.transformer == read_config(DEMO).transformer


def test_diffusers_draws_with_default_arguments(exported: Path) -> None:
    pipeline = Flux2KleinPipeline.from_pretrained(exported, local_files_only=True)
    assert pipeline.config.is_distilled
    pipeline.set_progress_bar_config(disable=True)
    words = {"prompt": "a red circle", "height": 64, "width": 64, "num_inference_steps": 4}
    theirs = pipeline(**words, generator=torch.Generator().manual_seed(3)).images[0]
    ours = FluxPipeline.load(exported, device="cpu", dtype="float32").generate(
        GenerationParams(prompt="a red circle", width=64, height=64, steps=4, seed=3)
    )
    assert byte_differences(ours.images[0], theirs).max() <= 1


@pytest.mark.parametrize("with_reference", [False, True])
def test_diffusers_draws_the_same_picture(exported: Path, with_reference: bool) -> None:
    twins = Twins.load(exported, "float32")
    words: dict[str, Any] = {"references": (painting(112, 80, 3),)} if with_reference else {}
    params = GenerationParams(
        prompt="a large red circle in the center on a white background",
        seed=5,
        steps=4,
        width=128,
        height=96,
        **words,
    )
    result, ours = twins.draw_ours(params)
    image, theirs = twins.draw_reference(params)
    bad = {name: e for name, e in worst_errors(ours, theirs).items() if e > TOLERANCE}
    assert not bad, bad
    assert byte_differences(result.images[0], image).max() <= 1


def test_the_networks_learn(demo_tokenizer: Path) -> None:
    """Gradients reach every parameter, through the modules as they are built for training."""
    transformer, encoder, vae = build_modules(DEMO)
    ids = torch.arange(24).reshape(1, -1)
    txt = transformer.text_tokens(encoder(ids, torch.tensor([20])))  # [1, 24, D]
    latents = vae.encode(torch.rand(1, 3, 64, 64))  # [1, C, 4, 4]
    img = latents.flatten(2).transpose(1, 2)  # [1, 16, C]
    angles = torch.zeros(40, 64)
    mod = transformer.modulation(torch.tensor([0.5]))[0]
    velocity = transformer(img, txt, mod, (angles.cos(), angles.sin()), 16)
    pixels = vae.decode(velocity.transpose(1, 2).unflatten(2, (4, 4)))
    pixels.square().mean().backward()
    for network in (transformer, encoder, vae):
        without = [n for n, p in network.named_parameters() if p.grad is None]
        assert not without, without


def test_what_cannot_be_exported(
    demo_networks: Networks, demo_tokenizer: Path, tmp_path: Path
) -> None:
    wide = replace(DEMO, vae=replace(DEMO.vae, latent_channels=16))
    with pytest.raises(CheckpointConfigError, match="the architecture says"):
        export_checkpoint(tmp_path / "wide", wide, *demo_networks, demo_tokenizer)
    deep = replace(DEMO, transformer=replace(DEMO.transformer, num_single_layers=7))
    with pytest.raises(CheckpointConfigError, match="stand on one side only"):
        export_checkpoint(tmp_path / "deep", deep, *demo_networks, demo_tokenizer)
    few = replace(DEMO, text_encoder=replace(DEMO.text_encoder, vocab_size=64))
    with pytest.raises(CheckpointConfigError, match="vocab_size must be at least"):
        export_checkpoint(tmp_path / "few", few, *demo_networks, demo_tokenizer)
    assert not list(tmp_path.iterdir())

    full = tmp_path / "full"
    shutil.copytree(demo_tokenizer, full)
    with pytest.raises(CheckpointError, match="never overwritten"):
        export_checkpoint(full, DEMO, *demo_networks, demo_tokenizer)
    assert json.loads((full / "added_tokens.json").read_text())


def test_a_finished_model_is_never_overwritten(
    exported: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["finish", "--out", str(exported)])
    with pytest.raises(SystemExit) as ended:
        finish.main()
    assert ended.value.code == 2
    assert "never overwritten" in capsys.readouterr().err
