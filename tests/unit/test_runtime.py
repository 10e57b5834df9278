"""Devices, dtypes, memory and times: the one place that knows what differs per device."""

from __future__ import annotations

import gc
import io
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from fluxcore.errors import DeviceError, DeviceUnavailableError, OutOfMemoryError
from fluxcore.kernels import for_heads, plain_attention
from fluxcore.runtime import (
    StageTimes,
    attention,
    choose_runtime,
    choosing,
    host_peak_bytes,
    memory,
)
from fluxcore.runtime import device as device_module
from fluxcore.runtime.attention import (
    CHUNK_ROWS,
    chunked_attention,
    contiguous_attention,
    cudnn_attention,
    wide_attention,
)
from fluxcore.runtime.device import Runtime
from fluxcore.runtime.dtypes import DtypePolicy, choose_dtypes
from fluxcore.runtime.memory import is_out_of_memory, translated_errors

FLOAT32 = DtypePolicy(torch.float32, None, torch.float32, torch.float64)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """(cuda devices, mps) -> a machine that has them, as far as PyTorch can tell."""

    def pretend(
        *,
        cuda: int = 0,
        mps: bool = False,
        bf16: bool = True,
        capability: tuple[int, int] = (9, 0),
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


@pytest.mark.parametrize(
    "device",
    [
        "",
        "gpu",
        "CPU",
        "tpu",
        "cuda:",
        "cuda:x",
        "cuda:-1",
        "cuda:1:2",
        "cuda:٣",
        "cuda 0",
        "cpu:",
        "cpu:1",
        "mps:1",
        " cpu",
        "cpu\n",
    ],
)
def test_what_names_no_device_is_refused(machine: Any, device: str) -> None:
    machine(cuda=4, mps=True)
    with pytest.raises(DeviceUnavailableError, match="auto, mps, cuda, cuda:N or cpu; got"):
        choose_runtime(device)


def test_a_device_that_is_not_there_is_refused_with_those_that_are(machine: Any) -> None:
    machine()
    for device in ("cuda", "cuda:0", "mps"):
        with pytest.raises(DeviceUnavailableError, match="not available.*available: cpu$"):
            choose_runtime(device)
    machine(cuda=1)
    with pytest.raises(DeviceUnavailableError, match="available: cuda, cpu$"):
        choose_runtime("mps")
    with pytest.raises(DeviceUnavailableError, match="cuda:1 does not exist; this machine has 1"):
        choose_runtime("cuda:1")
    assert issubclass(DeviceUnavailableError, DeviceError)


@pytest.mark.parametrize("dtype", ["", "bf16", "float64", "int8", "torch.float32", "Float32"])
def test_what_names_no_dtype_is_refused(dtype: str) -> None:
    with pytest.raises(DeviceUnavailableError, match="auto, float32, bfloat16, float16; got"):
        choose_runtime("cpu", dtype)


def test_auto_takes_mps_then_cuda_then_the_cpu(machine: Any) -> None:
    machine(cuda=1, mps=True)
    assert choose_runtime().kind == "mps"
    machine(cuda=1)
    assert choose_runtime().kind == "cuda"
    machine()
    assert choose_runtime().kind == "cpu"


def test_a_gpu_may_be_chosen_by_number(machine: Any) -> None:
    machine(cuda=3)
    runtime = choose_runtime("cuda:2", "float32")
    assert (runtime.device, runtime.kind, runtime.chip) == (
        torch.device("cuda", 2),
        "cuda",
        "GPU 2",
    )
    assert choose_runtime("cuda").chip == "GPU 0"


@pytest.mark.parametrize(
    ("chip", "dtype"),
    [
        ("Apple M1", "float16"),
        ("Apple M1 Pro", "float16"),
        ("Apple M1 Ultra", "float16"),
        ("Apple M2", "float16"),
        ("Apple M2 Max", "float16"),
        ("Apple M1 (Virtual)", "float16"),
        ("Apple M3", "bfloat16"),
        ("Apple M3 Max", "bfloat16"),
        ("Apple M4 Pro", "bfloat16"),
        ("Apple M10", "bfloat16"),
        ("Apple M12 Max", "bfloat16"),
        ("Apple M21", "bfloat16"),
        ("", "bfloat16"),
    ],
)
def test_apple_chips_that_emulate_bfloat16_get_float16(chip: str, dtype: str) -> None:
    policy = choose_dtypes("mps", "auto", chip)
    assert policy.name == dtype
    assert policy.residual == (torch.float32 if dtype == "float16" else None)
    assert policy.angles == torch.float32


def test_cuda_takes_bfloat16_where_it_is_native(machine: Any) -> None:
    machine(cuda=1, bf16=True)
    assert choose_runtime().dtypes.weights == torch.bfloat16
    machine(cuda=1, bf16=False)
    assert choose_runtime().dtypes.weights == torch.float16


def test_a_cpu_without_bfloat16_kernels_gets_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where PyTorch is built without oneDNN, whose operator tells."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert choose_dtypes("cpu", "auto", "").weights == torch.float32


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
def test_dtypes_that_are_asked_for_are_given(kind: str) -> None:
    angles = torch.float32 if kind == "mps" else torch.float64
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        assert choose_dtypes(kind, name, "") == DtypePolicy(dtype, None, dtype, angles)
    half = choose_dtypes(kind, "float16", "Apple M3")
    assert half == DtypePolicy(torch.float16, torch.float32, torch.float32, angles)
    assert half.name == "float16"


def test_mps_rules_go_with_the_kind_and_not_with_the_device() -> None:
    """So that they can be audited where there is no such device."""
    cpu = torch.device("cpu")
    mps, plain = Runtime(cpu, "mps", FLOAT32, "x"), Runtime(cpu, "cpu", FLOAT32, "x")
    assert mps.kernels().attention is contiguous_attention
    assert mps.kernels().vae_attention is chunked_attention
    assert plain.kernels().attention is plain.kernels().vae_attention is plain_attention
    assert plain.channels_last
    assert not mps.channels_last


def triton_is(monkeypatch: pytest.MonkeyPatch, missing: str | None) -> None:
    for module in (choosing, device_module):
        monkeypatch.setattr(module, "missing_for_triton", lambda: missing)


def test_fused_attention_is_what_the_gpu_has(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    triton_is(monkeypatch, "no Triton")
    machine(cuda=1, capability=(9, 0))
    hopper = choose_runtime("cuda", kernels="fused").kernels()
    assert (hopper.attention, hopper.vae_attention) == (cudnn_attention, wide_attention)
    # float16 keeps the VAE in float32, which two plain products would multiply slowly.
    half = choose_runtime("cuda", "float16", kernels="fused").kernels()
    assert (half.attention, half.vae_attention) == (cudnn_attention, plain_attention)
    exact = choose_runtime("cuda", "float32").kernels()
    assert (exact.attention, exact.vae_attention) == (plain_attention, plain_attention)
    machine(cuda=1, capability=(8, 0))
    ampere = choose_runtime("cuda", kernels="fused").kernels()
    assert (ampere.attention, ampere.vae_attention) == (plain_attention, wide_attention)
    machine()
    cpu = choose_runtime("cpu", kernels="plain").kernels()
    assert (cpu.attention, cpu.vae_attention) == (plain_attention, plain_attention)


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", "bfloat16"), ("mps", "float16"), ("cuda", "float32")]
)
def test_own_kernels_are_not_promised_where_there_are_none(
    machine: Any, monkeypatch: pytest.MonkeyPatch, device: str, dtype: str
) -> None:
    machine(mps=device == "mps", cuda=int(device == "cuda"))
    monkeypatch.setattr(choosing, "amx_products", lambda: None)
    with pytest.raises(DeviceUnavailableError, match=f"device {device} with dtype {dtype}"):
        choose_runtime(device, dtype, kernels="fused")
    assert choose_runtime(device, dtype).describe()["kernels"] == "plain"


def test_own_kernels_are_for_bfloat16_where_triton_is(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton_is(monkeypatch, None)
    machine(cuda=1, capability=(8, 0))
    for kernels in ("auto", "fused"):
        assert choose_runtime("cuda", kernels=kernels).describe()["kernels"] == "fused"
    for told, chosen in (
        ("plain", choose_runtime("cuda", kernels="plain")),
        ("plain", choose_runtime("cuda", "float32")),
        ("attention", replace(choose_runtime("cuda"), compiles=True)),  # a compiler makes its own
    ):
        assert chosen.describe()["kernels"] == told
        assert chosen.kernels().modulated is None
    machine()
    assert choose_runtime("cpu", kernels="plain").describe()["kernels"] == "plain"


def test_steps_are_queued_ahead_on_cuda_unless_layers_are_streamed() -> None:
    gpu = Runtime(torch.device("cuda"), "cuda", FLOAT32, "x")
    assert gpu.runs_ahead
    assert not replace(gpu, residency="low").runs_ahead
    assert not Runtime(torch.device("cpu"), "cpu", FLOAT32, "x").runs_ahead


@pytest.mark.parametrize("kind", choosing.KINDS)
def test_pictures_are_filtered_on_cuda_alone(kind: str) -> None:
    cpu = torch.device("cpu")
    assert Runtime(cpu, kind, FLOAT32, "x").filters_pictures == (kind == "cuda")


def test_without_triton_pytorch_s_kernels_do_and_the_log_says_why(
    machine: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    triton_is(monkeypatch, "install it")
    machine(cuda=1, capability=(9, 0))
    runtime = choose_runtime("cuda")
    assert runtime.describe()["kernels"] == "attention"
    assert runtime.kernels().modulated is None
    assert "install it" in caplog.text


def test_heads_that_a_kernel_does_not_take_are_turned_by_the_plain_form() -> None:
    assert for_heads(128, max, min) is max
    assert for_heads(96, max, min) is min
    assert for_heads(128, None, min) is min


def test_a_mask_goes_to_a_kernel_that_takes_one() -> None:
    """The text encoder's attention: fewer key heads, and what may not be seen."""
    torch.manual_seed(0)
    q = torch.randn(1, 6, 20, 16)
    k, v = torch.randn(2, 1, 2, 20, 16).unbind()
    mask = torch.ones(20, 20, dtype=torch.bool).tril()[None, None]
    exact = plain_attention(q, k, v, mask)
    assert torch.allclose(cudnn_attention(q, k, v, mask), exact, atol=1e-6)


def test_recordings_are_dropped_with_the_memory(machine: Any, monkeypatch: Any) -> None:
    machine(cuda=1)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    runtime = choose_runtime("cuda", cuda_graphs=3)
    assert runtime.graphs is not None
    assert runtime.describe()["cuda_graphs"] == "3"
    cleared: list[int] = []
    monkeypatch.setattr(type(runtime.graphs), "clear", lambda _: cleared.append(1))
    runtime.release_memory()
    assert cleared == [1]
    assert choose_runtime("cuda").graphs is None


def test_the_residual_dtype_reaches_the_networks() -> None:
    half = Runtime(torch.device("cpu"), "cpu", choose_dtypes("cpu", "float16", ""), "x")
    x = torch.ones(2, dtype=torch.float16)
    assert half.kernels().residual(x).dtype == torch.float32
    full = Runtime(torch.device("cpu"), "cpu", FLOAT32, "x")
    assert full.kernels().residual(x) is x


def test_a_runtime_describes_itself_in_text() -> None:
    told = choose_runtime("cpu", "float16").describe()
    assert told["device"] == "cpu"
    assert (told["dtype"], told["residual_dtype"], told["vae_dtype"]) == (
        "float16",
        "float32",
        "float32",
    )
    assert told["torch"] == torch.__version__
    assert all(isinstance(value, str) and value for value in told.values())
    assert choose_runtime("cpu", "bfloat16").describe()["residual_dtype"] == "bfloat16"


def test_free_memory_is_what_the_system_says_within_the_control_groups_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = choose_runtime("cpu", "float32").available_bytes()
    assert 10**8 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(memory, "_control_group_bytes", lambda: [12_345])
    assert memory.host_available_bytes() == (12_345 if sys.platform == "linux" else free)


def test_release_collects_what_holds_itself() -> None:
    class Knot:
        def __init__(self) -> None:
            self.own = self

    gc.disable()
    try:
        reference = weakref.ref(Knot())
        assert reference() is not None
        choose_runtime("cpu", "float32").release_memory()
        assert reference() is None
    finally:
        gc.enable()


def test_peak_memory_is_in_bytes_and_holds_what_was_touched() -> None:
    runtime = choose_runtime("cpu", "float32")
    runtime.reset_peak()
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert block.nbytes < runtime.peak_bytes() < 2**40
    assert runtime.peak_bytes() == host_peak_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere exec starts the figure anew")
def test_peak_memory_is_not_that_of_the_program_before() -> None:
    """A shell or a launcher may have taken more memory and then become this program."""
    program = "from fluxcore.runtime import host_peak_bytes; print(host_peak_bytes())"
    larger = "import os, sys; b'x' * 2**30; os.execv(sys.argv[1], sys.argv[1:])"
    shown = subprocess.run(
        [sys.executable, "-c", larger, sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert 2**24 < int(shown) < 2**30


OUT_OF_MEMORY = [
    RuntimeError("MPS backend out of memory (MPS allocated: 17.91 GB, other allocations: 1 GB)"),
    RuntimeError("Invalid buffer size: 24.00 GB"),
    RuntimeError("MPSGaph does not support tensor dims larger than INT_MAX"),
    RuntimeError("command buffer execution failed with status 5: Insufficient Memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    torch.OutOfMemoryError("whatever it says"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:30])
def test_every_device_s_out_of_memory_is_recognised_and_translated(error: Exception) -> None:
    assert is_out_of_memory(error)
    with pytest.raises(OutOfMemoryError, match="smaller size") as caught, translated_errors():
        raise error
    words = str(error).splitlines()[0] if str(error) else "MemoryError"
    assert words in str(caught.value)
    assert isinstance(caught.value, DeviceError)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x5 and 6x7)"),
        RuntimeError(""),
        ValueError("MPS backend out of memory"),
        KeyError("CUDA out of memory"),
    ],
)
def test_other_failures_stay_what_they_are(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as caught, translated_errors():
        raise error
    assert caught.value is error


def test_the_cpu_s_own_allocator_is_understood() -> None:
    with pytest.raises(OutOfMemoryError), translated_errors():
        torch.empty(2**60, dtype=torch.uint8)


def test_a_translated_error_does_not_hold_the_tensors_that_filled_the_memory() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def work() -> None:
        large = torch.ones(3)
        held.append(weakref.ref(large))
        raise RuntimeError("CUDA out of memory")

    try:
        with translated_errors():
            work()
    except OutOfMemoryError as error:
        assert held[0]() is None, error


def test_stages_add_up_and_wait_for_the_device() -> None:
    order: list[str] = []
    times = StageTimes(lambda: order.append("waited"))
    for name in ("denoise", "decode", "denoise"):
        with times.stage(name):
            order.append(name)
    assert order == ["denoise", "waited", "decode", "waited", "denoise", "waited"]
    assert list(times.milliseconds) == ["denoise", "decode"]
    assert all(value >= 0 for value in times.milliseconds.values())
    assert times.total() == sum(times.milliseconds.values())


def random_qkv(length: int, heads: int = 1, width: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, length, heads, width)
    return [torch.randn(shape, generator=generator).transpose(1, 2) for _ in "qkv"]


@pytest.mark.parametrize("length", [1, 7, CHUNK_ROWS, CHUNK_ROWS + 1, 2 * CHUNK_ROWS + 5])
def test_attention_in_chunks_equals_attention_at_once(length: int) -> None:
    q, k, v = random_qkv(length)
    expected = plain_attention(q, k, v, None)
    assert torch.allclose(chunked_attention(q, k, v, None), expected, atol=1e-6)


def test_chunks_are_bounded_and_every_operand_is_contiguous(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []

    def watched(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        assert q.is_contiguous()
        assert k.is_contiguous()
        assert v.is_contiguous()
        seen.append(q.shape[2])
        return plain_attention(q, k, v, mask)

    monkeypatch.setattr(attention, "plain_attention", watched)
    q, k, v = random_qkv(CHUNK_ROWS + 300, heads=2)
    assert not q.is_contiguous()
    chunked_attention(q, k, v, None)
    assert seen == [CHUNK_ROWS, 300]
    contiguous_attention(q, k, v, None)
    assert seen[-1] == CHUNK_ROWS + 300


def test_attention_groups_queries_and_hides_what_the_mask_hides() -> None:
    q, _, _ = random_qkv(6, heads=4)
    _, k, v = random_qkv(6, heads=2)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    for attend in (plain_attention, contiguous_attention):
        found = attend(q, k, v, mask)
        assert torch.allclose(found[:, 1], attend(q[:, 1:2], k[:, :1], v[:, :1], mask)[:, 0])
        assert torch.allclose(found[:, 2], attend(q[:, 2:3], k[:, 1:], v[:, 1:], mask)[:, 0])
        assert torch.allclose(found[:, :, 0], v.repeat_interleave(2, dim=1)[:, :, 0])


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's files")
def test_a_system_that_tells_no_peak_of_a_process_s_own_has_one_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("builtins.open", lambda *_, **__: io.StringIO("VmRSS:\t  10 kB\n"))
    memory._peak_before_exec_kib.cache_clear()
    assert memory.host_peak_bytes() > 2**20
    memory._peak_before_exec_kib.cache_clear()
