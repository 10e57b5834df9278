"""What eight bits do to the bundled model's pictures: each is drawn in both, and judged.

    python loadtest/precision_quality.py --precision int8 --captions 300 --edits 90

The same held-out captions, edits and seeds as in ``demo.exam``; the other pictures are drawn in
bfloat16. On a CPU fp8 products are the plain form's: the same rounded values, multiplied in
float32. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter

import torch

from demo.exam import Question, held_out_captions, held_out_edits
from fluxcore import FluxPipeline
from fluxcore.runtime.quantised import FORMATS, PLAIN_FP8, quantise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", choices=list(FORMATS), default="fp8")
    parser.add_argument("--captions", type=int, default=300)
    parser.add_argument("--edits", type=int, default=90)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=3600, help="ends after so long")
    args = parser.parse_args()
    exact, rough = FluxPipeline.load(device=args.device, dtype="bfloat16"), rounded(args)
    captions = [Question(*numbered) for numbered in enumerate(held_out_captions(args.captions))]
    edits = [Question(*numbered) for numbered in enumerate(held_out_edits(args.edits))]
    # Mixed, so that a run that ends early has seen both.
    share = len(captions) / max(1, len(edits))
    order = {id(q): q.seed for q in captions} | {id(q): q.seed * share for q in edits}
    found: Counter[str] = Counter()
    distances = []
    end_s = time.monotonic() + args.seconds
    for question in sorted((*captions, *edits), key=lambda q: order[id(q)]):
        (is_right, latents), (is_still, others) = (drawn(p, question) for p in (exact, rough))
        found["pictures"] += 1
        found["bf16"] += is_right
        found[args.precision] += is_still
        found["bf16 only"] += is_right and not is_still
        found[f"{args.precision} only"] += is_still and not is_right
        distances.append(float((latents - others).norm() / latents.norm()))
        if time.monotonic() > end_s:
            break
    print(json.dumps({**found, "latents, relative, median": statistics.median(distances)}))


def rounded(args: argparse.Namespace) -> FluxPipeline:
    """The bundled model in eight bits."""
    if (args.precision, args.device) != ("fp8", "cpu"):
        return FluxPipeline.load(device=args.device, dtype="bfloat16", precision=args.precision)
    pipe = FluxPipeline.load(device="cpu", dtype="bfloat16", kernels="plain")
    quantise((*pipe.transformer.double_blocks, *pipe.transformer.single_blocks), PLAIN_FP8)
    return pipe


def drawn(pipe: FluxPipeline, question: Question) -> tuple[bool, torch.Tensor]:
    """Whether the picture is right, and its latents."""
    kept: list[torch.Tensor] = []
    params = question.params(steps=4)
    image = pipe.generate(params, on_step=lambda step, _: kept.append(step.latents)).images[0]
    return question.verdict(image).is_right, kept[-1].double()


if __name__ == "__main__":
    main()
