"""What a slice of work takes, in seconds, and which slices a job still needs.

Owns the measured costs and the first guesses that stand in until something has been
measured. Knows nothing of queues or threads.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from app.engine.contract import Resolved
from app.engine.previews import preview_steps
from fluxcore.config import TEXT_TOKENS
from fluxcore.fitting import fitted_size
from fluxcore.params import SIZE_MULTIPLE, GenerationParams

# The weight of the newest measurement in the running mean, once there are a few.
NEWEST_WEIGHT = 0.3
# A mean that has moved by less than this is not worth ordering all jobs anew.
NOTABLE_CHANGE = 0.1
# No clock tells less apart, in seconds.
SHORTEST_S = 1e-6
# Sizes remembered per stage; the one that was measured longest ago goes first.
SIZES_KEPT = 64
# At so many tokens attention costs as much as all matrices of a step: it grows with their square.
EQUAL_TOKENS = 16384

# What is taken for the cost of one slice before any has been measured: 512x512, in seconds.
_GUESS_SIZE = {"text": 1, "references": 1024, "denoise": TEXT_TOKENS + 1024, "decode": 512 * 512}
_GUESS_S = {"text": 0.3, "references": 0.7, "denoise": 1.0, "decode": 0.7}


class Unit(NamedTuple):
    """One kind of slice.

    Attributes:
        stage: text, references, denoise or decode.
        size: pixels for decode, 1 for text, else tokens.
        times: how often the slice does it: guidance takes two passes.
    """

    stage: str
    size: int
    times: int = 1

    @property
    def work(self) -> float:
        """Grows with the size as the cost does, in a unit of its own per stage."""
        if self.stage == "denoise":
            return self.size * (1 + self.size / EQUAL_TOKENS)
        return float(self.size)


@dataclass(slots=True)
class _Mean:
    """``told`` is what estimates use; it follows ``mean`` in notable steps."""

    mean: float
    told: float
    count: int = 1


class CostModel:
    """Seconds per slice, measured where possible.

    Attributes:
        version: grows whenever an estimate has changed.
        is_measured: whether any estimate rests on this machine and this model.
    """

    def __init__(self) -> None:
        self.version = 0
        self.is_measured = False
        self._means: dict[str, OrderedDict[int, _Mean]] = {
            stage: OrderedDict() for stage in _GUESS_S
        }
        # How much slower than the first guesses this machine is: what was measured of
        # stages as they were first seen, and what had been guessed.
        self._learnt_s = self._guessed_s = 0.0

    def observe(self, unit: Unit, took_s: float) -> None:
        """A slice was done in so many seconds."""
        self.is_measured = True
        means = self._means[unit.stage]
        each_s = took_s / unit.times
        known = means.get(unit.size)
        if known is None:
            if not means:
                self._learn(took_s, [unit])
            means[unit.size] = _Mean(each_s, each_s)
            if len(means) > SIZES_KEPT:
                means.popitem(last=False)
            self.version += 1
            return
        means.move_to_end(unit.size)
        known.count += 1
        known.mean += max(NEWEST_WEIGHT, 1 / known.count) * (each_s - known.mean)
        if abs(known.mean - known.told) > NOTABLE_CHANGE * known.told:
            known.told = known.mean
            self.version += 1

    def calibrate(self, width: int, height: int, took_s: float) -> None:
        """One warm-up picture of one step took so long: the first guesses follow from it."""
        units = (
            Unit("text", 1),
            Unit("denoise", _tokens(width, height)),
            Unit("decode", width * height),
        )
        # What came before was the device's first work, which is slower than the rest.
        self._learnt_s = self._guessed_s = 0.0
        self._learn(took_s, units)
        self.is_measured = True
        self.version += 1

    def estimate_s(self, unit: Unit) -> float:
        """What a slice should take: measured, or scaled from the measured size nearest to it."""
        means = self._means[unit.stage]
        known = means.get(unit.size)
        if known is not None:
            return known.told * unit.times
        if not means:
            return self._guess_s(unit)
        nearest = min(means, key=lambda size: max(size, unit.size) / min(size, unit.size))
        scale = unit.work / unit._replace(size=nearest).work
        return means[nearest].told * scale * unit.times

    def _learn(self, took_s: float, units: Sequence[Unit]) -> None:
        factor = self._learnt_s / self._guessed_s if self._guessed_s else 1.0
        self._guessed_s += sum(self._guess_s(unit) for unit in units) / factor
        self._learnt_s += max(took_s, SHORTEST_S)

    def _guess_s(self, unit: Unit) -> float:
        known = unit._replace(size=_GUESS_SIZE[unit.stage])
        guess_s = _GUESS_S[unit.stage] * unit.work / known.work * unit.times
        return guess_s * (self._learnt_s / self._guessed_s if self._guessed_s else 1.0)


class WorkLeft:
    """The slices that one job still needs.

    Attributes:
        pixels: of the pictures to be drawn and of those that came with the request.
        all_steps: of all its pictures, before the first.
    """

    def __init__(self, params: GenerationParams, resolved: Resolved, previews: int) -> None:
        width, height, images = resolved.width, resolved.height, len(resolved.seeds)
        passes = 1 if resolved.guidance is None else 2
        self._references = [
            Unit("references", _tokens(*fitted_size(picture)) - TEXT_TOKENS)
            for picture in params.references
        ]
        tokens = _tokens(width, height) + sum(unit.size for unit in self._references)
        shown = len(preview_steps(previews, resolved.start_step + 1, resolved.steps))
        self._unit_of = {
            "text": Unit("text", 1, passes),
            "denoise": Unit("denoise", tokens, passes),
            "decode": Unit("decode", width * height),
        }
        self.all_steps = images * (resolved.steps - resolved.start_step)
        self._left = {
            "text": 1,
            "denoise": self.all_steps,
            "decode": images * (1 + shown),
        }
        held = (*params.references, *(() if params.mask is None else (params.mask,)))
        self.pixels = images * width * height + sum(p.width * p.height for p in held)

    def unit(self, stage: str) -> Unit:
        """The slice of a stage that comes next; each reference is one of its own size."""
        return self._references[0] if stage == "references" else self._unit_of[stage]

    @property
    def next_unit(self) -> Unit:
        """The largest slice that may come next."""
        if self._references and not self._left["text"]:
            return self._references[0]
        return self._unit_of[next((s for s in self._unit_of if self._left[s]), "decode")]

    @property
    def steps(self) -> int | None:
        """Steps that are left; None while prompt or references are still to be encoded."""
        return None if self._left["text"] or self._references else self._left["denoise"]

    def done(self, stage: str) -> None:
        """One slice less. A picture that is drawn once more takes more than was planned."""
        if stage == "references":
            self._references.pop(0)
        else:
            self._left[stage] = max(0, self._left[stage] - 1)

    def estimate_s(self, costs: CostModel) -> float:
        """What is left, in seconds."""
        rest = (
            count * costs.estimate_s(self._unit_of[s]) for s, count in self._left.items() if count
        )
        return sum(rest) + sum(map(costs.estimate_s, self._references))


def _tokens(width: int, height: int) -> int:
    """Of text and one picture together."""
    return TEXT_TOKENS + (width // SIZE_MULTIPLE) * (height // SIZE_MULTIPLE)
