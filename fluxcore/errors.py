"""Every exception that fluxcore raises on purpose.

    FluxError
    ├── InvalidParamsError          a request that can never work; names the field
    ├── CheckpointError             a model directory that cannot be used
    │   ├── CheckpointNotFoundError     a directory or file is not there
    │   ├── CheckpointConfigError       a config file is unreadable or asks for something else
    │   ├── CheckpointFileError         a weight file is corrupt or truncated
    │   └── CheckpointMismatchError     tensors are missing, unexpected or misshapen
    └── DeviceError                 the accelerator could not do it
        ├── DeviceUnavailableError      no such device or dtype on this machine
        ├── OutOfMemoryError            did not fit; a smaller job may
        └── DeviceFaultError            the device returned a picture that is not one

A message says what was expected, what came, and the remedy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class FluxError(Exception):
    """Base of all errors of this package."""


class InvalidParamsError(FluxError, ValueError):
    """A generation parameter is out of range.

    Args:
        field: name of the offending field of ``GenerationParams``.
        message: what was expected, what came, and the remedy.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
        self.message = message


class CheckpointError(FluxError):
    """A checkpoint directory cannot be used."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A directory or a file of the checkpoint does not exist."""


class CheckpointConfigError(CheckpointError):
    """A config file is unreadable, incomplete or of another architecture."""


class CheckpointFileError(CheckpointError):
    """A weight file is corrupt, truncated or not a safetensors file."""


class CheckpointMismatchError(CheckpointError):
    """The tensors on disk are not the ones that the config files call for.

    Args:
        directory: the component's directory (``.../transformer``).
        missing: names that the architecture needs and no file holds.
        unexpected: names that a file holds and the architecture does not know.
        misshapen: one line for each tensor of the wrong shape or dtype.
    """

    SHOWN = 12

    def __init__(
        self,
        directory: Path,
        missing: Sequence[str],
        unexpected: Sequence[str],
        misshapen: Sequence[str],
    ) -> None:
        self.directory = directory
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.misshapen = tuple(misshapen)
        lines = [f"the weights in {directory} do not fit its config.json:"]
        for label, names in (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("misshapen", self.misshapen),
        ):
            if not names:
                continue
            lines.append(f"  {label} ({len(names)}):")
            lines += [f"    {name}" for name in names[: self.SHOWN]]
            if len(names) > self.SHOWN:
                lines.append(f"    ... and {len(names) - self.SHOWN} more")
        lines.append(
            "  remedy: download the directory again, or pair the weights with their own config"
        )
        super().__init__("\n".join(lines))


class DeviceError(FluxError):
    """The accelerator could not do what was asked."""


class DeviceUnavailableError(DeviceError):
    """The device or dtype that was asked for does not exist on this machine."""


class OutOfMemoryError(DeviceError):
    """The job did not fit into the device's memory; a smaller one may."""


class DeviceFaultError(DeviceError):
    """The device returned values that are not finite, or one constant colour."""
