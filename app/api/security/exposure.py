"""What the operator is warned of at the start: settings that open the service."""

from __future__ import annotations

from app.settings import Settings


def exposure_warnings(settings: Settings) -> list[str]:
    """One sentence for each door that stands open, with how to shut it."""
    warnings = []
    if not settings.is_loopback and not settings.api_keys:
        warnings.append(
            f"listening on {settings.host} WITHOUT API KEYS: everyone who can reach this "
            "machine's network address can use this service and fill its queue; set host to "
            "127.0.0.1, or make keys with 'fluxd hash-key NAME', unless that is meant"
        )
    elif not settings.is_loopback:
        warnings.append(
            f"listening on {settings.host}: everyone who can reach this machine's network address "
            "can try; keys, prompts and pictures travel unencrypted unless a proxy adds TLS"
        )
    if "*" in settings.cors_origins and not settings.api_keys:
        warnings.append(
            "cors_origins has '*' and there are no API keys: every web page that is open in a "
            "browser near this service can use it; name the origins that should"
        )
    if "*" in settings.allowed_hosts and not settings.api_keys:
        warnings.append(
            "allowed_hosts has '*' and there are no API keys: a web page can use this service by "
            "pointing its own name here (DNS rebinding); list the names that are needed"
        )
    if settings.remote_images and not settings.is_loopback and not settings.api_keys:
        warnings.append(
            "remote_images is on and there are no API keys: everyone who can reach this machine "
            "can make it fetch addresses; set keys or remote_image_hosts"
        )
    return warnings
