"""Muon steps against the gradient, as far as it says, and finds what it looks for."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from demo.optimisers import ADAMW_RMS, Muon, orthogonalise

SHAPES = ((8, 8), (8, 8), (12, 6), (6, 12))
"""Of one shape, which are stepped together, tall and wide."""


def parameters(seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 64, 32), (2, 32, 96)):
        values = torch.linalg.svdvals(
            orthogonalise(torch.randn(shape, generator=generator)).float()
        )
        assert float(values.min()) > 0.5 and float(values.max()) < 1.4


def test_orthogonalising_keeps_the_directions_of_a_matrix() -> None:
    """Its singular vectors, with their signs: the nearest one is U V^T."""
    matrices = torch.randn((3, 16, 8), generator=torch.Generator().manual_seed(1))
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    along = (u.mT @ orthogonalise(matrices) @ v.mT).diagonal(dim1=1, dim2=2)
    assert float(along.min()) > 0.5


def test_the_first_step_goes_against_the_gradient_of_each_matrix() -> None:
    """It is the gradient orthogonalised, of the root mean square that AdamW's would have."""
    moved, gradients = parameters(2), [p.detach() for p in parameters(3)]
    before = [parameter.detach().clone() for parameter in moved]
    for parameter, gradient in zip(moved, gradients, strict=True):
        parameter.grad = gradient.clone()
    Muon(moved, lr=0.01).step()
    for was, parameter, gradient in zip(before, moved, gradients, strict=True):
        step = parameter.detach() - was
        assert float(torch.cosine_similarity(step.flatten(), gradient.flatten(), dim=0)) < -0.7
        rms = float(step.square().mean().sqrt())
        assert rms == pytest.approx(0.01 * ADAMW_RMS, rel=0.3)


def test_steps_find_the_matrices_that_a_loss_is_least_at() -> None:
    moved, targets = parameters(4), [p.detach() for p in parameters(5)]
    muon = Muon(moved, lr=0.5)
    losses = []
    for _ in range(20):
        muon.zero_grad()
        pairs = zip(moved, targets, strict=True)
        loss = torch.stack([(a - b).square().mean() for a, b in pairs]).sum()
        loss.backward()
        muon.step()
        losses.append(loss.item())
    assert all(later < earlier for earlier, later in pairwise(losses))
    assert losses[-1] < losses[0] / 10


def test_momentum_goes_on_where_a_gradient_ends() -> None:
    moved = [nn.Parameter(torch.zeros(8, 8))]
    muon = Muon(moved, lr=0.01)
    gradient = torch.randn((8, 8), generator=torch.Generator().manual_seed(6))
    moved[0].grad = gradient
    muon.step()
    first = moved[0].detach().clone()
    moved[0].grad = torch.zeros(8, 8)
    muon.step()
    second = moved[0].detach() - first
    assert torch.allclose(second, first, atol=1e-4)
