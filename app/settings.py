"""The one table of settings: name, type, default and help, read once at start.

Owns where a setting may come from and which source wins: flags, then
``FLUXD_*`` environment variables, then a TOML file, then the defaults below.
Knows nothing of what the settings are used for.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator

from fluxcore.errors import InvalidParamsError
from fluxcore.params import MAX_REFERENCES, check_side

ENV_PREFIX = "FLUXD_"
CONFIG_VARIABLE = "FLUXD_CONFIG"
DEFAULT_CONFIG = Path("config/fluxd.toml")
# Pillow refuses pictures of twice this size by itself and warns above it.
PILLOW_PIXEL_LIMIT = 89_478_485

_DEVICE = re.compile(r"auto|cpu|mps|cuda(:[0-9]{1,3})?")
_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")
# A value and where it came from, by the setting's name.
_Found = dict[str, tuple[Any, str]]


class SettingsError(Exception):
    """A setting is unknown, malformed or out of range; the message says where it came from."""


class Settings(BaseModel):
    """Every setting of the service. Units stand in the names."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: Path | None = Field(
        default=None,
        description="Checkpoint directory in the Hugging Face layout (model_index.json, ...). "
        "Left out: the bundled fluxd-demo, which draws shapes.",
    )
    device: str = Field(
        default="auto",
        description="Where the model runs: auto, cpu, mps, cuda or cuda:N.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Number format of the weights: auto, float32, bfloat16 or float16.",
    )
    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address to listen on. Anything but loopback opens the service to others.",
    )
    port: int = Field(
        default=7861,
        ge=0,
        le=65535,
        description="TCP port to listen on; 0 takes a free one and logs it.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info",
        description="Least level that is logged. Prompts are logged at debug only.",
    )
    log_format: Literal["auto", "human", "plain"] = Field(
        default="auto",
        description="human: short, coloured; plain: full timestamps; auto: human on a terminal.",
    )
    queue_limit: int = Field(
        default=32,
        ge=1,
        le=10_000,
        description="Jobs that may wait. One more is refused with 429 and Retry-After.",
    )
    default_width: int | None = Field(
        default=None,
        description="Width in pixels of a picture whose request names neither size nor "
        "references. Left out: the model's own (512; of fluxd-demo 256).",
    )
    default_height: int | None = Field(
        default=None,
        description="Height in pixels of such a picture.",
    )
    max_body_bytes: ByteSize = Field(
        default=ByteSize(64 * 2**20),
        ge=1024,
        description="Largest request body; a larger one is refused with 413. Takes 64MiB, too.",
    )
    max_image_pixels: int = Field(
        default=25_000_000,
        ge=64 * 64,
        le=PILLOW_PIXEL_LIMIT,
        description="Most pixels of one input picture, checked before it is decoded.",
    )
    max_references: int = Field(
        default=MAX_REFERENCES,
        ge=0,
        le=MAX_REFERENCES,
        description="Most reference pictures in one request; 0 refuses them all.",
    )
    conditioning_cache_bytes: ByteSize = Field(
        default=ByteSize(256 * 2**20),
        ge=0,
        description="Memory for the text embeddings of recent prompts; 0 keeps none.",
    )
    warm_up_sizes: tuple[str, ...] | None = Field(
        default=None,
        max_length=32,
        description="Sizes drawn once before the service is ready, so that first jobs are fast. "
        "Left out: the model's own.",
    )
    request_timeout_s: float = Field(
        default=600.0,
        gt=0,
        le=86_400,
        allow_inf_nan=False,
        description="A request that has not finished after so long is cancelled, with 504.",
    )
    shutdown_grace_s: float = Field(
        default=30.0,
        ge=0,
        le=3_600,
        allow_inf_nan=False,
        description="How long a running job may go on after SIGTERM.",
    )

    @field_validator("device")
    @classmethod
    def _check_device(cls, value: str) -> str:
        if _DEVICE.fullmatch(value) is None:
            raise ValueError(f"should be auto, cpu, mps, cuda or cuda:N; got {value!r}")
        return value

    @field_validator("default_width", "default_height")
    @classmethod
    def _check_side(cls, value: int | None) -> int | None:
        return None if value is None else _checked_side("the default size", value)

    @field_validator("warm_up_sizes", mode="before")
    @classmethod
    def _split_sizes(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("warm_up_sizes")
    @classmethod
    def _check_sizes(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for size in value or ():
            parse_size(size)
        return value

    @property
    def is_loopback(self) -> bool:
        """Whether only programs on this machine can reach the service."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def warm_up_sizes_px(self) -> tuple[tuple[int, int], ...] | None:
        """``warm_up_sizes`` as (width, height) pairs, in pixels."""
        if self.warm_up_sizes is None:
            return None
        return tuple(parse_size(size) for size in self.warm_up_sizes)


@dataclass(frozen=True)
class LoadedSettings:
    """Settings and, for each name, where its value came from."""

    values: Settings
    origins: Mapping[str, str]

    def as_toml(self) -> str:
        """The effective settings as a TOML file, with help and origin as comments."""
        blocks = []
        for name, field in Settings.model_fields.items():
            value = getattr(self.values, name)
            line = f"# {name} = ..." if value is None else f"{name} = {toml_value(value)}"
            blocks.append(f"# {field.description}\n{line}  # {self.origins[name]}")
        return "\n\n".join(blocks) + "\n"


def parse_size(text: str) -> tuple[int, int]:
    """``"512x768"`` as (width, height) in pixels.

    Raises:
        ValueError: when it is not a size, or not one that can be drawn.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"a size is written WIDTHxHEIGHT, such as 512x768; got {text!r}")
    width, height = int(match[1]), int(match[2])
    return _checked_side("width", width), _checked_side("height", height)


def toml_value(value: Any) -> str:
    """A setting's value in TOML's notation."""
    if isinstance(value, tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, (int, float)):
        return repr(value if isinstance(value, float) else int(value))
    return json.dumps(str(value), ensure_ascii=False)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the closest known one, or all of them."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known names: {', '.join(sorted(names))}"


def load_settings(
    flags: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
    config: Path | None = None,
) -> LoadedSettings:
    """Read all sources once; a flag beats the environment, which beats the file.

    Args:
        flags: settings given on the command line, by name.
        environment: variables to read; those of the process when left out.
        config: the TOML file; ``FLUXD_CONFIG`` or ``config/fluxd.toml`` when left out.

    Raises:
        SettingsError: for an unknown name, a malformed file or a value out of range.
    """
    variables = os.environ if environment is None else environment
    found: _Found = {}
    found.update(_from_file(config, variables))
    found.update(_from_environment(variables))
    found.update(_known(flags, "flag"))
    origins = {
        name: found[name][1] if name in found else "default" for name in Settings.model_fields
    }
    try:
        values = Settings(**{name: value for name, (value, _) in found.items()})
    except ValidationError as error:
        raise SettingsError(_explain(error, origins)) from None
    return LoadedSettings(values, origins)


def _from_file(config: Path | None, variables: Mapping[str, str]) -> _Found:
    named = config or (Path(variables[CONFIG_VARIABLE]) if CONFIG_VARIABLE in variables else None)
    path = named or DEFAULT_CONFIG
    if named is None and not path.is_file():
        return {}
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or "cannot be read"
        raise SettingsError(f"settings file {path}: {reason}; name one that exists") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"settings file {path} is not valid TOML: {error}") from None
    return _known(found, f"file {path}")


def _from_environment(variables: Mapping[str, str]) -> _Found:
    known = {f"{ENV_PREFIX}{name.upper()}": name for name in Settings.model_fields}
    found: _Found = {}
    for variable, value in variables.items():
        if not variable.startswith(ENV_PREFIX) or variable == CONFIG_VARIABLE:
            continue
        if variable not in known:
            hint = nearest(variable, [*known, CONFIG_VARIABLE])
            raise SettingsError(f"unknown environment variable {variable}; {hint}")
        found[known[variable]] = (value, f"environment {variable}")
    return found


def _known(values: Mapping[str, Any], origin: str) -> _Found:
    for name in values:
        if name not in Settings.model_fields:
            raise SettingsError(
                f"unknown setting {name!r} ({origin}); {nearest(name, Settings.model_fields)}"
            )
    return {name: (value, origin) for name, value in values.items()}


def _checked_side(name: str, value: int) -> int:
    try:
        check_side(name, value)
    except InvalidParamsError as error:
        raise ValueError(error.message) from None
    return value


def _explain(error: ValidationError, origins: Mapping[str, str]) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        name = str(problem["loc"][0])
        reason = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
        if problem["type"] != "value_error":
            reason = f"{reason}; got {problem['input']!r}"
        lines.append(f"setting {name} ({origins[name]}): {reason}")
    return "\n".join(lines)
