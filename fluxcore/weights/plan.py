"""Which published tensors make up each parameter of our networks.

A plan is pure data, made from the configs: it fuses q, k and v, gate and up,
and all modulation matrices, by stacking published tensors along their first
dimension. Source of the names: the published checkpoints of
black-forest-labs/FLUX.2-klein-4B and the diffusers and transformers modules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fluxcore.config import Qwen3Config, TransformerConfig, VaeConfig

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """One published tensor, and the shape that the config calls for."""

    name: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """Our parameter names, each with the published tensors stacked to make it.

    Attributes:
        parts: parameter name -> sources, stacked along dimension 0.
        unused: prefixes of published names that are known and deliberately not read.
    """

    parts: dict[str, tuple[Source, ...]]
    unused: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """How many numbers the network has."""
        return sum(self.elements(name) for name in self.parts)

    def elements(self, name: str) -> int:
        """How many numbers one parameter has."""
        return sum(math.prod(source.shape) for source in self.parts[name])


def transformer_plan(config: TransformerConfig) -> WeightPlan:
    """Source: diffusers Flux2Transformer2DModel."""
    width, mlp = config.width, config.mlp_width
    square, head = (width, width), (config.head_width,)
    parts: dict[str, tuple[Source, ...]] = {}

    def put(ours: str, *sources: tuple[str, Shape]) -> None:
        parts[ours] = tuple(Source(name, shape) for name, shape in sources)

    embedder = "time_guidance_embed.timestep_embedder"
    put("time_in.weight", (f"{embedder}.linear_1.weight", (width, config.time_channels)))
    put("time_out.weight", (f"{embedder}.linear_2.weight", square))
    put(
        "modulations.weight",
        ("double_stream_modulation_img.linear.weight", (6 * width, width)),
        ("double_stream_modulation_txt.linear.weight", (6 * width, width)),
        ("single_stream_modulation.linear.weight", (3 * width, width)),
        ("norm_out.linear.weight", (2 * width, width)),
    )
    put("img_in.weight", ("x_embedder.weight", (width, config.in_channels)))
    put("txt_in.weight", ("context_embedder.weight", (width, config.text_width)))
    put("img_out.weight", ("proj_out.weight", (config.out_channels, width)))
    for i in range(config.double_blocks):
        theirs = f"transformer_blocks.{i}"
        for stream, qkv, norm, out, feed in (
            ("img", "to_{}", "norm_{}", "to_out.0", "ff"),
            ("txt", "add_{}_proj", "norm_added_{}", "to_add_out", "ff_context"),
        ):
            ours = f"double_blocks.{i}.{stream}"
            attn = f"{theirs}.attn"
            put(f"{ours}.qkv.weight", *((f"{attn}.{qkv.format(x)}.weight", square) for x in "qkv"))
            norms = ((f"{attn}.{norm.format(x)}.weight", head) for x in "qk")
            put(f"{ours}.qk_norm.weight", *norms)
            put(f"{ours}.out.weight", (f"{attn}.{out}.weight", square))
            put(f"{ours}.mlp_in.weight", (f"{theirs}.{feed}.linear_in.weight", (2 * mlp, width)))
            put(f"{ours}.mlp_out.weight", (f"{theirs}.{feed}.linear_out.weight", (width, mlp)))
    for i in range(config.single_blocks):
        ours, attn = f"single_blocks.{i}", f"single_transformer_blocks.{i}.attn"
        put(
            f"{ours}.qkv_mlp.weight",
            (f"{attn}.to_qkv_mlp_proj.weight", (3 * width + 2 * mlp, width)),
        )
        put(f"{ours}.qk_norm.weight", *((f"{attn}.norm_{x}.weight", head) for x in "qk"))
        put(f"{ours}.out.weight", (f"{attn}.to_out.weight", (width, width + mlp)))
    return WeightPlan(parts)


def qwen3_plan(config: Qwen3Config) -> WeightPlan:
    """Source: transformers Qwen3ForCausalLM; layers above the conditioning's are left out."""
    width, head = config.width, config.head_width
    parts: dict[str, tuple[Source, ...]] = {
        "embedding.weight": (Source("model.embed_tokens.weight", (config.vocabulary, width)),)
    }
    for i in range(config.used_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        attn, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        parts |= {
            f"{ours}.attention_norm.weight": (
                Source(f"{theirs}.input_layernorm.weight", (width,)),
            ),
            f"{ours}.attention.qkv.weight": (
                Source(f"{attn}.q_proj.weight", (config.heads * head, width)),
                Source(f"{attn}.k_proj.weight", (config.kv_heads * head, width)),
                Source(f"{attn}.v_proj.weight", (config.kv_heads * head, width)),
            ),
            f"{ours}.attention.q_norm.weight": (Source(f"{attn}.q_norm.weight", (head,)),),
            f"{ours}.attention.k_norm.weight": (Source(f"{attn}.k_norm.weight", (head,)),),
            f"{ours}.attention.out.weight": (
                Source(f"{attn}.o_proj.weight", (width, config.heads * head)),
            ),
            f"{ours}.mlp_norm.weight": (
                Source(f"{theirs}.post_attention_layernorm.weight", (width,)),
            ),
            f"{ours}.gate_up.weight": (
                Source(f"{mlp}.gate_proj.weight", (config.mlp_width, width)),
                Source(f"{mlp}.up_proj.weight", (config.mlp_width, width)),
            ),
            f"{ours}.down.weight": (Source(f"{mlp}.down_proj.weight", (width, config.mlp_width)),),
        }
    above = tuple(f"model.layers.{i}." for i in range(config.used_layers, config.layers))
    if config.final_norm:
        parts["final_norm.weight"] = (Source("model.norm.weight", (width,)),)
        return WeightPlan(parts, unused=("lm_head.",))
    return WeightPlan(parts, unused=(*above, "model.norm.", "lm_head."))


def vae_plan(config: VaeConfig) -> WeightPlan:
    """Source: diffusers AutoencoderKLFlux2."""
    parts: dict[str, tuple[Source, ...]] = {}

    def affine(ours: str, theirs: str, shape: Shape) -> None:
        parts[f"{ours}.weight"] = (Source(f"{theirs}.weight", shape),)
        parts[f"{ours}.bias"] = (Source(f"{theirs}.bias", shape[:1]),)

    def residual(ours: str, theirs: str, channels_in: int, channels_out: int) -> None:
        affine(f"{ours}.norm1", f"{theirs}.norm1", (channels_in,))
        affine(f"{ours}.conv1", f"{theirs}.conv1", (channels_out, channels_in, 3, 3))
        affine(f"{ours}.norm2", f"{theirs}.norm2", (channels_out,))
        affine(f"{ours}.conv2", f"{theirs}.conv2", (channels_out, channels_out, 3, 3))
        if channels_in != channels_out:
            affine(f"{ours}.shortcut", f"{theirs}.conv_shortcut", (channels_out, channels_in, 1, 1))

    def middle(ours: str, theirs: str, channels: int) -> None:
        residual(f"{ours}.first", f"{theirs}.resnets.0", channels, channels)
        residual(f"{ours}.second", f"{theirs}.resnets.1", channels, channels)
        if not config.mid_attention:
            return
        attn = f"{theirs}.attentions.0"
        affine(f"{ours}.attention.norm", f"{attn}.group_norm", (channels,))
        for kind, shape in (("weight", (channels, channels)), ("bias", (channels,))):
            parts[f"{ours}.attention.qkv.{kind}"] = tuple(
                Source(f"{attn}.to_{x}.{kind}", shape) for x in "qkv"
            )
        affine(f"{ours}.attention.out", f"{attn}.to_out.0", (channels, channels))

    def half(ours: str, levels: str, resample: str, widths: Shape, blocks: int) -> None:
        previous = widths[0]
        for i, width in enumerate(widths):
            for j in range(blocks):
                residual(
                    f"{ours}.levels.{i}.blocks.{j}",
                    f"{ours}.{levels}.{i}.resnets.{j}",
                    previous,
                    width,
                )
                previous = width
            if i < len(widths) - 1:
                affine(
                    f"{ours}.levels.{i}.resample.conv",
                    f"{ours}.{levels}.{i}.{resample}.0.conv",
                    (width, width, 3, 3),
                )

    image, latent = config.image_channels, config.latent_channels
    down, up = config.encoder_channels, tuple(reversed(config.decoder_channels))
    affine("encoder.conv_in", "encoder.conv_in", (down[0], image, 3, 3))
    half("encoder", "down_blocks", "downsamplers", down, config.layers_per_block)
    middle("encoder.middle", "encoder.mid_block", down[-1])
    affine("encoder.norm_out", "encoder.conv_norm_out", (down[-1],))
    affine("encoder.conv_out", "encoder.conv_out", (2 * latent, down[-1], 3, 3))
    affine("decoder.conv_in", "decoder.conv_in", (up[0], latent, 3, 3))
    middle("decoder.middle", "decoder.mid_block", up[0])
    half("decoder", "up_blocks", "upsamplers", up, config.layers_per_block + 1)
    affine("decoder.norm_out", "decoder.conv_norm_out", (up[-1],))
    affine("decoder.conv_out", "decoder.conv_out", (image, up[-1], 3, 3))
    if config.quant_conv:
        affine("quant_conv", "quant_conv", (2 * latent, 2 * latent, 1, 1))
    if config.post_quant_conv:
        affine("post_quant_conv", "post_quant_conv", (latent, latent, 1, 1))
    parts["latent_mean"] = (Source("bn.running_mean", (config.token_channels,)),)
    parts["latent_variance"] = (Source("bn.running_var", (config.token_channels,)),)
    return WeightPlan(parts, unused=("bn.num_batches_tracked",))
