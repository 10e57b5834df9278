"""Random weights: the reference's own names and shapes, and values that keep it sane."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from fluxcore.weights.random_architecture import (
    PRESETS,
    Architecture,
    text_encoder_config,
    transformer_config,
    vae_config,
)
from fluxcore.weights.random_checkpoint import write_random_checkpoint
from fluxcore.weights.random_tensors import (
    CHUNK_ELEMENTS,
    TensorSpec,
    draw,
    text_encoder_tensors,
    transformer_tensors,
    vae_tensors,
)

TINY = PRESETS["tiny"]
PROMPT = "a red fox in the snow, golden light"


def vary(architecture: Architecture, **changes: dict[str, Any]) -> Architecture:
    """A copy with some fields of its parts changed."""
    parts = {
        part: dataclasses.replace(getattr(architecture, part), **fields)
        for part, fields in changes.items()
    }
    return dataclasses.replace(architecture, **parts)


SMALL_DECODER = vary(TINY, vae={"decoder_block_out_channels": (8, 16, 24, 24)})
ARCHITECTURES = {
    **PRESETS,
    "small-decoder": SMALL_DECODER,
    "plain-vae": vary(
        TINY,
        vae={
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "mid_block_add_attention": False,
            "layers_per_block": 1,
            "block_out_channels": (8, 16, 16),
        },
    ),
    "untied": vary(
        TINY,
        text_encoder={"tie_word_embeddings": False, "num_hidden_layers": 27},
        transformer={"num_layers": 1, "num_single_layers": 3, "mlp_ratio": 2.0},
    ),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small are multiplied quickest by one thread, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(tiny_checkpoint: Path) -> Path:
    return tiny_checkpoint


def rms(x: Tensor) -> float:
    return x.float().square().mean().sqrt().item()


def relative(x: Tensor, reference: Tensor) -> float:
    return rms(x.float() - reference.float()) / rms(reference)


class TestTensors:
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_names_and_shapes_are_those_of_the_reference(self, name: str) -> None:
        architecture = ARCHITECTURES[name]
        config = text_encoder_config(architecture, dtype="bfloat16", bos_token_id=0, eos_token_id=1)
        with torch.device("meta"):
            models: list[tuple[Any, list[TensorSpec]]] = [
                (
                    Flux2Transformer2DModel.from_config(transformer_config(architecture)),
                    transformer_tensors(architecture),
                ),
                (Qwen3ForCausalLM(Qwen3Config(**config)), text_encoder_tensors(architecture)),
                (
                    AutoencoderKLFlux2.from_config(vae_config(architecture)),
                    vae_tensors(architecture),
                ),
            ]
        for model, specs in models:
            expected = {k: (tuple(v.shape), v.dtype) for k, v in model.state_dict().items()}
            if isinstance(model, Qwen3ForCausalLM) and config["tie_word_embeddings"]:
                del expected["lm_head.weight"]
            written = {s.name: (s.shape, s.stored_dtype(torch.float32)) for s in specs}
            assert len(written) == len(specs)
            assert written == expected

    def test_4b_has_the_published_number_of_parameters(self) -> None:
        def count(specs: list[TensorSpec], prefix: str = "") -> float:
            return sum(spec.elements for spec in specs if spec.name.startswith(prefix))

        architecture = PRESETS["4b"]
        assert count(transformer_tensors(architecture)) / 1e9 == pytest.approx(3.876, abs=5e-4)
        assert count(text_encoder_tensors(architecture)) / 1e9 == pytest.approx(4.022, abs=5e-4)
        vae = vae_tensors(architecture)
        assert count(vae) / 1e6 == pytest.approx(84, abs=0.5)
        assert count(vae, "decoder.") / 1e6 == pytest.approx(49.6, abs=0.1)

    def test_values_come_in_small_chunks_and_have_the_spread_asked_for(self) -> None:
        spec = TensorSpec("m.weight", (700, 300), 0.25, mean=2.0)
        chunks = list(draw(spec, torch.float32, seed=0, component="c"))
        assert max(c.numel() for c in chunks) <= CHUNK_ELEMENTS
        values = torch.cat(chunks).view(spec.shape)
        assert values.mean().item() == pytest.approx(2.0, abs=0.01)
        assert values.std().item() == pytest.approx(0.25, rel=0.01)
        # Rows are unlike each other, and so are neighbouring values.
        centred = values - values.mean()
        assert (centred[:-1] * centred[1:]).mean().abs() < 1e-3
        assert (centred[:, :-1] * centred[:, 1:]).mean().abs() < 1e-3

    def test_no_two_tensors_are_alike_and_none_is_trivial(self, tiny: Path) -> None:
        tensors = {
            f"{path.parent.name}/{name}": tensor
            for path in tiny.rglob("*.safetensors")
            for name, tensor in load_file(path).items()
        }
        starts = {tuple(t.flatten()[:8].float().tolist()) for t in tensors.values()}
        assert len(starts) == len(tensors)
        counter = tensors.pop("vae/bn.num_batches_tracked")
        assert counter.dtype == torch.int64
        for name, tensor in tensors.items():
            assert tensor.dtype == torch.bfloat16
            assert tensor.isfinite().all()
            assert tensor.float().std() > 1e-3, name
        variance = tensors["vae/bn.running_var"].float()
        assert 0.3 < variance.min() < 0.8
        assert 1.2 < variance.max() < 1.7

    def test_fast_channels_of_the_timestep_are_damped(self, tiny: Path) -> None:
        name = "time_guidance_embed.timestep_embedder.linear_1.weight"
        weight = load_file(tiny / "transformer" / "diffusion_pytorch_model.safetensors")[
            name
        ].float()
        columns = weight.square().mean(0).sqrt()  # [256]: 128 cosines, 128 sines
        for half in columns.chunk(2):
            assert half[:32].max() < 0.02 * half[96:].min()

    def test_a_timestep_rounded_to_bf16_hardly_matters(self, tiny: Path) -> None:
        model = Flux2Transformer2DModel.from_pretrained(tiny / "transformer")
        embed = model.time_guidance_embed
        with torch.inference_mode():
            exact = embed(torch.tensor([955.39, 877.13, 704.1]), None)
            rounded = embed(torch.tensor([956.0, 876.0, 704.0]), None)
            later = embed(torch.tensor([655.0, 577.0, 404.0]), None)
        assert relative(rounded, exact) < 0.02  # measured 0.003
        assert relative(later, exact) > 0.2  # measured 0.6


@pytest.fixture(scope="module")
def load() -> Callable[..., Flux2KleinPipeline]:
    """Loads a directory in the reference, quietly; each directory and dtype once."""
    loaded: dict[tuple[Path, torch.dtype], Flux2KleinPipeline] = {}

    def get(directory: Path, dtype: torch.dtype = torch.float32) -> Flux2KleinPipeline:
        if (directory, dtype) not in loaded:
            pipe = Flux2KleinPipeline.from_pretrained(directory, dtype=dtype)
            pipe.set_progress_bar_config(disable=True)
            loaded[directory, dtype] = pipe
        return loaded[directory, dtype]

    return get


def draw_picture(
    pipe: Flux2KleinPipeline, prompt: str = PROMPT, side_px: int = 64, **arguments: Any
) -> tuple[Tensor, np.ndarray[Any, Any]]:
    """Latents after two steps, and the picture in 0..1; the noise is always the same."""
    noise = torch.randn((1, 128, side_px // 16, side_px // 16), generator=generator())
    taken: list[Tensor] = []
    result = pipe(
        prompt=prompt,
        height=side_px,
        width=side_px,
        num_inference_steps=2,
        latents=noise,
        output_type="np",
        callback_on_step_end=lambda pipe, i, t, tensors: taken.append(tensors["latents"]) or {},
        **arguments,
    )
    return taken[-1], result.images[0]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class TestInTheReference:
    def test_it_draws_a_varied_picture(
        self, tiny: Path, load: Callable[..., Flux2KleinPipeline]
    ) -> None:
        pipe = load(tiny)
        assert pipe.config.is_distilled is True
        latents, picture = draw_picture(pipe, side_px=256)
        assert np.isfinite(picture).all()
        assert (picture.std(axis=(0, 1)) > 0.1).all()  # measured 0.18 to 0.24
        assert ((picture <= 0) | (picture >= 1)).mean() < 0.2  # measured 0.06
        assert 1 < rms(latents) < 2.5  # measured 1.5
        other, _ = draw_picture(pipe, "a blue dog under a tree", side_px=256)
        assert relative(other, latents) > 0.1  # measured 0.2

    def test_activations_stay_sane(
        self, tiny: Path, load: Callable[..., Flux2KleinPipeline]
    ) -> None:
        pipe = load(tiny)
        seen: dict[str, float] = {}

        def watch(name: str) -> Callable[..., None]:
            def hook(module: Any, inputs: Any, output: Any) -> None:
                outputs = output if isinstance(output, tuple) else (output,)
                for i, tensor in enumerate(outputs):
                    seen[f"{name} {i}"] = rms(tensor)

            return hook

        watched = (
            *pipe.transformer.transformer_blocks,
            *pipe.transformer.single_transformer_blocks,
            pipe.transformer.proj_out,
            *pipe.text_encoder.model.layers,
            *pipe.vae.decoder.up_blocks,
        )
        hooks = [m.register_forward_hook(watch(f"{i} {type(m)}")) for i, m in enumerate(watched)]
        draw_picture(pipe)
        for hook in hooks:
            hook.remove()
        assert len(seen) >= len(watched)
        assert all(0.7 < value < 4 for value in seen.values()), seen  # measured 1.0 to 2.7

    def test_bf16_stays_close_to_float32(
        self, tiny: Path, load: Callable[..., Flux2KleinPipeline]
    ) -> None:
        exact, exact_picture = draw_picture(load(tiny))
        rounded, rounded_picture = draw_picture(load(tiny, torch.bfloat16))
        assert relative(rounded, exact) < 0.05  # measured 0.01
        assert np.abs(rounded_picture - exact_picture).mean() < 0.02  # measured 0.003

    def test_base_model_with_small_decoder_and_reference(
        self, tmp_path: Path, load: Callable[..., Flux2KleinPipeline]
    ) -> None:
        directory = write_random_checkpoint(
            tmp_path / "base", architecture=SMALL_DECODER, is_distilled=False, seed=3
        )
        pipe = load(directory)
        assert pipe.config.is_distilled is False
        assert pipe.vae.decoder.conv_in.out_channels == 24
        plain, picture = draw_picture(pipe, guidance_scale=1.0)
        assert np.isfinite(picture).all()
        assert (picture.std(axis=(0, 1)) > 0.1).all()  # measured 0.19
        guided, _ = draw_picture(pipe, guidance_scale=4.0)
        assert relative(guided, plain) > 0.1  # measured 0.65
        ramp = np.linspace(0, 255, 96 * 64 * 3).reshape(96, 64, 3).astype(np.uint8)
        shown, _ = draw_picture(pipe, guidance_scale=1.0, image=Image.fromarray(ramp))
        assert shown.isfinite().all()
        assert relative(shown, plain) > 0.05  # measured 0.14

    def test_encoded_pictures_have_latents_of_order_one(
        self, tiny: Path, load: Callable[..., Flux2KleinPipeline]
    ) -> None:
        vae = load(tiny).vae
        picture = torch.rand((1, 3, 64, 96), generator=generator()) * 2 - 1
        with torch.inference_mode():
            latents = vae.encode(picture).latent_dist.mode()
        assert 0.3 < rms(latents) < 3  # measured 1.1
