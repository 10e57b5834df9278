"""The optimisers of the demo's training: Muon for matrices, AdamW for the rest.

Muon orthogonalises the momentum of each matrix. Here matrices of one shape are
orthogonalised together, because the text encoder has 27 layers of small ones and
one by one the GPU would wait for the host.

Source: Keller Jordan, github.com/KellerJordan/Muon (MIT); its step is scaled to
AdamW's as in "Muon is Scalable for LLM Training", arXiv 2502.16982.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

ADAMW_RMS = 0.2
"""Root mean square of an AdamW step at learning rate 1, about."""


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, about.

    Shapes: [N, A, B] -> [N, A, B], bfloat16 but on a processor, which may multiply it slowly.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices if matrices.device.type == "cpu" else matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) * 1.02 + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised. For matrices inside of blocks only."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shaped: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                shaped[tuple(parameter.shape)].append(parameter)
            for shape, parameters in shaped.items():
                self._step_alike(shape, parameters, group["lr"], group["momentum"])

    def _step_alike(
        self, shape: tuple[int, ...], parameters: list[nn.Parameter], lr: float, momentum: float
    ) -> None:
        gradients = torch.stack([p.grad for p in parameters if p.grad is not None])
        state = self.state[parameters[0]]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradients)
        state["momentum"].lerp_(gradients, 1 - momentum)
        update = orthogonalise(gradients.lerp_(state["momentum"], momentum))
        scale = ADAMW_RMS * max(shape) ** 0.5
        torch._foreach_add_(parameters, list(update.to(torch.float32)), alpha=-lr * scale)


def make_optimisers(
    modules: Iterable[nn.Module], matrix_lr: float, other_lr: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of numbered blocks and layers, AdamW for everything else."""
    matrices, others = [], []
    for module in modules:
        for name, parameter in module.named_parameters():
            in_block = any(part.isdigit() for part in name.split("."))
            (matrices if in_block and parameter.ndim == 2 else others).append(parameter)
    return [
        Muon(matrices, lr=matrix_lr),
        torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
