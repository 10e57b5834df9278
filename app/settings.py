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

from platformdirs import user_cache_path, user_data_path
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator

from app.keys import ApiKey
from fluxcore.errors import InvalidParamsError
from fluxcore.params import MAX_REFERENCES, check_side

ENV_PREFIX = "FLUXD_"
CONFIG_VARIABLE = "FLUXD_CONFIG"
# For programs that use a service, not for the service.
CLIENT_VARIABLES = ("FLUXD_SERVER", "FLUXD_KEY")
DEFAULT_CONFIG = Path("config/fluxd.toml")
# Pillow refuses pictures of twice this size by itself and warns above it.
PILLOW_PIXEL_LIMIT = 89_478_485

_DEVICE = re.compile(r"auto|cpu|mps|cuda(:[0-9]{1,3})?")
_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")
_HOST_RULE = re.compile(r"\*|(\*\.)?[a-z0-9]([a-z0-9_.-]{0,251}[a-z0-9])?")
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://([a-z0-9_.-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")
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
    precision: Literal["bf16", "fp8", "int8"] = Field(
        default="bf16",
        description="Large matrix products: bf16 (more exactly, in dtype), or, faster and coarser, "
        "fp8 on a recent NVIDIA GPU and int8 on an x86-64 CPU.",
    )
    kernels: Literal["auto", "plain", "fused"] = Field(
        default="auto",
        description="CUDA only: plain: PyTorch's kernels; fused, which is auto: fluxd's own in "
        "Triton, and, from Hopper on, cuDNN's attention.",
    )
    compile: Literal["auto", "on", "off"] = Field(
        default="off",
        description="Compile the networks before the service is ready: on, off, or auto: on CUDA.",
    )
    cuda_graphs: int = Field(
        default=24,
        ge=0,
        le=1000,
        description="CUDA only: recordings of what the GPU is to do, kept per network and size; "
        "0: none.",
    )
    batching: Literal["off", "exact", "fast"] = Field(
        default="exact",
        description="Steps of several small pictures of one size as one, where a trial shows that "
        "to be faster. exact: only where each picture stays the same bit for bit.",
    )
    residency: Literal["auto", "resident", "balanced", "low"] = Field(
        default="auto",
        description="Weights that stay on the device: all (resident), all but the text encoder's "
        "(balanced), few (low); auto: what fits.",
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
    log_format: Literal["auto", "human", "plain", "json"] = Field(
        default="auto",
        description="human: coloured; plain: full; json: for programs; auto: by the terminal.",
    )
    api_keys: tuple[str, ...] = Field(
        default=(),
        max_length=1000,
        description="Who may use the service: NAME:HASH or NAME:HASH:PER_MINUTE, as "
        "'fluxd hash-key NAME' prints. Empty: everyone.",
    )
    rate_limit_per_minute: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="POST requests that one client (key, or address) may make a minute; 0: any.",
    )
    allowed_hosts: tuple[str, ...] = Field(
        default=(),
        max_length=100,
        description="Names, beside localhost and addresses, that the service is called by: "
        "NAME, *.DOMAIN or *.",
    )
    cors_origins: tuple[str, ...] = Field(
        default=(),
        max_length=100,
        description="Web pages of other origins that may use the service, such as "
        "https://app.example; *: all.",
    )
    trusted_proxies: tuple[str, ...] = Field(
        default=(),
        max_length=100,
        description="Addresses or networks of proxies whose X-Forwarded headers are believed.",
    )
    queue_limit: int = Field(
        default=32,
        ge=1,
        le=1_000,
        description="Jobs that may wait. One more is refused with 429 and Retry-After.",
    )
    queue_pixels: int = Field(
        default=256_000_000,
        ge=64 * 64,
        description="Pixels that waiting jobs may draw and hold together; above it, 429.",
    )
    queue_work_s: float = Field(
        default=600.0,
        gt=0,
        le=86_400,
        allow_inf_nan=False,
        description="Estimated seconds of work that may be accepted at a time; above it, 429. "
        "One job counts as half of it at most.",
    )
    in_flight_limit: int = Field(
        default=8,
        ge=1,
        le=64,
        description="Jobs that may have begun at a time; short ones pass long ones step by step.",
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
    max_bodies_bytes: ByteSize = Field(
        default=ByteSize(512 * 2**20),
        ge=1024,
        description="Bytes of all bodies above 64 KiB that are being read or decoded; then 503.",
    )
    client_timeout_s: float = Field(
        default=20.0,
        gt=0,
        le=3_600,
        allow_inf_nan=False,
        description="A client that neither sends on nor reads on for so long is given up.",
    )
    max_connections: int = Field(
        default=512,
        ge=1,
        le=100_000,
        description="Connections that may be open at a time; more are answered with 503.",
    )
    max_image_bytes: ByteSize = Field(
        default=ByteSize(50 * 2**20),
        ge=1024,
        description="Largest file of one input picture.",
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
    remote_images: bool = Field(
        default=False,
        description="Whether input pictures may be given as http(s) addresses, which are fetched.",
    )
    remote_image_hosts: tuple[str, ...] = Field(
        default=(),
        max_length=100,
        description="Hosts that such addresses may name: NAME or *.DOMAIN. Empty: all public ones.",
    )
    remote_image_networks: tuple[str, ...] = Field(
        default=(),
        max_length=100,
        description="Private addresses or networks that such hosts may have. Empty: none.",
    )
    remote_image_timeout_s: float = Field(
        default=10.0,
        gt=0,
        le=600,
        allow_inf_nan=False,
        description="How long fetching one such picture may take in all.",
    )
    conditioning_cache_bytes: ByteSize = Field(
        default=ByteSize(256 * 2**20),
        ge=0,
        description="Memory for the text embeddings of recent prompts; 0 keeps none.",
    )
    conditioning_store_bytes: ByteSize = Field(
        default=ByteSize(0),
        ge=0,
        description="Disk space for text embeddings, so that a restart keeps them; 0 keeps none.",
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
    model_aliases: tuple[str, ...] = Field(
        default=("dall-e-2", "dall-e-3", "gpt-image-1"),
        max_length=32,
        description="Names besides its own under which GET /v1/models lists the model.",
    )
    strict_model_names: bool = Field(
        default=False,
        description="Refuse names of models that GET /v1/models does not list.",
    )
    picture_link_lifetime_s: float = Field(
        default=3600.0,
        gt=0,
        le=604_800,
        allow_inf_nan=False,
        description="How long the address of a picture works, where one was asked for.",
    )
    picture_link_bytes: ByteSize = Field(
        default=ByteSize(256 * 2**20),
        ge=0,
        description="Memory for pictures with an address; the oldest are dropped first.",
    )
    shutdown_grace_s: float = Field(
        default=30.0,
        ge=0,
        le=3_600,
        allow_inf_nan=False,
        description="How long a running job may go on after SIGTERM.",
    )

    data_dir: str = Field(
        default="auto",
        min_length=1,
        description="Where accepted jobs are kept: a directory, auto (the user's own) or off.",
    )
    job_limit: int = Field(
        default=1000,
        ge=1,
        le=100_000,
        description="Accepted jobs that may be unfinished. One more is refused with 429.",
    )
    job_retention_s: float = Field(
        default=7 * 86_400.0,
        ge=0,
        le=3650 * 86_400.0,
        allow_inf_nan=False,
        description="How long a finished job and its pictures are kept.",
    )
    job_storage_bytes: ByteSize = Field(
        default=ByteSize(2 * 2**30),
        ge=2**20,
        description="Disk space for jobs' pictures; the oldest finished job is removed first.",
    )
    idempotency_retention_s: float = Field(
        default=86_400.0,
        gt=0,
        le=3650 * 86_400.0,
        allow_inf_nan=False,
        description="How long the answer to a request with an Idempotency-Key is kept.",
    )
    webhook_hosts: tuple[str, ...] = Field(
        default=(),
        max_length=100,
        description="Hosts that may be told of a job's end: NAME or *.DOMAIN. Empty: none.",
    )
    webhook_networks: tuple[str, ...] = Field(
        default=(),
        max_length=100,
        description="Private addresses or networks that such hosts may have. Empty: none.",
    )
    webhook_secret_file: Path | None = Field(
        default=None,
        description="File with the secret that webhooks are signed with: whsec_ and base64.",
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

    @field_validator(
        "warm_up_sizes",
        "api_keys",
        "allowed_hosts",
        "cors_origins",
        "trusted_proxies",
        "model_aliases",
        "webhook_hosts",
        "webhook_networks",
        mode="before",
    )
    @classmethod
    def _split_list(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("["):  # as the settings file writes it
            try:
                return tomllib.loads(f"value = {value}")["value"]
            except tomllib.TOMLDecodeError:
                raise ValueError(
                    f'a list is written one,two or ["one", "two"]; got {value!r}'
                ) from None
        return tuple(part.strip() for part in value.split(",") if part.strip())

    @field_validator("warm_up_sizes")
    @classmethod
    def _check_sizes(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for size in value or ():
            parse_size(size)
        return value

    @field_validator("api_keys")
    @classmethod
    def _check_keys(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        names = [ApiKey.parse(entry).name for entry in value]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two keys are named {name!r}; give each its own name")
        return value

    @field_validator("allowed_hosts", "remote_image_hosts", "webhook_hosts")
    @classmethod
    def _check_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        lowered = tuple(rule.lower() for rule in value)
        for rule in lowered:
            if _HOST_RULE.fullmatch(rule) is None:
                raise ValueError(f"a host is NAME, *.DOMAIN or *, without a port; got {rule!r}")
        return lowered

    @field_validator("webhook_hosts")
    @classmethod
    def _check_webhook_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "*" in value:
            raise ValueError("name the hosts that may be told, NAME or *.DOMAIN; got '*'")
        return value

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        lowered = tuple(origin.lower() for origin in value)
        for origin in lowered:
            if _ORIGIN.fullmatch(origin) is None:
                raise ValueError(f"an origin is scheme://host[:port]; got {origin!r}")
        return lowered

    @field_validator("trusted_proxies", "remote_image_networks", "webhook_networks")
    @classmethod
    def _check_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for network in value:
            try:
                ipaddress.ip_network(network)
            except ValueError:
                raise ValueError(
                    f"a network is ADDRESS or ADDRESS/BITS, such as 10.0.0.0/8; got {network!r}"
                ) from None
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
    def data_path(self) -> Path | None:
        """The directory for accepted jobs; None where none are taken."""
        match self.data_dir:
            case "off":
                return None
            case "auto":
                # Two services of one user do not share their jobs.
                return user_data_path("fluxd", appauthor=False) / f"port-{self.port}"
        return Path(self.data_dir).expanduser()

    @property
    def conditioning_store_path(self) -> Path:
        """The directory for text embeddings: beside the jobs where those have a named one."""
        if self.data_dir in ("auto", "off"):
            return user_cache_path("fluxd", appauthor=False) / "embeddings"
        return Path(self.data_dir).expanduser() / "embeddings"

    @property
    def compiled_store_path(self) -> Path:
        """The directory for compiled networks; what lies there is run as it is."""
        if self.data_dir in ("auto", "off"):
            return user_cache_path("fluxd", appauthor=False) / "compiled"
        return Path(self.data_dir).expanduser() / "compiled"

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
    if isinstance(value, bool):
        return str(value).lower()
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
        if not variable.startswith(ENV_PREFIX):
            continue
        if variable == CONFIG_VARIABLE or variable in CLIENT_VARIABLES:
            continue
        if variable not in known:
            hint = nearest(variable, [*known, CONFIG_VARIABLE, *CLIENT_VARIABLES])
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
