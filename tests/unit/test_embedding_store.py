"""Embeddings on disk: the same values after a restart, bounded, and never trusted blindly."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import pytest
import torch

from fluxcore import FluxPipeline, GenerationParams
from fluxcore.pipeline import embedding_store
from fluxcore.pipeline.embedding_store import EmbeddingStore
from fluxcore.runtime import Runtime

SHAPE = (1, 4, 6)


def store(
    directory: Path, limit: int = 2**20, dtype: torch.dtype = torch.bfloat16, **decides: str
) -> EmbeddingStore:
    return EmbeddingStore(
        directory,
        limit,
        shape=SHAPE,
        dtype=dtype,
        placed=lambda values, dtype: values.to(dtype),
        decides=decides,
        begin_to_host=lambda values: lambda: [values],
    )


def embeddings(fill: float) -> torch.Tensor:
    return torch.full(SHAPE, fill, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def _warnings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)


def test_another_process_finds_them_bit_for_bit(tmp_path: Path) -> None:
    first = store(tmp_path / "new", weights="a")
    values = torch.randn(SHAPE).to(torch.bfloat16)
    first.save((1, 2, 3), values)
    first.wait()
    found = store(tmp_path / "new", weights="a").load((1, 2, 3))
    assert found is not None
    assert torch.equal(found, values)
    assert store(tmp_path / "new", weights="a").load((1, 2)) is None
    (path,) = (tmp_path / "new").iterdir()
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0


def test_what_is_found_comes_to_the_device_as_the_runtime_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind what is queued there, which nobody waits for."""
    first = store(tmp_path)
    first.save((1, 2, 3), embeddings(2.0))
    first.wait()
    placed = embeddings(5.0)
    monkeypatch.setattr(first, "_placed", lambda values, dtype: placed)
    assert first.load((1, 2, 3)) is placed


def test_other_weights_devices_and_dtypes_have_their_own(tmp_path: Path) -> None:
    first = store(tmp_path, weights="a", device="cpu")
    first.save((1,), embeddings(1))
    first.wait()
    assert store(tmp_path, weights="b", device="cpu").load((1,)) is None
    assert store(tmp_path, weights="a", device="mps").load((1,)) is None
    assert store(tmp_path, weights="a", device="cpu").load((1,)) is not None


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    kept = store(tmp_path, limit=20_000)
    kept.save((0,), embeddings(0))
    kept.wait()
    (size,) = (path.stat().st_size for path in tmp_path.iterdir())
    kept = store(tmp_path, limit=embedding_store.HEADER_BYTES + 48 + size)
    most = (embedding_store.HEADER_BYTES + 48 + size) // size
    for i in range(1, most):
        kept.save((i,), embeddings(i))
        kept.wait()
    for age, path in enumerate(
        sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    ):
        os.utime(path, ns=(age, age))
    assert kept.load((0,)) is not None  # used, and so the youngest
    kept.wait()
    kept.save((most,), embeddings(most))
    kept.wait()
    assert kept.load((1,)) is None
    assert all(kept.load((i,)) is not None for i in (0, *range(2, most + 1)))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= most * size


def test_a_bound_below_one_file_keeps_none(tmp_path: Path) -> None:
    kept = store(tmp_path / "none", limit=100)
    kept.save((1,), embeddings(1))
    kept.wait()
    assert not (tmp_path / "none").exists()


def damaged(data: bytes) -> dict[str, bytes]:
    flipped = bytearray(data)
    flipped[-3] ^= 1
    return {
        "empty": b"",
        "cut": data[:-5],
        "one bit": bytes(flipped),
        "no safetensors": b"\xff" * len(data),
        "too long": data + b"\0" * 10_000,
    }


@pytest.mark.parametrize("damage", damaged(b"1234"))
def test_a_damaged_file_is_ignored_with_one_warning_and_made_anew(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    kept = store(tmp_path)
    for i in (1, 2):
        kept.save((i,), embeddings(i))
    kept.wait()
    for path in tmp_path.iterdir():
        path.write_bytes(damaged(path.read_bytes())[damage])
    assert kept.load((1,)) is None
    assert kept.load((2,)) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    kept.save((1,), embeddings(1))
    kept.wait()
    again = kept.load((1,))
    assert again is not None
    assert torch.equal(again, embeddings(1))


def test_another_shape_or_dtype_is_not_taken(tmp_path: Path) -> None:
    kept = store(tmp_path)
    kept.save((1,), embeddings(1).float())
    kept.save((2,), embeddings(1)[:, :2])
    kept.wait()
    assert kept.load((1,)) is None
    assert kept.load((2,)) is None


def test_a_disk_that_fails_costs_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no directory")
    kept = store(tmp_path / "file")
    for i in (1, 2):
        kept.save((i,), embeddings(i))
        assert kept.load((i,)) is None
    kept.wait()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_writing_is_never_waited_for_and_what_waits_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = store(tmp_path)
    go_on, writer = threading.Event(), set()
    write = kept._write

    def slow(path: Path, values: torch.Tensor) -> None:
        assert go_on.wait(30)
        writer.add(threading.current_thread())
        write(path, values)

    monkeypatch.setattr(kept, "_write", slow)
    for i in range(40):
        kept.save((i,), embeddings(i))
    assert not list(tmp_path.iterdir())
    go_on.set()
    kept.wait()
    assert len(list(tmp_path.iterdir())) == embedding_store.MOST_WAITING
    assert threading.current_thread() not in writer


def test_half_written_files_of_the_dead_are_removed(tmp_path: Path) -> None:
    old, young = tmp_path / "old.partial", tmp_path / "young.partial"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    kept = store(tmp_path)
    kept.save((1,), embeddings(1))
    kept.wait()
    assert not old.exists()
    assert young.exists()


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    return tmp_path / "embeddings"


def loaded(checkpoint: Path, stored: Path, **more: str) -> FluxPipeline:
    given = {"device": "cpu", "dtype": "bfloat16", **more}
    return FluxPipeline.load(
        checkpoint, **given, conditioning_store=stored, conditioning_store_bytes=2**24
    )


def written(pipe: FluxPipeline) -> EmbeddingStore:
    found = pipe.conditioning_store
    assert found is not None
    found.wait()
    return found


def test_a_restarted_pipeline_spares_the_encoder_and_draws_the_same(
    tiny_checkpoint: Path, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = GenerationParams(prompt="a fox", width=64, height=64, steps=1, seed=3)
    first = loaded(tiny_checkpoint, stored)
    before = first.generate(params)
    written(first)
    second = loaded(tiny_checkpoint, stored)
    monkeypatch.setattr(second, "text_encoder", None)
    after = second.generate(params)
    assert (before.cache_hit, after.cache_hit) == (False, True)
    assert before.images[0].tobytes() == after.images[0].tobytes()
    assert (second.conditioning_cache.hits, written(second).hits) == (1, 1)
    assert second.generate(params).cache_hit
    assert written(second).hits == 1, "the second time it lies in memory"
    assert (
        loaded(tiny_checkpoint, stored, dtype="float32").encode_prompt("a fox").cache_hit is False
    )


def test_an_encoder_in_eight_bits_has_files_of_its_own(
    tiny_checkpoint: Path, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp8 the encoder is so only where its layers stay; the rest of the runtime is the same."""
    loaded(tiny_checkpoint, stored).encode_prompt("a fox")
    assert loaded(tiny_checkpoint, stored, residency="balanced").encode_prompt("a fox").cache_hit
    monkeypatch.setattr(Runtime, "encoder_precision", "fp8")
    assert not loaded(tiny_checkpoint, stored).encode_prompt("a fox").cache_hit


def test_what_is_forgotten_after_a_fault_is_forgotten_on_disk(
    tiny_checkpoint: Path, stored: Path
) -> None:
    pipe = loaded(tiny_checkpoint, stored)
    pipe.encode_prompt("a fox")
    pipe.conditioning_cache.clear()
    assert not pipe.encode_prompt("a fox").cache_hit


def test_warming_up_runs_the_encoder_though_the_store_knows_the_prompt(
    tiny_base_checkpoint: Path, stored: Path
) -> None:
    runs = []
    for _ in range(2):
        pipe = loaded(tiny_base_checkpoint, stored)
        pipe.text_encoder.register_forward_hook(lambda *_: runs.append("ran"))
        pipe.warm_up(sizes=())
        written(pipe)
        runs.append("ready")
        assert pipe.encode_prompt("").cache_hit
    assert runs == ["ran", "ran", "ready", "ran", "ready"]


def test_the_empty_prompt_of_a_base_model_is_at_hand_whatever_came_between(
    tiny_base_checkpoint: Path,
) -> None:
    pipe = FluxPipeline.load(
        tiny_base_checkpoint, device="cpu", dtype="float32", conditioning_cache_bytes=0
    )
    pipe.warm_up(sizes=())
    pipe.encode_prompt("a fox")
    assert pipe.encode_prompt("").cache_hit
    assert not pipe.encode_prompt("a fox").cache_hit


def test_what_cannot_be_removed_is_not_read_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = store(tmp_path)
    for ids in ((1,), (2,)):
        kept.save(ids, embeddings(1.0))
    kept.wait()
    removed = Path.unlink

    def refuse_first(path: Path, missing_ok: bool = False) -> None:
        if path == min(tmp_path.iterdir()):
            raise OSError(30, "Read-only file system", str(path))
        removed(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse_first)
    kept.forget()
    assert len(list(tmp_path.iterdir())) == 1
    assert kept.load((1,)) is None and kept.load((2,)) is None
    assert kept.hits == 0
    kept.save((3,), embeddings(1.0))
    kept.wait()
    assert len(list(tmp_path.iterdir())) == 1
    (warning,) = caplog.messages
    assert "Read-only file system" in warning
    monkeypatch.undo()
    kept.forget()
    kept.save((3,), embeddings(3.0))
    kept.wait()
    assert kept.load((3,)) is not None
