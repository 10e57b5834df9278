"""The one table of settings, read once at start from flags, variables and a file.

Owns where a setting may come from and which source wins. Knows nothing of what the settings are
used for.
"""

from app.settings.checks import parse_size
from app.settings.sources import (
    CLIENT_VARIABLES,
    CONFIG_VARIABLE,
    DEFAULT_CONFIG,
    ENV_PREFIX,
    LoadedSettings,
    SettingsError,
    load_settings,
    nearest,
    toml_value,
)
from app.settings.table import Settings

__all__ = [
    "CLIENT_VARIABLES",
    "CONFIG_VARIABLE",
    "DEFAULT_CONFIG",
    "ENV_PREFIX",
    "LoadedSettings",
    "Settings",
    "SettingsError",
    "load_settings",
    "nearest",
    "parse_size",
    "toml_value",
]
