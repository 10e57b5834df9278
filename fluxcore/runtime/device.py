"""A device, and everything that is done differently on it."""

from __future__ import annotations

import gc
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fluxcore.host_memory import give_back_freed_memory
from fluxcore.kernels import Attention, Kernels, plain_attention
from fluxcore.runtime.amx_products import AmxProducts, fits, pack_layer
from fluxcore.runtime.attention import (
    chunked_attention,
    contiguous_attention,
    cudnn_attention,
    wide_attention,
)
from fluxcore.runtime.compiling import compile_block, missing_for_triton
from fluxcore.runtime.dtypes import DtypePolicy, dtype_name
from fluxcore.runtime.graphs import Graphs
from fluxcore.runtime.memory import host_available_bytes, host_peak_bytes
from fluxcore.runtime.quantised import (
    FORMATS,
    EightBits,
    Precision,
    quantise_layer,
)
from fluxcore.runtime.residency import Residency

HOPPER = (9, 0)
# So much CUDA copies out of any memory before a call returns, and without waiting for the device.
# Source: CUDA Runtime API, "API synchronization behavior".
STAGED_BYTES = 64 * 2**10


@dataclass(frozen=True, slots=True)
class Runtime:
    """One device, its dtypes and its rules.

    Attributes:
        device: where tensors live.
        kind: whose rules apply (mps, cuda or cpu). Differs from ``device`` only in
            audits, which run the MPS rules on another device.
        dtypes: which dtype each part has.
        chip: the processor's name as the system gives it.
        residency: how much of the model stays on the device.
        capability: of a CUDA GPU; None elsewhere.
        precision: what the transformer's large products are multiplied in: the dtype of the
            weights (``bf16``), fp8 or int8. See also ``encoder_precision``.
        fuses: whether CUDA gets attention and element-wise kernels of its own.
        amx: products of our own on a CPU; None where there are none.
        compiles: whether networks are compiled.
        graphs: recordings of what networks launch; None where there are none.
    """

    device: torch.device
    kind: str
    dtypes: DtypePolicy
    chip: str
    residency: Residency = "resident"
    capability: tuple[int, int] | None = None
    precision: Precision = "bf16"
    fuses: bool = False
    amx: AmxProducts | None = field(default=None, compare=False)
    compiles: bool = False
    graphs: Graphs | None = field(default=None, compare=False)

    def kernels(self) -> Kernels:
        """The functions that the networks are built with."""
        attention, vae_attention = self._attentions()
        plain = Kernels(attention, vae_attention, residual_dtype=self.dtypes.residual)
        if not self.uses_triton:
            return plain
        from fluxcore.runtime import triton_encoder as fused_encoder
        from fluxcore.runtime import triton_heads as fused_heads
        from fluxcore.runtime import triton_kernels as fused
        from fluxcore.runtime import triton_vae as fused_vae

        return replace(
            plain,
            vae_attention=fused_vae.wide_attention,
            prompt_attention=fused_encoder.prompt_attention,
            gated=fused.gated_linear,
            add_gated=fused.add_gated,
            modulated=fused.modulated,
            joint_heads=fused_heads.joint_heads,
            grouped_heads=fused_heads.grouped_heads,
            projected=fused_encoder.projected,
            normed=fused_vae.normed,
            residual_block=fused_vae.residual_block,
        )

    @property
    def uses_triton(self) -> bool:
        """Whether element-wise work runs as kernels in Triton; a compiler makes its own."""
        is_narrow = self.dtypes.weights == self.dtypes.vae == torch.bfloat16
        return self.fuses and is_narrow and not self.compiles and missing_for_triton() is None

    def arrange(self, encoder: Any, transformer: Any, vae: Any) -> None:
        """Lay loaded weights out as this device's kernels read them, once."""
        if not self.uses_triton:
            return
        from fluxcore.runtime import triton_blocks, triton_encoder, triton_narrow_blocks, triton_vae

        if triton_encoder.fits(encoder):
            encoder.fused_layers = triton_encoder.NarrowLayers(encoder)
        for level in vae.decoder.levels[:-1]:
            level.resample.fused = triton_vae.FusedUpsample(level.resample.conv)
        if self.residency == "low":
            return
        if self.capability == HOPPER and triton_blocks.fits(transformer):
            transformer.fused_blocks = triton_blocks.FusedBlocks(transformer)
        elif triton_narrow_blocks.fits(transformer):
            transformer.fused_blocks = triton_narrow_blocks.NarrowBlocks(transformer)

    @property
    def encoder_precision(self) -> Precision:
        """What the text encoder's large products are multiplied in.

        In fp8 as those of the transformer are, unless its layers come from the host each time. Not
        in int8, whose numbers are all as coarse as a row's largest: language models have rows with
        a few values far beyond the others (LLM.int8(), arXiv 2208.07339).
        """
        return self.precision_of_encoder(self.residency)

    def precision_of_encoder(self, residency: Residency) -> Precision:
        """The same, were this the residency."""
        return "fp8" if self.precision == "fp8" and residency == "resident" else "bf16"

    def _attentions(self) -> tuple[Attention, Attention]:
        """For transformer and text encoder, and for the VAE."""
        if self.kind == "mps":
            return contiguous_attention, chunked_attention
        if self.amx is not None:
            return self.amx.attention, plain_attention
        if self.kind != "cuda" or not self.fuses:
            return plain_attention, plain_attention
        # Neither takes float32.
        hopper = self.capability is not None and self.capability >= HOPPER
        narrow = self.dtypes.weights != torch.float32
        return (
            cudnn_attention if hopper and narrow else plain_attention,
            plain_attention if self.dtypes.vae == torch.float32 else wide_attention,
        )

    @property
    def kernels_told(self) -> str:
        """As the setting calls them; ``attention`` where of fused ones there is only that."""
        if self.uses_triton or self.amx is not None:
            return "fused"
        is_own = self.fuses and self._attentions() != (plain_attention, plain_attention)
        return "attention" if is_own else "plain"

    def quantise(self, network: nn.Module, parameter: str) -> int:
        """Put a matrix into eight bits, where that is asked for and can be; bytes freed.

        Where it is not, it is laid out for the products of this device.
        """
        if self.precision != "bf16":
            format = self.eight_bits(self.precision)
            if self.amx is not None and fits(network.get_parameter(parameter)):
                format = replace(format, pack=self.amx.packed, linear=self.amx.int8_linear)
            return quantise_layer(network, parameter, format)
        return self.lay_out(network, parameter)

    def lay_out(self, network: nn.Module, parameter: str) -> int:
        """Bring a matrix into the order in which this device multiplies; bytes freed: none."""
        if self.amx is not None:
            pack_layer(network, parameter, self.amx)
        return 0

    def ordering(self, network: nn.Module, parameter: str) -> Callable[[Tensor], None] | None:
        """As ``lay_out``, for values that come later, each time anew.

        Returns:
            What brings them into order where they lie; None where they stay as they are.
        """
        if self.amx is None or not pack_layer(network, parameter, self.amx):
            return None
        return self.amx.pack

    def eight_bits(self, precision: Precision) -> EightBits:
        """How fp8 or int8 numbers are rounded and multiplied here."""
        format = FORMATS[precision]
        if precision != "fp8" or not self.uses_triton:
            return format
        from fluxcore.runtime.triton_kernels import round_rows

        return replace(format, rounding=round_rows)

    def compile_blocks(self, blocks: Iterable[nn.Module], *, sizes_vary: bool = True) -> None:
        """Compile blocks of one kind, where networks are compiled; the work is that of one.

        Args:
            sizes_vary: they are called on more than one size.
        """
        for block in blocks if self.compiles else ():
            compile_block(block, sizes_vary=sizes_vary)

    def graphed(self, function: Callable[..., Any], most_tokens: int) -> Callable[..., Any]:
        """A pure function whose launches are recorded where that is done; see ``Graphs``."""
        return function if self.graphs is None else self.graphs.wrap(function, most_tokens)

    def has_recorded(self, function: Callable[..., Any], args: Sequence[Any]) -> bool:
        """Whether a call of what was given to ``graphed`` needs nothing but to be launched."""
        return self.graphs is not None and self.graphs.has(function, tuple(args))

    @property
    def copies_from_pinned(self) -> bool:
        """Whether what lies in pinned memory comes to the device without a copy in between."""
        return self.device.type == "cuda"

    def placed(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of the host on the device, in another dtype.

        For CUDA it is rounded there, so that no threads of the host have to wait for processors,
        and copied behind what is queued, which nobody waits for.
        """
        if self.copies_from_pinned:
            source = x if x.nbytes <= STAGED_BYTES or x.is_pinned() else x.pin_memory()
            return source.to(self.device, non_blocking=True).to(dtype)
        return x.to(dtype).to(self.device)

    def to_host(self, *tensors: Tensor) -> list[Tensor]:
        """Tensors in host memory; from CUDA through pinned memory, with one wait for all."""
        return self.begin_to_host(*tensors)()

    def begin_to_host(self, *tensors: Tensor) -> Callable[[], list[Tensor]]:
        """As ``to_host``, but queued where that can be.

        Returns:
            What waits for it; may be called from any thread.
        """
        if self.device.type != "cuda":
            copies = [tensor.cpu() for tensor in tensors]
            return lambda: copies
        places = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in tensors]
        for place, tensor in zip(places, tensors, strict=True):
            place.copy_(tensor, non_blocking=True)
        wait = self.mark()

        def finish() -> list[Tensor]:
            wait()
            return places

        return finish

    @property
    def filters_pictures(self) -> bool:
        """Whether rows are filtered for PNG files before they come to the host.

        A GPU does it along the way. Anywhere else it would keep the thread that draws, while
        others have time for it.
        """
        return self.kind == "cuda"

    @property
    def deflate(self) -> Callable[[Tensor, int], tuple[Tensor, Tensor]] | None:
        """What compresses rows for PNG files on the device; None where that is the host's."""
        if not self.uses_triton:
            return None
        from fluxcore.runtime.triton_deflate import deflate_lines

        return deflate_lines

    @property
    def channels_last(self) -> bool:
        """Whether convolutions run on channels-last weights and pictures."""
        return self.kind != "mps"

    @property
    def runs_ahead(self) -> bool:
        """Whether work can be queued behind other work that ``mark`` then tells the end of.

        Not where layers are streamed in each step: queueing it then takes as long as the step.
        """
        return self.device.type == "cuda" and self.residency != "low"

    def mark(self) -> Callable[[], None]:
        """What waits, when it is called, for all that has been queued until now."""
        if self.device.type != "cuda":
            return self.synchronize
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self.device))
        return done.synchronize

    def synchronize(self) -> None:
        """Wait until the device has finished what was queued."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def reset_peak(self) -> None:
        """Start measuring ``peak_bytes`` anew, where the device can."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int:
        """Peak device memory in bytes: since ``reset_peak`` on CUDA, what Metal holds now on
        MPS, and the process's largest resident size on the CPU."""
        if self.device.type == "cuda":
            # As ``max_memory_allocated``, which first makes one sorted list of all statistics: this
            # is asked in every job, and its answer waits for it.
            told = torch.cuda.memory_stats_as_nested_dict(self.device)
            return int(told["allocated_bytes"]["all"]["peak"])
        if self.device.type == "mps":
            return torch.mps.driver_allocated_memory()
        return host_peak_bytes()

    def available_bytes(self) -> int:
        """Memory that a model may be loaded into, in bytes."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        if self.device.type == "mps":
            within = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
            return min(within, host_available_bytes())
        return host_available_bytes()

    def memory_bytes(self) -> dict[str, int]:
        """Memory in use by place; may be called from any thread, and waits for nothing."""
        places = {"host_peak": host_peak_bytes()}
        if self.device.type == "cuda":
            places["device_allocated"] = torch.cuda.memory_allocated(self.device)
            places["device_reserved"] = torch.cuda.memory_reserved(self.device)
        elif self.device.type == "mps":
            places["device_allocated"] = torch.mps.current_allocated_memory()
            places["device_reserved"] = torch.mps.driver_allocated_memory()
        return places

    def release_memory(self) -> None:
        """Give back what a failed job left behind. Call it outside any except block."""
        if self.graphs is not None:
            self.graphs.clear()
        gc.collect()
        self.synchronize()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.device.type == "mps":
            torch.mps.empty_cache()
        else:
            give_back_freed_memory()

    def describe(self) -> dict[str, str]:
        """What to log at start and to put into a bug report."""
        residual = self.dtypes.residual or self.dtypes.weights
        return {
            "device": str(self.device),
            "chip": self.chip,
            "dtype": self.dtypes.name,
            "residual_dtype": dtype_name(residual),
            "vae_dtype": dtype_name(self.dtypes.vae),
            "residency": self.residency,
            "precision": self.dtypes.name if self.precision == "bf16" else self.precision,
            "kernels": self.kernels_told,
            "compiled": "yes" if self.compiles else "no",
            "cuda_graphs": "0" if self.graphs is None else self.graphs.describe(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "system": _system(),
            "threads": str(torch.get_num_threads()),
        }


def _system() -> str:
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    return f"{platform.system()} {platform.release()}"
