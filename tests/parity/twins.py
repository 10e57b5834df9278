"""One checkpoint loaded twice, by fluxcore and by diffusers, and watched stage by stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import Flux2KleinInpaintPipeline, Flux2KleinPipeline
from PIL import Image
from torch import Tensor, nn

from fluxcore import FluxPipeline, GenerationParams
from fluxcore.config import TEXT_TOKENS
from fluxcore.pipeline import GenerationResult

Record = dict[str, list[Tensor]]


@dataclass
class Twins:
    """Ours and the reference, on the CPU in one dtype."""

    ours: FluxPipeline
    reference: Flux2KleinPipeline
    stages: list[tuple[str, nn.Module, nn.Module]] = field(init=False)

    @classmethod
    def load(cls, directory: Path, dtype: str) -> Twins:
        ours = FluxPipeline.load(directory, device="cpu", dtype=dtype)
        reference = Flux2KleinPipeline.from_pretrained(
            directory, dtype=getattr(torch, dtype), local_files_only=True
        )
        reference.set_progress_bar_config(disable=True)
        return cls(ours, reference)

    def __post_init__(self) -> None:
        ours, ref = self.ours, self.reference
        self.stages = [("text.embedding", ours.text_encoder.embedding, _embedding(ref))]
        self.stages += _paired(
            "text.layer", ours.text_encoder.layers, ref.text_encoder.model.layers
        )
        transformer, their = ours.transformer, ref.transformer
        self.stages += [
            ("img_in", transformer.img_in, their.x_embedder),
            ("txt_in", transformer.txt_in, their.context_embedder),
            ("img_out", transformer.img_out, their.proj_out),
        ]
        self.stages += _paired("double", transformer.double_blocks, their.transformer_blocks)
        self.stages += _paired("single", transformer.single_blocks, their.single_transformer_blocks)
        for half, levels in (("encoder", "down_blocks"), ("decoder", "up_blocks")):
            mine, theirs = getattr(ours.vae, half), getattr(ref.vae, half)
            self.stages += _paired(f"vae.{half}.level", mine.levels, getattr(theirs, levels))
            self.stages += [
                (f"vae.{half}.middle", mine.middle, theirs.mid_block),
                (f"vae.{half}.out", mine.conv_out, theirs.conv_out),
            ]

    def draw_ours(self, params: GenerationParams) -> tuple[GenerationResult, Record]:
        record: Record = {"latents": []}
        self.ours.conditioning_cache.clear()
        with _watching([(name, ours) for name, ours, _ in self.stages], record):
            result = self.ours.generate(
                params, on_step=lambda step, _: record["latents"].append(step.latents.clone())
            )
        return result, record

    def draw_reference(self, params: GenerationParams) -> tuple[Image.Image, Record]:
        """The same request, in diffusers' words."""
        record: Record = {"latents": []}
        pipe: Any = self.reference
        words: dict[str, Any] = {"height": params.height, "width": params.width}
        references = list(params.references)
        if params.mask is not None:
            pipe = Flux2KleinInpaintPipeline(
                **self.reference.components, is_distilled=self.reference.config.is_distilled
            )
            pipe.set_progress_bar_config(disable=True)
            words = {
                "image": references[0],
                "mask_image": params.mask,
                "strength": params.strength,
            }
            if references[1:]:
                words["image_reference"] = references[1:]
        elif references:
            words["image"] = references
        if params.negative_prompt is not None:
            words["negative_prompt_embeds"] = pipe.encode_prompt(params.negative_prompt)[0]

        def keep(_: Any, __: int, ___: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
            record["latents"].append(values["latents"].clone())
            return {}

        with _watching([(name, theirs) for name, _, theirs in self.stages], record):
            image = pipe(
                prompt=params.prompt,
                num_inference_steps=params.steps,
                guidance_scale=4.0 if params.guidance is None else params.guidance,
                generator=torch.Generator("cpu").manual_seed(params.seed or 0),
                callback_on_step_end=keep,
                **words,
            ).images[0]
        return image, record


def _embedding(reference: Flux2KleinPipeline) -> nn.Module:
    found: nn.Module = reference.text_encoder.model.embed_tokens
    return found


def _paired(
    name: str, ours: nn.ModuleList, theirs: nn.ModuleList
) -> list[tuple[str, nn.Module, nn.Module]]:
    return [(f"{name}.{i}", a, b) for i, (a, b) in enumerate(zip(ours, theirs, strict=False))]


@contextmanager
def _watching(modules: list[tuple[str, nn.Module]], record: Record) -> Iterator[None]:
    """Keep every output of every module. Double blocks: [txt, img] in either order."""
    with ExitStack() as hooks:
        for name, module in modules:
            record.setdefault(name, [])

            def keep(module: nn.Module, _: Any, output: Any, name: str = name) -> None:
                if isinstance(output, tuple):
                    ours = type(module).__module__.startswith("fluxcore")
                    txt, img = (output[1], output[0]) if ours else output
                    output = torch.cat((txt, img), dim=1)
                record[name].append(output.clone())

            hooks.callback(module.register_forward_hook(keep).remove)
        yield


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference over that of the reference."""
    difference = (ours.double() - reference.double()).norm()
    return float(difference / reference.double().norm().clamp_min(1e-30))


def worst_errors(ours: Record, reference: Record) -> dict[str, float]:
    """Largest relative error of each stage over all its calls."""
    worst = {}
    for name, theirs in reference.items():
        mine = ours[name]
        if name == "img_out":  # ours leaves out the references' tokens, which nobody reads
            theirs = [b[:, : a.shape[1]] for a, b in zip(mine, theirs, strict=False)]
        if name.startswith("single."):  # nor does ours compute any other row of the last block
            asked = [slice(TEXT_TOKENS, TEXT_TOKENS + a.shape[1]) for a in mine]
            pairs = zip(mine, theirs, asked, strict=False)
            theirs = [b if a.shape == b.shape else b[:, rows] for a, b, rows in pairs]
        if name.startswith("text."):  # a negative prompt is encoded out of sight on their side
            mine, theirs = mine[: len(theirs)], theirs[: len(mine)]
        if name == "txt_in":  # ours projects each prompt once, theirs the same again in each step
            mine = mine * (len(theirs) // len(mine))
        assert len(mine) == len(theirs), f"{name}: {len(mine)} calls, reference {len(theirs)}"
        if theirs:
            worst[name] = max(relative_error(a, b) for a, b in zip(mine, theirs, strict=True))
    return worst


def byte_differences(ours: Image.Image, reference: Image.Image) -> np.ndarray:
    """Absolute difference of the 8-bit values."""
    assert ours.size == reference.size
    a, b = (np.asarray(image).astype(int) for image in (ours, reference))
    difference: np.ndarray = np.abs(a - b)
    return difference


def painting(width: int, height: int, seed: int) -> Image.Image:
    """A smooth colourful picture with some detail."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def disc_mask(width: int, height: int) -> Image.Image:
    """White disc in the middle, black around it."""
    y, x = np.mgrid[:height, :width]
    inside = (x - width / 2) ** 2 + (y - height / 2) ** 2 < (min(width, height) / 3) ** 2
    return Image.fromarray((inside * 255).astype(np.uint8))
