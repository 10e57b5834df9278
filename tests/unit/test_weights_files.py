"""Finding and reading safetensors files: every way in which one can be broken."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from fluxcore.errors import CheckpointError, CheckpointFileError, CheckpointNotFoundError
from fluxcore.runtime import shared_memory, write_in_place
from fluxcore.weights import files
from fluxcore.weights.files import StoredTensor, read_stacked, stored_tensors
from tests.unit.checkpoint_copies import join_safetensors, split_safetensors

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.weight": torch.arange(6).to(torch.bfloat16).reshape(1, 6),
    "c.scale": torch.tensor(2.5, dtype=torch.float64),
    "d.count": torch.tensor([7, 8, 9]),
    "e.half": torch.full((2, 3, 1), 0.5, dtype=torch.float16),
    "f.small": torch.tensor([-1], dtype=torch.int32),
    "g.none": torch.zeros(0, 4),
}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """The same tensors in two shards."""
    shard_of = {name: SHARDS[i % 2] for i, name in enumerate(TENSORS)}
    for shard in SHARDS:
        part = {name: TENSORS[name] for name, home in shard_of.items() if home == shard}
        save_file(part, tmp_path / shard)
    return write_index(tmp_path, {"metadata": {"total_size": 1}, "weight_map": shard_of})


def write_index(directory: Path, content: Any) -> Path:
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps(content))
    return path


def read(stored: StoredTensor) -> Tensor:
    target = torch.empty(stored.shape, dtype=stored.dtype)
    stored.read_into(target)
    return target


def failure(directory: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        stored_tensors(directory, "model")
    return caught.value


def assert_all_read(found: dict[str, StoredTensor]) -> None:
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].shape == tuple(tensor.shape)
        assert found[name].dtype == tensor.dtype
        assert found[name].bytes == tensor.nbytes
        assert torch.equal(read(found[name]), tensor)


def test_a_single_file_is_read(single: Path) -> None:
    assert_all_read(stored_tensors(single.parent, "model"))


def test_shards_are_read_as_one(index: Path) -> None:
    found = stored_tensors(index.parent, "model")
    assert_all_read(found)
    assert {stored.file.name for stored in found.values()} == set(SHARDS)


def test_links_are_followed_as_download_caches_lay_them_out(index: Path) -> None:
    blobs = index.parent / "blobs"
    blobs.mkdir()
    for i, name in enumerate((*SHARDS, index.name)):
        (index.parent / name).rename(blobs / str(i))
        (index.parent / name).symlink_to(blobs / str(i))
    assert_all_read(stored_tensors(index.parent, "model"))


def test_nothing_there_says_what_was_expected(tmp_path: Path) -> None:
    error = failure(tmp_path)
    assert isinstance(error, CheckpointNotFoundError)
    assert str(tmp_path) in str(error)
    assert "model.safetensors or model.safetensors.index.json" in str(error)
    assert "pickle" not in str(error)


def test_pickle_is_named_and_never_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (tmp_path.joinpath("exploded").touch, ())

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    error = failure(tmp_path)
    assert isinstance(error, CheckpointNotFoundError)
    assert "pytorch_model.bin is pickle, which is never loaded" in str(error)
    assert not (tmp_path / "exploded").exists()


def test_pickle_under_a_safetensors_name_is_refused(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "model.safetensors")
    assert isinstance(failure(tmp_path), CheckpointFileError)


def test_every_cut_of_a_file_is_refused(single: Path) -> None:
    """In the header's length, in the header, at its end, in the data, one byte short."""
    whole = single.read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    for length in [*range(0, len(whole), 13), 7, 8, header_end - 1, header_end, len(whole) - 1]:
        single.write_bytes(whole[:length])
        error = failure(single.parent)
        assert isinstance(error, CheckpointFileError), length
        assert str(single) in str(error)
        assert "download it again" in str(error)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 4096,
        b"\xff" * 4096,
        bytes(range(256)) * 16,
        b"<html><body>404 Not Found</body></html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7800000000\n",
        (4).to_bytes(8, "little") + b"null",
        (2**62).to_bytes(8, "little") + b"{}",
        (10).to_bytes(8, "little") + b'{"a": {}} ',
    ],
)
def test_what_is_no_safetensors_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    error = failure(tmp_path)
    assert isinstance(error, CheckpointFileError)
    assert "model.safetensors is corrupt, truncated or not a safetensors file" in str(error)


def test_trailing_bytes_are_refused(single: Path) -> None:
    single.write_bytes(single.read_bytes() + b"\0")
    assert isinstance(failure(single.parent), CheckpointFileError)


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [3, 5]},
        {"shape": [2**40, 2**40]},
        {"data_offsets": [0, 10**12]},
        {"data_offsets": [48, 0]},
        {"data_offsets": [8, 56]},
        {"dtype": "F32X"},
        {"dtype": "F64"},
    ],
    ids=str,
)
def test_a_header_that_contradicts_itself_is_refused(single: Path, changes: dict[str, Any]) -> None:
    header, data = split_safetensors(single.read_bytes())
    header["a.weight"] |= changes
    single.write_bytes(join_safetensors(header, data))
    assert isinstance(failure(single.parent), CheckpointFileError)


@given(data=st.data())
def test_any_damage_to_a_header_is_refused_or_leaves_tensors_that_can_be_read(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("damaged")
    path = directory / "model.safetensors"
    save_file(TENSORS, path)
    content = bytearray(path.read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header_end - 1))
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        found = stored_tensors(directory, "model")
    except CheckpointFileError as error:
        assert str(path) in str(error)
        return
    for stored in found.values():
        assert read(stored).shape == stored.shape


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.bool])
def test_a_dtype_that_is_not_read_is_named_with_the_remedy(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    stored = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}.get(dtype, "")
    values = {"a.weight": torch.ones(2, 2), "odd.weight": torch.ones(2, 2).to(dtype)}
    save_file(values, tmp_path / "model.safetensors")
    error = failure(tmp_path)
    assert isinstance(error, CheckpointFileError)
    for word in (f"odd.weight is stored as {stored}", "BF16", "use the bf16 checkpoint"):
        assert word in str(error)


def test_a_missing_shard_is_named(index: Path) -> None:
    (index.parent / SHARDS[1]).unlink()
    error = failure(index.parent)
    assert isinstance(error, CheckpointNotFoundError)
    assert str(index.parent / SHARDS[1]) in str(error)
    assert "lists it" in str(error)


def test_a_shard_that_is_a_directory_counts_as_missing(index: Path) -> None:
    (index.parent / SHARDS[0]).unlink()
    (index.parent / SHARDS[0]).mkdir()
    assert isinstance(failure(index.parent), CheckpointNotFoundError)


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_a_truncated_shard_is_named(index: Path, cut: int) -> None:
    shard = index.parent / SHARDS[1]
    shard.write_bytes(shard.read_bytes()[:cut])
    error = failure(index.parent)
    assert isinstance(error, CheckpointFileError)
    assert str(shard) in str(error)


@pytest.mark.parametrize(
    "outside", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "", "."]
)
def test_a_shard_outside_the_directory_is_never_opened(index: Path, outside: str) -> None:
    save_file({"x": torch.ones(1)}, index.parent.parent / "model.safetensors")
    content = json.loads(index.read_text())
    content["weight_map"]["a.weight"] = outside
    index.write_text(json.dumps(content))
    error = failure(index.parent)
    assert isinstance(error, CheckpointFileError)
    assert f"{index} names a file outside its directory" in str(error)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"weight_map": null}',
        '{"weight_map": ["a"]}',
        '{"weight_map": ' + "[" * 100_000,
    ],
    ids=lambda content: content[:30],
)
def test_a_broken_index_is_named(index: Path, content: str) -> None:
    index.write_text(content)
    error = failure(index.parent)
    assert isinstance(error, CheckpointFileError)
    assert str(index) in str(error)


def test_an_index_that_is_not_text_is_named(index: Path) -> None:
    index.write_bytes(b"\xff\xfe\xfd")
    assert str(index) in str(failure(index.parent))


def test_a_tensor_that_no_shard_holds_is_named(index: Path) -> None:
    content = json.loads(index.read_text())
    content["weight_map"]["z.lost"] = SHARDS[0]
    index.write_text(json.dumps(content))
    error = failure(index.parent)
    assert isinstance(error, CheckpointFileError)
    assert "lists 1 tensors that no shard holds, z.lost" in str(error)


def test_a_tensor_in_two_shards_is_refused(index: Path) -> None:
    """Which of the two is meant cannot be known."""
    shard = index.parent / SHARDS[1]
    header, _ = split_safetensors(shard.read_bytes())
    part = {name: TENSORS[name] for name in header if name in TENSORS}
    save_file(part | {"a.weight": torch.zeros(3, 4)}, shard)
    error = failure(index.parent)
    assert isinstance(error, CheckpointFileError)
    assert "a.weight" in str(error)
    assert SHARDS[1] in str(error)


def test_a_file_that_shrinks_after_its_header_was_checked_is_noticed(single: Path) -> None:
    stored = stored_tensors(single.parent, "model")
    content = single.read_bytes()
    last = max(stored.values(), key=lambda tensor: tensor.offset + tensor.bytes)
    single.write_bytes(content[:-1])
    with pytest.raises(CheckpointFileError, match="ends early, 1 bytes short") as caught:
        read(last)
    assert str(single) in str(caught.value)
    single.unlink()
    with pytest.raises(CheckpointFileError, match="cannot be read"):
        read(last)


def test_large_tensors_are_read_in_pieces_by_several_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PIECE_BYTES", 1000)
    monkeypatch.setattr(files, "BUFFER_BYTES", 2600)
    wide, tall = torch.randn(7, 333), torch.randn(50, 11)
    save_file({"wide": wide, "tall": tall}, tmp_path / "model.safetensors")
    stored = stored_tensors(tmp_path, "model")
    target = torch.empty(7, 333)
    read_stacked([stored["wide"]], target)
    assert torch.equal(target, wide)
    # Another dtype: through a buffer, which none of them fits.
    narrow = torch.empty(14, 333, dtype=torch.bfloat16)
    read_stacked([stored["wide"], stored["wide"]], narrow)
    assert torch.equal(narrow, torch.cat((wide, wide)).bfloat16())
    last = max(stored.values(), key=lambda tensor: tensor.offset)
    os.truncate(last.file, last.offset + last.bytes - 9)
    with pytest.raises(CheckpointFileError, match="ends early, 9 bytes short"):
        last.read_into(torch.empty(last.shape))


@pytest.mark.parametrize("arrives", [True, False])
def test_memory_that_is_shared_with_the_host_is_written_in_place(
    arrives: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on MPS, which is stood in for: whatever is not seen on the device is written again."""
    target = torch.zeros(3, 4)
    alias = target if arrives else torch.zeros(3, 4)
    waits: list[str] = []
    monkeypatch.setattr(shared_memory, "_alias", lambda x: alias)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waits.append("waited"))
    written = write_in_place(target, lambda x: waits.append("written") or x.fill_(5))  # type: ignore[func-returns-value]
    assert waits == ["waited", "written", "waited"]
    assert written == arrives
    assert ("loading takes longer" in caplog.text) != arrives


def test_memory_of_other_devices_is_not_shared() -> None:
    assert not write_in_place(torch.zeros(2), lambda x: pytest.fail("there is nothing to write to"))
