"""Measuring a loaded pipeline: what its stages take, and what they could take at least.

``operations`` says what a stage consists of, ``rates`` times those parts one by one on
the device, ``stages`` times the pipeline itself. Prints nothing; packing, tables and
charts belong to whoever asks.
"""

from fluxcore.bench.operations import stage_work
from fluxcore.bench.rates import Rates
from fluxcore.bench.stages import SizeReport, Spread, measure_size

__all__ = ["Rates", "SizeReport", "Spread", "measure_size", "stage_work"]
