"""Random checkpoints: the published layout, written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from fluxcore.errors import CheckpointConfigError, CheckpointError
from fluxcore.weights.random_checkpoint import PRESETS, Architecture, write_random_checkpoint

TINY = PRESETS["tiny"]


def vary(architecture: Architecture, **changes: dict[str, Any]) -> Architecture:
    """A copy with some fields of its parts changed."""
    parts = {
        part: dataclasses.replace(getattr(architecture, part), **fields)
        for part, fields in changes.items()
    }
    return dataclasses.replace(architecture, **parts)


@pytest.fixture
def tiny(tiny_checkpoint: Path) -> Path:
    return tiny_checkpoint


def read(directory: Path) -> dict[str, Tensor]:
    """Every tensor of one component."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as stored:
            assert stored.metadata() == {"format": "pt"}
            tensors |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    return tensors


def read_all(directory: Path) -> dict[str, Tensor]:
    return {
        f"{part}/{name}": tensor
        for part in ("transformer", "text_encoder", "vae")
        for name, tensor in read(directory / part).items()
    }


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


class TestFiles:
    def test_layout(self, tiny: Path) -> None:
        assert {str(p.relative_to(tiny)) for p in tiny.rglob("*") if p.is_file()} == {
            "model_index.json",
            "scheduler/scheduler_config.json",
            "text_encoder/config.json",
            "text_encoder/model.safetensors",
            "tokenizer/added_tokens.json",
            "tokenizer/chat_template.jinja",
            "tokenizer/merges.txt",
            "tokenizer/special_tokens_map.json",
            "tokenizer/tokenizer.json",
            "tokenizer/tokenizer_config.json",
            "tokenizer/vocab.json",
            "transformer/config.json",
            "transformer/diffusion_pytorch_model.safetensors",
            "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors",
        }
        assert sum(p.stat().st_size for p in tiny.rglob("*")) < 10e6
        index = read_json(tiny / "model_index.json")
        assert index["_class_name"] == "Flux2KleinPipeline"
        assert index["is_distilled"] is True

    def test_shards_and_index(self, tiny: Path, tmp_path: Path) -> None:
        limit = 200_000
        sharded = write_random_checkpoint(tmp_path / "sharded", max_shard_bytes=limit)
        for part, stem in (
            ("transformer", "diffusion_pytorch_model"),
            ("text_encoder", "model"),
            ("vae", "diffusion_pytorch_model"),
        ):
            directory = sharded / part
            index = read_json(directory / f"{stem}.safetensors.index.json")
            shards = sorted(path.name for path in directory.glob("*.safetensors"))
            assert len(shards) > 2
            assert shards == [
                f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
                for i in range(1, len(shards) + 1)
            ]
            found, total = {}, 0
            for shard in shards:
                with safe_open(directory / shard, framework="pt") as stored:
                    tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
                size = sum(t.numel() * t.element_size() for t in tensors.values())
                assert size <= limit or len(tensors) == 1
                found |= dict.fromkeys(tensors, shard)
                total += size
            assert index["weight_map"] == found
            assert index["metadata"]["total_size"] == total
        whole, parts = read_all(tiny), read_all(sharded)
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[name], parts[name]) for name in whole)

    def test_a_seed_gives_the_same_bytes(self, tiny: Path, tmp_path: Path) -> None:
        again = write_random_checkpoint(tmp_path / "again")
        for path in tiny.rglob("*"):
            if path.is_file():
                assert (again / path.relative_to(tiny)).read_bytes() == path.read_bytes()
        other = read_all(write_random_checkpoint(tmp_path / "other", seed=1))
        del other["vae/bn.num_batches_tracked"]
        assert not any(
            torch.equal(tensor, other[name])
            for name, tensor in read_all(again).items()
            if name in other
        )

    def test_dtypes_hold_the_same_values(self, tiny: Path, tmp_path: Path) -> None:
        wide = write_random_checkpoint(tmp_path / "wide", dtype="float32")
        assert read_json(wide / "text_encoder" / "config.json")["dtype"] == "float32"
        narrow = read_all(tiny)
        for name, tensor in read_all(wide).items():
            assert torch.equal(tensor.to(narrow[name].dtype), narrow[name])
        assert read(wide / "vae")["bn.running_mean"].dtype == torch.float32

    def test_progress_rises_to_the_total(self, tmp_path: Path) -> None:
        calls: list[tuple[int, int]] = []
        big = vary(TINY, text_encoder={"vocab_size": 300_000})
        directory = write_random_checkpoint(
            tmp_path / "big", architecture=big, progress=lambda *call: calls.append(call)
        )
        stored = sum(t.numel() * t.element_size() for t in read_all(directory).values())
        done = [call[0] for call in calls]
        assert len(calls) > 1
        assert done == sorted(set(done))
        assert done[-1] == stored
        assert {call[1] for call in calls} == {stored}


class TestRefusals:
    def test_a_directory_with_something_in_it_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "mine.txt").write_text("precious")
        with pytest.raises(CheckpointError, match="is not empty"):
            write_random_checkpoint(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]

    def test_a_file_is_left_alone(self, tmp_path: Path) -> None:
        target = tmp_path / "file"
        target.write_text("precious")
        with pytest.raises(CheckpointError, match="is not a directory"):
            write_random_checkpoint(target)
        assert target.read_text() == "precious"

    def test_an_empty_directory_is_filled(self, tmp_path: Path) -> None:
        assert write_random_checkpoint(tmp_path) == tmp_path
        assert (tmp_path / "model_index.json").is_file()

    def test_an_interrupted_run_leaves_nothing(self, tmp_path: Path) -> None:
        target = tmp_path / "deep" / "down"
        seen = []

        def interrupt(done: int, total: int) -> None:
            # What a run that is killed outright would leave: no target, no model index.
            seen.extend(p for p in target.parent.rglob("*") if p.is_file())
            assert not target.exists()
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_random_checkpoint(target, progress=interrupt)
        names = {p.name for p in seen}
        assert "config.json" in names
        assert "model_index.json" not in names
        assert list(target.parent.iterdir()) == []

    def test_a_directory_that_appears_meanwhile_is_left_alone(self, tmp_path: Path) -> None:
        target = tmp_path / "contested"

        def intrude(done: int, total: int) -> None:
            target.mkdir()
            (target / "theirs.txt").write_text("precious")

        with pytest.raises(CheckpointError, match="is not empty"):
            write_random_checkpoint(target, progress=intrude)
        assert [p.name for p in tmp_path.rglob("*")] == ["contested", "theirs.txt"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"preset": "12b"}, "preset must be one of tiny, 4b, 9b; got '12b'"),
            ({"dtype": "int8"}, "dtype must be one of bfloat16, float16, float32; got 'int8'"),
            ({"max_shard_bytes": 0}, "max_shard_bytes must be at least 1; got 0"),
            (
                {"architecture": vary(TINY, text_encoder={"vocab_size": 300})},
                "vocab_size must be at least 5",
            ),
        ],
    )
    def test_arguments(self, tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(CheckpointConfigError, match=message):
            write_random_checkpoint(tmp_path / "x", **arguments)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"transformer": {"axes_dims_rope": (8, 8, 8, 16)}}, "add up to attention_head_dim 32"),
            ({"transformer": {"axes_dims_rope": (7, 9, 8, 8)}}, "must be even"),
            ({"transformer": {"timestep_guidance_channels": 255}}, "must be even; got 255"),
            ({"text_encoder": {"num_hidden_layers": 26}}, "must be at least 27"),
            ({"text_encoder": {"num_key_value_heads": 3}}, "a multiple of num_key_value_heads"),
            ({"text_encoder": {"head_dim": 33}}, "head_dim must be even; got 33"),
            ({"vae": {"decoder_block_out_channels": (8, 8)}}, "must have 4 entries"),
            ({"vae": {"norm_num_groups": 32}}, "a multiple of norm_num_groups 32"),
        ],
    )
    def test_architectures(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(CheckpointConfigError, match=message):
            vary(TINY, **changes)
