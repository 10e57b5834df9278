"""Where a setting may come from, and which source wins.

Flags, then ``FLUXD_*`` environment variables, then a TOML file, then the table's defaults.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from app.settings.table import Settings

ENV_PREFIX = "FLUXD_"
CONFIG_VARIABLE = "FLUXD_CONFIG"
# For programs that use a service, not for the service.
CLIENT_VARIABLES = ("FLUXD_SERVER", "FLUXD_KEY")
DEFAULT_CONFIG = Path("config/fluxd.toml")
# A value and where it came from, by the setting's name.
_Found = dict[str, tuple[Any, str]]


class SettingsError(Exception):
    """A setting is unknown, malformed or out of range; the message says where it came from."""


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


def _explain(error: ValidationError, origins: Mapping[str, str]) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        name = str(problem["loc"][0])
        reason = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
        if problem["type"] != "value_error":
            reason = f"{reason}; got {problem['input']!r}"
        lines.append(f"setting {name} ({origins[name]}): {reason}")
    return "\n".join(lines)
