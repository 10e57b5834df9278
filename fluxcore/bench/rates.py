"""How fast this device does the parts of a stage, each alone and at its own shape.

A part is repeated between two synchronisations for long enough that launching and
waiting do not count, and the best of several such batches is taken: other work on the
machine only adds to it. The sum over a stage is its floor, for programs that use this
build of PyTorch's products, attention and convolutions.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fluxcore.bench.operations import Attention, Convolution, Part, Product, Work
from fluxcore.kernels import for_prompts, plain_attention
from fluxcore.residues import CHANNELS
from fluxcore.runtime import Runtime
from fluxcore.runtime.amx_products import fits
from fluxcore.runtime.quantised import FORMATS, MULTIPLE

BATCHES = 5
BATCH_S = 0.01
"""How long a batch takes at least; single calls that take longer are batches."""
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
Call = Callable[[], object]


class Rates:
    """Measured milliseconds of parts; each part is measured once.

    Args:
        runtime: device and dtypes of the loaded model.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._milliseconds: dict[Part, float] = {}

    def floor_ms(self, work: Work) -> float:
        """What a stage takes if nothing but its parts takes time."""
        return sum(self.milliseconds(part) * count for part, count in work.items())

    def milliseconds(self, part: Part) -> float:
        """The best time of one call."""
        if part not in self._milliseconds:
            with torch.inference_mode():
                times = [self._best_s(call) for call in self._forms(part)]
            self._milliseconds[part] = min(times) * 1000
        return self._milliseconds[part]

    def fastest(self, part: Part) -> Call:
        """One call in the form that is the fastest; it holds the tensors that it works on."""
        with torch.inference_mode():
            return min(self._forms(part), key=self._best_s)

    def teraflops(self, work: Work) -> float:
        """Operations over the floor's time, in 10**12 a second."""
        total = sum(part.operations * count for part, count in work.items())
        return total / self.floor_ms(work) / 1e9

    def host_copy_ms(self, width: int, height: int) -> float:
        """A picture's bytes from the device to the host, with all that is made of them there."""
        shapes: list[tuple[int, ...]] = [(height, width, CHANNELS)]
        if self._runtime.filters_pictures:
            shapes.append((height, 1 + width * CHANNELS))
        if self._runtime.deflate is not None:
            shapes.append(shapes[-1])  # the compressed lines' memory is hardly larger
        picture = [
            torch.zeros(shape, dtype=torch.uint8, device=self._runtime.device) for shape in shapes
        ]
        return self._best_s(lambda: self._runtime.to_host(*picture)) * 1000

    def _forms(self, part: Part) -> Iterator[Call]:
        """Every way that there is here to do a part."""
        match part:
            case Product():
                yield from self._products(part)
            case Attention():
                yield from self._attentions(part)
            case Convolution():
                yield self._convolution(part)

    def _products(self, part: Product) -> Iterator[Call]:
        dtype = self._runtime.dtypes.weights
        x = self._random((part.rows, part.inner), dtype)
        weight = self._random((part.columns, part.inner), dtype)
        yield lambda: F.linear(x, weight)
        amx = self._runtime.amx
        if amx is not None and fits(weight):
            in_tiles = amx.packed(weight)
            yield lambda: amx.linear(x, in_tiles)
        sides_fit = part.inner % MULTIPLE == part.columns % MULTIPLE == 0
        precision = self._runtime.precision if part.is_block else "bf16"
        if part.is_layer:
            precision = self._runtime.encoder_precision
        if precision != "bf16" and sides_fit:
            format = FORMATS[precision]
            rows, of_rows = format.round_rows(x)
            columns, of_columns = format.round_rows(weight)
            packed, scales = format.pack(columns), of_columns.t().contiguous()
            yield lambda: format.product(rows, of_rows, packed, scales, dtype)
            unscaled = format.unscaled
            if unscaled is not None:
                yield lambda: unscaled(rows, packed)
            if amx is not None and fits(weight):
                narrow = amx.packed(columns)
                yield lambda: amx.int8_linear(x, narrow, scales.flatten())

    def _attentions(self, part: Attention) -> Iterator[Call]:
        dtypes, kernels = self._runtime.dtypes, self._runtime.kernels()
        dtype = dtypes.vae if part.is_vae else dtypes.weights
        queries = part.tokens if part.queries is None else part.queries
        of_q = (1, part.heads, queries, part.head_width)
        of_kv = (1, part.kv_heads, part.tokens, part.head_width)
        q, k, v = (self._random(shape, dtype) for shape in (of_q, of_kv, of_kv))
        mask = None
        if part.is_masked:
            square = (part.tokens, part.tokens)
            mask = torch.ones(square, dtype=torch.bool, device=q.device).tril()[None, None]
        chosen = kernels.vae_attention if part.is_vae else kernels.attention
        yield lambda: chosen(q, k, v, mask)
        own = for_prompts(part.head_width, kernels)
        if part.is_masked and own is not None:
            # On a whole prompt: where one is shorter, so is its time.
            count = torch.tensor([part.tokens], device=q.device)
            yield lambda: own(q, k, v, count)
        for backend in BACKENDS:

            def of_backend(backend: SDPBackend = backend) -> Tensor:
                with sdpa_kernel(backend):
                    return plain_attention(q, k, v, mask)

            if _runs(of_backend):
                yield of_backend

    def _convolution(self, part: Convolution) -> Call:
        dtype = self._runtime.dtypes.vae
        x = self._random((1, part.channels_in, part.height, part.width), dtype)
        weight = self._random(
            (part.channels_out, part.channels_in, part.kernel, part.kernel), dtype
        )
        if self._runtime.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
            weight = weight.contiguous(memory_format=torch.channels_last)
        return lambda: F.conv2d(x, weight, padding=part.kernel // 2)

    def _random(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Values as activations have them: a GPU multiplies zeros faster."""
        return torch.randn(shape, device=self._runtime.device, dtype=torch.float32).to(dtype)

    def _best_s(self, call: Call) -> float:
        self._batch_s(call, 1)  # the first chooses kernels and fills caches
        once_s = self._batch_s(call, 1)
        repeats = max(1, min(200, round(BATCH_S / max(once_s, 1e-6))))
        return min(self._batch_s(call, repeats) / repeats for _ in range(BATCHES))

    def _batch_s(self, call: Call, repeats: int) -> float:
        self._runtime.synchronize()
        begun = time.perf_counter()
        for _ in range(repeats):
            call()
        self._runtime.synchronize()
        return time.perf_counter() - begun


def _runs(call: Call) -> bool:
    """Whether a kernel is there and takes this shape; PyTorch warns, then raises, if not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call()
        except RuntimeError:
            return False
    return True
