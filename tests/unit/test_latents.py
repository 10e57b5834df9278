"""Latents as tokens: packing, positions, noise and the bounded tables, as the reference's."""

from __future__ import annotations

import pytest
import torch
from diffusers import Flux2KleinPipeline
from diffusers.models.transformers.transformer_flux2 import Flux2PosEmbed
from diffusers.utils.torch_utils import randn_tensor
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fluxcore.config import TransformerConfig
from fluxcore.models import Modulation
from fluxcore.pipeline.latents import Grid, draw_noise, pack, position_ids, unpack
from fluxcore.pipeline.tables import Modulations, RopeTables

CPU = torch.device("cpu")
CONFIG = TransformerConfig(
    in_channels=128,
    out_channels=128,
    double_blocks=1,
    single_blocks=1,
    heads=1,
    head_width=32,
    text_width=192,
    mlp_ratio=3.0,
    rope_axes=(8, 4, 12, 8),
    rope_theta=2000.0,
    time_channels=256,
    norm_eps=1e-6,
)
GRIDS = st.tuples(st.integers(1, 20), st.integers(1, 20))


def tables(limit: int = 16, angles: torch.dtype = torch.float64) -> RopeTables:
    return RopeTables(CONFIG, CPU, angles, limit)


@given(grid=GRIDS, batch=st.integers(1, 3), channels=st.integers(1, 5))
def test_unpack_undoes_pack(grid: Grid, batch: int, channels: int) -> None:
    latents = torch.arange(batch * channels * grid[0] * grid[1]).reshape(batch, channels, *grid)
    packed = pack(latents)
    assert packed.shape == (batch, grid[0] * grid[1], channels)
    assert torch.equal(packed, Flux2KleinPipeline._pack_latents(latents))
    assert torch.equal(unpack(packed, grid), latents)


def test_tokens_go_row_by_row() -> None:
    latents = torch.tensor([[[[1, 2, 3], [4, 5, 6]]]])
    assert pack(latents).flatten().tolist() == [1, 2, 3, 4, 5, 6]


@given(grid=GRIDS, references=st.lists(GRIDS, max_size=4))
def test_positions_equal_the_reference(grid: Grid, references: list[Grid]) -> None:
    ids = position_ids(grid, references)
    pipeline = Flux2KleinPipeline
    expected = [pipeline._prepare_text_ids(torch.empty(1, 512, 1))[0]]
    expected.append(pipeline._prepare_latent_ids(torch.empty(1, 1, *grid))[0])
    if references:
        pictures = [torch.empty(1, 1, *reference) for reference in references]
        expected.append(pipeline._prepare_image_ids(pictures)[0])
    assert torch.equal(ids, torch.cat(expected))


def test_positions_are_text_then_picture_then_references() -> None:
    ids = position_ids((2, 2), [(1, 2), (2, 1)]).tolist()
    assert ids[0] == [0, 0, 0, 0]
    assert ids[511] == [0, 0, 0, 511]
    assert ids[512:516] == [[0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 1, 1, 0]]
    assert ids[516:518] == [[10, 0, 0, 0], [10, 0, 1, 0]]
    assert ids[518:] == [[20, 0, 0, 0], [20, 1, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", [(4, 4), (16, 16), (5, 7), (11, 4)])
@pytest.mark.parametrize("seed", [0, 42, 2**63 - 1])
def test_noise_equals_the_reference_in_every_dtype(
    dtype: torch.dtype, grid: Grid, seed: int
) -> None:
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = randn_tensor((1, 128, *grid), generator=generator, device=CPU, dtype=dtype)
    ours = draw_noise(seed, 128, grid)
    assert ours.dtype == torch.float32
    assert torch.equal(ours.to(dtype), Flux2KleinPipeline._pack_latents(drawn))


def test_noise_depends_on_the_seed_and_on_nothing_else() -> None:
    torch.manual_seed(1)
    first = draw_noise(7, 128, (4, 4))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(draw_noise(7, 128, (4, 4)), first)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    assert not torch.equal(draw_noise(8, 128, (4, 4)), first)


@pytest.mark.parametrize("references", [[], [(3, 2)], [(3, 2), (1, 6), (4, 4)]])
def test_tables_equal_the_reference(references: list[Grid]) -> None:
    cos, sin = tables().get((5, 3), references)
    reference = Flux2PosEmbed(theta=2000, axes_dim=list(CONFIG.rope_axes))
    their_cos, their_sin = reference(position_ids((5, 3), references))
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.equal(cos, their_cos)
    # ours have the sign with which the pair's other channel comes in
    assert torch.equal(sin[:, 1::2], their_sin[:, 1::2])
    assert torch.equal(sin[:, ::2], -their_sin[:, ::2])


def test_float32_angles_stay_close_to_float64_ones() -> None:
    """For devices without float64. Positions reach 511; measured: 4.8e-6."""
    exact = tables().get((8, 8), [(4, 4)])
    narrow = tables(angles=torch.float32).get((8, 8), [(4, 4)])
    for a, b in zip(exact, narrow, strict=True):
        assert (a - b).abs().max() < 4e-5


def test_a_table_is_made_once_per_size_and_references() -> None:
    kept = tables()
    first = kept.get((4, 4), [])
    assert kept.get((4, 4), ()) is first
    assert kept.get((4, 4), [(4, 4)]) is not first
    assert kept.get((4, 5), []) is not first
    assert len(kept) == 3


def test_modulations_are_made_once_per_schedule() -> None:
    made: list[Tensor] = []

    def modulation(levels: Tensor) -> list[Modulation]:
        made.append(levels)
        return [Modulation(*level.expand(4)) for level in levels]

    kept = Modulations(modulation, lambda levels: levels, limit=5)
    first = kept.get((1.0, 0.75, 0.5, 0.0), 0)
    assert [float(step.img) for step in first] == [1.0, 0.75, 0.5]
    assert made[0].dtype == torch.float32
    assert kept.get([1.0, 0.75, 0.5, 0.0], 0) is first
    later = kept.get((1.0, 0.75, 0.5, 0.0), 1)
    assert [float(step.img) for step in later] == [0.75, 0.5]
    assert (len(made), len(kept)) == (2, 2)
    # Of another last level only the name is another.
    assert kept.get((0.75, 0.5, 0.25), 0) is later
    kept.get((0.5, 0.0), 0)
    assert len(kept) == 2, "6 steps are more than there is room for"
    assert kept.get((1.0, 0.75, 0.5, 0.0), 0) is not first
    long = tuple(step / 8 for step in range(8, -1, -1))
    assert kept.get(long, 0) is not kept.get(long, 0), "too long to be kept"
    assert len(kept) == 0


def test_tables_are_bounded_and_the_least_recently_used_goes_first() -> None:
    kept = tables(limit=3)
    first = kept.get((1, 1), [])
    second = kept.get((1, 2), [])
    kept.get((1, 3), [])
    assert kept.get((1, 1), []) is first  # now the second is the oldest
    kept.get((1, 4), [])
    assert len(kept) == 3
    assert kept.get((1, 1), []) is first
    assert kept.get((1, 2), []) is not second
    for width in range(1, 60):
        kept.get((2, width), [])
        assert len(kept) == 3
