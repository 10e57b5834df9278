"""The one table of settings: name, type, default and help.

Knows nothing of where values come from, nor of what they are used for.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal

from platformdirs import user_cache_path, user_data_path
from pydantic import BaseModel, ByteSize, ConfigDict, Field, field_validator

from app.settings import checks
from fluxcore.params import MAX_REFERENCES

# Pillow refuses pictures of twice this size by itself and warns above it.
PILLOW_PIXEL_LIMIT = 89_478_485


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
        "fp8 on a recent NVIDIA GPU, there the text encoder's, too, and int8 on an x86-64 CPU.",
    )
    kernels: Literal["auto", "plain", "fused"] = Field(
        default="auto",
        description="Plain: PyTorch's kernels; fused: fluxd's own; auto: those where there are "
        "some. On CUDA in Triton, and, from Hopper on, cuDNN's attention; on a CPU with AMX, where "
        "g++ is, products and attention.",
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

    _check_device = field_validator("device")(checks.device)
    _check_side = field_validator("default_width", "default_height")(checks.default_side)
    _split_list = field_validator(
        "warm_up_sizes",
        "api_keys",
        "allowed_hosts",
        "cors_origins",
        "trusted_proxies",
        "model_aliases",
        "webhook_hosts",
        "webhook_networks",
        mode="before",
    )(checks.split_list)
    _check_sizes = field_validator("warm_up_sizes")(checks.sizes)
    _check_keys = field_validator("api_keys")(checks.keys)
    _check_hosts = field_validator("allowed_hosts", "remote_image_hosts", "webhook_hosts")(
        checks.hosts
    )
    _check_webhook_hosts = field_validator("webhook_hosts")(checks.named_hosts)
    _check_origins = field_validator("cors_origins")(checks.web_origins)
    _check_networks = field_validator(
        "trusted_proxies", "remote_image_networks", "webhook_networks"
    )(checks.networks)

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
        return tuple(checks.parse_size(size) for size in self.warm_up_sizes)
