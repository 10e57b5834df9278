"""What a setting's value must look like, beside its type and range.

Each function takes a value as it came and gives it as it is meant, or raises ``ValueError`` with
what is allowed. Knows nothing of which setting it is.
"""

from __future__ import annotations

import ipaddress
import re
import tomllib
from typing import Any

from app.keys import ApiKey
from fluxcore.errors import InvalidParamsError
from fluxcore.params import check_side

_DEVICE = re.compile(r"auto|cpu|mps|cuda(:[0-9]{1,3})?")
_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")
_HOST_RULE = re.compile(r"\*|(\*\.)?[a-z0-9]([a-z0-9_.-]{0,251}[a-z0-9])?")
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://([a-z0-9_.-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")


def device(value: str) -> str:
    """A kind of device, and its number where there are several."""
    if _DEVICE.fullmatch(value) is None:
        raise ValueError(f"should be auto, cpu, mps, cuda or cuda:N; got {value!r}")
    return value


def default_side(value: int | None) -> int | None:
    """A side that can be drawn, or none."""
    return None if value is None else _checked_side("the default size", value)


def split_list(value: Any) -> Any:
    """A list that a variable or a flag gives as text, as that list."""
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


def sizes(value: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Sizes that can be drawn."""
    for size in value or ():
        parse_size(size)
    return value


def keys(value: tuple[str, ...]) -> tuple[str, ...]:
    """Entries of keys, each with a name of its own."""
    names = [ApiKey.parse(entry).name for entry in value]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two keys are named {name!r}; give each its own name")
    return value


def hosts(value: tuple[str, ...]) -> tuple[str, ...]:
    """Rules for hosts, in small letters."""
    lowered = tuple(rule.lower() for rule in value)
    for rule in lowered:
        if _HOST_RULE.fullmatch(rule) is None:
            raise ValueError(f"a host is NAME, *.DOMAIN or *, without a port; got {rule!r}")
    return lowered


def named_hosts(value: tuple[str, ...]) -> tuple[str, ...]:
    """Rules of which none is for all hosts."""
    if "*" in value:
        raise ValueError("name the hosts that may be told, NAME or *.DOMAIN; got '*'")
    return value


def web_origins(value: tuple[str, ...]) -> tuple[str, ...]:
    """Origins of web pages, in small letters."""
    lowered = tuple(origin.lower() for origin in value)
    for origin in lowered:
        if _ORIGIN.fullmatch(origin) is None:
            raise ValueError(f"an origin is scheme://host[:port]; got {origin!r}")
    return lowered


def networks(value: tuple[str, ...]) -> tuple[str, ...]:
    """Addresses or networks."""
    for network in value:
        try:
            ipaddress.ip_network(network)
        except ValueError:
            raise ValueError(
                f"a network is ADDRESS or ADDRESS/BITS, such as 10.0.0.0/8; got {network!r}"
            ) from None
    return value


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


def _checked_side(name: str, value: int) -> int:
    try:
        check_side(name, value)
    except InvalidParamsError as error:
        raise ValueError(error.message) from None
    return value
