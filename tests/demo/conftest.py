"""A demo model as it is before training: its tokenizer, its networks, its export."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from demo.architecture import DEMO, build_modules
from demo.batches import Examples, Kind
from demo.export import export_checkpoint
from demo.tokenizer import train_tokenizer

COLOURS = ("red", "crimson", "blue", "navy blue", "green", "yellow", "orange", "white")
SHAPES = ("circle", "disc", "square", "triangle", "star", "hexagon", "ring", "cross")
PLACES = ("in the center", "at the top left", "at the bottom", "to the right of a black heart")


def captions() -> Iterator[str]:
    """Sentences of the kind that the demo model is asked."""
    for colour in COLOURS:
        for shape in SHAPES:
            for place in PLACES:
                yield f"a large {colour} {shape} {place} on a white background"
                yield f"{shape}, {colour}, small, {place}"


class Few(Examples):
    """Batches of two: a processor learns from each as it would from many, and sooner."""

    def size_of(self, kind: Kind) -> int:
        return 2


Networks = tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module]


@pytest.fixture(scope="session")
def demo_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "tokenizer"
    train_tokenizer(captions(), directory)
    return directory


@pytest.fixture(scope="session")
def demo_networks() -> Networks:
    """Transformer, text encoder and VAE with random weights, none of them at its start value."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        networks = build_modules(DEMO)
        with torch.no_grad():
            for network in networks:
                for parameter in network.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.01)
        vae = networks[2]
        vae.latent_mean.normal_()
        vae.latent_variance.uniform_(0.5, 1.5)
    return networks


@pytest.fixture(scope="session")
def exported(
    demo_tokenizer: Path, demo_networks: Networks, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The networks as a checkpoint in bfloat16."""
    directory = tmp_path_factory.mktemp("demo") / "exported"
    return export_checkpoint(directory, DEMO, *demo_networks, demo_tokenizer)
