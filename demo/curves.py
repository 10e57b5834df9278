"""Training's numbers as one picture.

    python -m demo.curves .models/training docs/training.png

Reads the JSON lines that the training programs leave behind. Needs matplotlib
(``pip install '.[demo]'``).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

PROGRAMS = ("vae", "flow", "long", "distilled", "later", "sizes")
TITLES = {
    "vae": "autoencoder: PSNR of training batches, dB",
    "flow": "flow matching, 64 text tokens: loss",
    "long": "flow matching, 512 text tokens: loss",
    "distilled": "distillation to 4 steps: loss",
    "later": "flow matching, more of what is hard: loss",
    "sizes": "flow matching, other sizes: loss",
}


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The steps of one run, in order."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def draw(axes: Axes, name: str, rows: list[dict[str, Any]]) -> None:
    """One program's curves: a line for each kind of batch."""
    prefix = "train_psnr" if name == "vae" else "loss_"
    for key in sorted({k for row in rows for k in row if k.startswith(prefix)}):
        steps = [row["step"] for row in rows if key in row]
        values = [row[key] for row in rows if key in row]
        axes.plot(steps, values, ".-", linewidth=1, markersize=3, label=key.removeprefix("loss_"))
    axes.set_title(TITLES[name], fontsize=9)
    axes.set_xlabel("step", fontsize=8)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)
    if name != "vae":
        axes.set_yscale("log")
        axes.legend(fontsize=8)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Draw the curves of training.")
    parser.add_argument("runs", type=Path, help="the folder with vae.jsonl, flow.jsonl ...")
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    figure, grid = plt.subplots(3, 2, figsize=(9, 9), dpi=100)
    for axes, name in zip(grid.flat, PROGRAMS, strict=True):
        draw(axes, name, rows_of(arguments.runs / f"{name}.jsonl"))
    figure.tight_layout()
    figure.savefig(arguments.picture)


if __name__ == "__main__":
    main()
