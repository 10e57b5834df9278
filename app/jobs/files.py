"""What is kept as files: pictures that came with a request, what was drawn, and answers.

Owns the layout of the data directory and the promise that a set of files is there
in full or not at all. Every path is made of a random id and a number; nothing that a
client sent is ever part of one. Everything here blocks.

    DATA_DIR/inputs/JOB/0.png, 1.png, ..., mask.png    until the job is finished
    DATA_DIR/results/JOB/0.png, 1.jpeg, ...            as long as the job is kept
    DATA_DIR/answers/ANSWER/body                       as long as it may be asked for again
    DATA_DIR/staging/                                  files on their way; emptied at start
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO

from PIL import Image

from app.engine.packing import PackedPicture
from app.engine.pictures import DECODE_ERRORS

LOCK_FILE = "lock"
_JOB_ID = re.compile(r"job_[0-9a-f]{32}")
_ANY_ID = re.compile(r"(job|answer)_[0-9a-f]{32}")
# Input pictures are read once, soon; small files are not worth the time.
_COMPRESS_LEVEL = 1
# What a disk must take to count as one that is not full: more than a job's record.
PROBE_BYTES = 64 * 1024
# For the one who runs the service only: prompts and pictures are private.
_DIRECTORY_MODE = 0o700
_FILE_MODE = 0o600


class DataDirectoryError(Exception):
    """The directory cannot be used; the message says why, without a subject."""


def new_job_id() -> str:
    """A name that cannot be guessed: 128 random bits."""
    return f"job_{secrets.token_hex(16)}"


def is_job_id(text: str) -> bool:
    """Whether it has the form of ``new_job_id``'s."""
    return _JOB_ID.fullmatch(text) is not None


class JobFiles:
    """See the module. Holds the directory for itself until ``close``.

    Raises:
        DataDirectoryError: it cannot be made or written to, or another process has it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._inputs = root / "inputs"
        self._results = root / "results"
        self._answers = root / "answers"
        self._staging = root / "staging"
        kinds = (self._inputs, self._results, self._answers, self._staging)
        try:
            for directory in (root, *kinds):
                directory.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
            self._lock = os.open(root / LOCK_FILE, os.O_RDWR | os.O_CREAT, _FILE_MODE)
        except OSError as error:
            raise DataDirectoryError(error.strerror or "cannot be written to") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise DataDirectoryError("is in use by another fluxd") from None

    def close(self) -> None:
        """Let other processes have the directory."""
        os.close(self._lock)

    def write_inputs(
        self, job_id: str, references: Sequence[Image.Image], mask: Image.Image | None
    ) -> int:
        """Keep the pictures of a request, without loss.

        Returns:
            what they take, in bytes.
        """
        pictures = [(f"{i}.png", picture) for i, picture in enumerate(references)]
        if mask is not None:
            pictures.append(("mask.png", mask))
        if not pictures:
            return 0

        def write(directory: Path) -> int:
            size = 0
            for name, picture in pictures:
                with _private_file(directory / name) as file:
                    picture.save(file, "PNG", compress_level=_COMPRESS_LEVEL)
                    size += _to_disk(file)
            return size

        return self._put(self._inputs / _checked(job_id), write)

    def read_inputs(
        self, job_id: str, references: int, *, has_mask: bool
    ) -> tuple[tuple[Image.Image, ...], Image.Image | None]:
        """The pictures of a request, pixel for pixel as they were kept.

        Raises:
            OSError: they are lost or damaged.
        """
        directory = self._inputs / _checked(job_id)
        read = tuple(_read_png(directory / f"{i}.png") for i in range(references))
        return read, _read_png(directory / "mask.png") if has_mask else None

    def write_results(self, job_id: str, pictures: Sequence[PackedPicture]) -> None:
        """Keep what was drawn, instead of what an earlier attempt may have left."""

        def write(directory: Path) -> int:
            for i, picture in enumerate(pictures):
                with _private_file(directory / f"{i}.{picture.format}") as file:
                    file.write(picture.data)
                    _to_disk(file)
            return 0

        self._put(self._results / _checked(job_id), write)

    def read_result(self, job_id: str, index: int, picture_format: str) -> bytes:
        """One picture's file.

        Raises:
            FileNotFoundError: it is not there, or no longer.
        """
        return (self._results / _checked(job_id) / f"{index}.{picture_format}").read_bytes()

    def remove_inputs(self, job_id: str) -> None:
        """The job is finished."""
        shutil.rmtree(self._inputs / _checked(job_id), ignore_errors=True)

    def remove_results(self, job_id: str) -> None:
        """The job is forgotten."""
        shutil.rmtree(self._results / _checked(job_id), ignore_errors=True)

    def sweep(self, waiting: Iterable[str], kept: Iterable[str]) -> None:
        """Remove what a crash left behind.

        Args:
            waiting: jobs that still need their inputs.
            kept: jobs that still have results.
        """
        _remove_others(self._staging, ())
        _remove_others(self._inputs, waiting)
        _remove_others(self._results, kept)

    def write_answer(self, answer_id: str, body: bytes) -> None:
        """Keep the body of an answer."""

        def write(directory: Path) -> int:
            with _private_file(directory / "body") as file:
                file.write(body)
                return _to_disk(file)

        self._put(self._answers / _checked(answer_id), write)

    def read_answer(self, answer_id: str) -> bytes:
        """The body of an answer.

        Raises:
            FileNotFoundError: it is not there, or no longer.
        """
        return (self._answers / _checked(answer_id) / "body").read_bytes()

    def remove_answer(self, answer_id: str) -> None:
        """The answer is forgotten."""
        shutil.rmtree(self._answers / _checked(answer_id), ignore_errors=True)

    def sweep_answers(self, kept: Iterable[str]) -> None:
        """Remove what a crash left behind."""
        _remove_others(self._answers, kept)

    def probe(self) -> None:
        """Write a little and remove it again.

        Raises:
            OSError: the disk does not take it.
        """
        path = self._staging / secrets.token_hex(16)
        try:
            with _private_file(path) as file:
                file.write(bytes(PROBE_BYTES))
                _to_disk(file)
        finally:
            path.unlink(missing_ok=True)

    def _put(self, place: Path, write: Callable[[Path], int]) -> int:
        """Write a directory of files beside its place and then move it there."""
        directory = self._staging / secrets.token_hex(16)
        directory.mkdir(mode=_DIRECTORY_MODE)
        try:
            size = write(directory)
            _directory_to_disk(directory)
            shutil.rmtree(place, ignore_errors=True)
            directory.rename(place)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        _directory_to_disk(place.parent)
        return size


def _checked(name: str) -> str:
    assert _ANY_ID.fullmatch(name), "ids are checked before they come here"
    return name


def _remove_others(directory: Path, kept: Iterable[str]) -> None:
    names = frozenset(kept)
    for entry in directory.iterdir():
        if entry.name not in names:
            shutil.rmtree(entry, ignore_errors=True)


def _private_file(path: Path) -> IO[bytes]:
    return open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, _FILE_MODE), "w+b")


def _to_disk(file: IO[bytes]) -> int:
    """Wait until the disk has it. Returns its size in bytes."""
    file.flush()
    os.fsync(file.fileno())
    return os.fstat(file.fileno()).st_size


def _directory_to_disk(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_png(path: Path) -> Image.Image:
    try:
        with Image.open(path, formats=("PNG",)) as opened:
            opened.load()
            return opened.copy()
    except OSError:
        raise
    except DECODE_ERRORS as error:
        raise OSError(f"{path.name} is damaged: {error}") from error
