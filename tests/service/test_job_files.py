"""Pictures of kept jobs: exact, private, whole or not there, and in one process's hands."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from app.engine import PackedPicture
from app.jobs.files import DataDirectoryError, JobFiles, is_job_id, new_job_id

PICTURE = PackedPicture(b"picture", "webp", 1, 64, 64)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[JobFiles]:
    made = JobFiles(tmp_path / "data")
    yield made
    made.close()


def noise(mode: str = "RGB") -> Image.Image:
    return Image.effect_noise((96, 64), 80.0).convert(mode)


def test_inputs_come_back_pixel_for_pixel(files: JobFiles) -> None:
    job_id = new_job_id()
    references, mask = (noise(), noise()), noise("L")
    size = files.write_inputs(job_id, references, mask)
    assert size > 1000
    read, read_mask = files.read_inputs(job_id, 2, has_mask=True)
    assert [picture.tobytes() for picture in read] == [p.tobytes() for p in references]
    assert read_mask is not None and read_mask.tobytes() == mask.tobytes()
    assert read_mask.mode == "L" and read[0].mode == "RGB"
    files.remove_inputs(job_id)
    with pytest.raises(FileNotFoundError):
        files.read_inputs(job_id, 2, has_mask=True)


@pytest.mark.parametrize(
    ("sound", "damaged"),
    [
        # A header cut short, and a type that no chunk has: in Pillow neither is an OSError.
        (b"\0\0\0\rIHDR", b"\0\0\0\1IHDR"),
        (b"IDAT", b"\0\0\0\0"),
    ],
)
def test_a_damaged_picture_is_told_as_one(
    files: JobFiles, tmp_path: Path, sound: bytes, damaged: bytes
) -> None:
    job_id = new_job_id()
    files.write_inputs(job_id, (noise(),), None)
    path = tmp_path / "data" / "inputs" / job_id / "0.png"
    path.write_bytes(path.read_bytes().replace(sound, damaged))
    with pytest.raises(OSError, match=r"0\.png"):
        files.read_inputs(job_id, 1, has_mask=False)


def test_a_request_without_pictures_leaves_no_files(files: JobFiles, tmp_path: Path) -> None:
    job_id = new_job_id()
    assert files.write_inputs(job_id, (), None) == 0
    assert files.read_inputs(job_id, 0, has_mask=False) == ((), None)
    assert not list((tmp_path / "data" / "inputs").iterdir())


def test_results_of_a_second_attempt_replace_the_first_ones(files: JobFiles) -> None:
    job_id = new_job_id()
    files.write_results(job_id, [PICTURE, PICTURE])
    second = PackedPicture(b"second", "webp", 1, 64, 64)
    files.write_results(job_id, [second])
    assert files.read_result(job_id, 0, "webp") == b"second"
    with pytest.raises(FileNotFoundError):
        files.read_result(job_id, 1, "webp")


def test_files_are_private_and_leave_nothing_on_their_way(files: JobFiles, tmp_path: Path) -> None:
    job_id = new_job_id()
    files.write_inputs(job_id, (noise(),), None)
    files.write_results(job_id, [PICTURE])
    for path in [tmp_path / "data", *(tmp_path / "data").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert not list((tmp_path / "data" / "staging").iterdir())


class Unsaveable(Image.Image):
    """A picture that cannot be written."""


def test_a_set_of_files_that_fails_is_not_there_at_all(files: JobFiles, tmp_path: Path) -> None:
    job_id = new_job_id()
    with pytest.raises(OSError, match="cannot write mode"):
        files.write_inputs(job_id, (noise(), Unsaveable()), None)
    assert not list((tmp_path / "data" / "inputs").iterdir())
    assert not list((tmp_path / "data" / "staging").iterdir())


def test_what_a_crash_left_is_swept(files: JobFiles, tmp_path: Path) -> None:
    waiting, kept, gone = new_job_id(), new_job_id(), new_job_id()
    for job_id in (waiting, kept, gone):
        files.write_inputs(job_id, (noise(),), None)
        files.write_results(job_id, [PICTURE])
    (tmp_path / "data" / "staging" / "half").mkdir()
    (tmp_path / "data" / "staging" / "half" / "0.png").write_bytes(b"half")
    files.sweep({waiting}, {waiting, kept})
    data = tmp_path / "data"
    assert [path.name for path in (data / "inputs").iterdir()] == [waiting]
    assert {path.name for path in (data / "results").iterdir()} == {waiting, kept}
    assert not list((data / "staging").iterdir())


def test_a_directory_belongs_to_one_process_at_a_time(tmp_path: Path) -> None:
    first = JobFiles(tmp_path)
    with pytest.raises(DataDirectoryError, match="in use by another fluxd"):
        JobFiles(tmp_path)
    first.close()
    JobFiles(tmp_path).close()


def test_a_directory_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataDirectoryError, match="Not a directory"):
        JobFiles(tmp_path / "file" / "data")


def test_ids_are_unguessable_and_recognised() -> None:
    ids = {new_job_id() for _ in range(1000)}
    assert len(ids) == 1000 and all(is_job_id(job_id) for job_id in ids)
    for text in ("", "job_", "job_" + "g" * 32, f"{new_job_id()}/..", f"{new_job_id()}\n", "../x"):
        assert not is_job_id(text)
