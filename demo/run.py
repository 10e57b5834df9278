"""What every training program here does alike: GPUs, gradients, averages, curves, saving.

Owns nothing of what is trained. Several GPUs: start with ``torchrun --nproc-per-node N``;
each gets batches of its own, and gradients are averaged.
"""

from __future__ import annotations

import json
import os
import pickle
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fluxcore import FluxPipeline
from fluxcore.errors import CheckpointError, CheckpointFileError, CheckpointNotFoundError


@dataclass(slots=True)
class Run:
    """One process of a training run, and its place among the others."""

    device: torch.device
    rank: int
    world: int
    started_s: float = field(default_factory=time.monotonic)

    @classmethod
    def start(cls, seed: int) -> Run:
        """Join the other processes, if ``torchrun`` started any."""
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
            torch.backends.cuda.matmul.allow_tf32 = True
        if world > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        torch.manual_seed(seed)  # the same start everywhere
        return cls(device, rank, world)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_s

    def progress(self, step: int, steps: int, seconds: float) -> float:
        """How far the run is, by steps or by time, whichever is further; from 0 to 1.

        All processes must hear the same, so the first one's clock counts.
        """
        done = max(step / steps, self.elapsed_s() / seconds)
        if self.world > 1:
            shared = torch.tensor(done, device=self.device)
            dist.broadcast(shared, 0)
            done = float(shared)
        return min(done, 1.0)

    def say(self, text: str) -> None:
        if self.is_first:
            print(f"[{self.elapsed_s():6.1f} s] {text}", flush=True)

    def end(self) -> None:
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()


class Gradients:
    """All gradients in one piece of memory, averaged over the GPUs in one go and clipped."""

    def __init__(self, modules: Iterable[nn.Module], run: Run, largest_norm: float) -> None:
        self._parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
        self._flat = torch.zeros(sum(p.numel() for p in self._parameters), device=run.device)
        self._run, self._largest_norm = run, largest_norm
        offset = 0
        for parameter in self._parameters:
            part = self._flat[offset : offset + parameter.numel()]
            parameter.grad = part.view_as(parameter)
            offset += parameter.numel()

    def clear(self) -> None:
        self._flat.zero_()

    def finish(self) -> Tensor:
        """Average and clip; returns the norm before clipping. Shapes: -> []."""
        if self._run.world > 1:
            dist.all_reduce(self._flat)
            self._flat.div_(self._run.world)
        norm = self._flat.norm()
        self._flat.mul_((self._largest_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm


class Average:
    """The exponential moving average of networks' parameters, which is what is kept."""

    def __init__(self, modules: Sequence[nn.Module], decay: float) -> None:
        self._parameters = [p for m in modules for p in m.parameters()]
        self._averages = [p.detach().clone() for p in self._parameters]
        self._decay, self._steps = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        self._steps += 1
        decay = min(self._decay, self._steps / (self._steps + 10))
        torch._foreach_lerp_(self._averages, self._parameters, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Put the averages into the networks and keep what was there; again to undo."""
        for parameter, average in zip(self._parameters, self._averages, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)


class Curve:
    """Numbers over steps, one JSON object a line. Device numbers are read only when written."""

    def __init__(self, path: Path, run: Run) -> None:
        self._run = run
        self._path = path
        if run.is_first:
            path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, step: int, **values: float | Tensor) -> None:
        if not self._run.is_first:
            return
        row = {"step": step, "seconds": round(self._run.elapsed_s(), 2)}
        row |= {name: round(float(value), 6) for name, value in values.items()}
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        self._run.say("  ".join(f"{name} {value:g}" for name, value in row.items()))


def set_lr(optimisers: Iterable[torch.optim.Optimizer], share: float) -> None:
    """Scale every group's learning rate from its starting value."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group.setdefault("full_lr", group["lr"])
            group["lr"] = group["full_lr"] * share


def trapezoid(progress: float, step: int, warm_up: int, decay_from: float) -> float:
    """Learning rate share: up over ``warm_up`` steps, level, then down to 0 at the end."""
    down = (1.0 - progress) / max(1e-9, 1.0 - decay_from)
    return max(0.0, min(1.0, (step + 1) / warm_up, down))


def save(path: Path, **modules: nn.Module) -> None:
    """Networks as one file, in bfloat16, written aside and then moved."""
    path.parent.mkdir(parents=True, exist_ok=True)
    states = {
        name: {key: value.to("cpu", torch.bfloat16) for key, value in module.state_dict().items()}
        for name, module in modules.items()
    }
    partial = path.with_suffix(".partial")
    torch.save(states, partial)
    partial.replace(path)


def load(path: Path, **modules: nn.Module) -> None:
    """Undo ``save``; a file with more networks than asked for is fine.

    Args:
        path: a file that ``save`` wrote, or a checkpoint directory, to go on from what ships.
        modules: transformer, text_encoder and vae, whichever are wanted.

    Raises:
        CheckpointError: the file is not there, is no such file or lacks a network.
    """
    if path.is_dir():
        pipe = FluxPipeline.load(path, device="cpu", dtype="float32")
        states = {name: getattr(pipe, name).state_dict() for name in modules}
    else:
        states = _states_of(path)
        if missing := sorted(modules.keys() - states.keys()):
            raise CheckpointError(
                f"{path} must hold {', '.join(missing)}; it holds {', '.join(states)}: name a "
                "file of the program that trains it"
            )
    for name, module in modules.items():
        module.load_state_dict({key: value.float() for key, value in states[name].items()})


def _states_of(path: Path) -> dict[str, dict[str, Tensor]]:
    """The networks that a file of ``save`` holds, by name."""
    if not path.is_file():
        raise CheckpointNotFoundError(f"{path} is not there; the program before this one writes it")
    try:
        states: object = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointFileError(f"{path} is not a file that training wrote") from error
    if not isinstance(states, dict) or not all(isinstance(s, dict) for s in states.values()):
        raise CheckpointFileError(f"{path} is not a file that training wrote")
    return states
