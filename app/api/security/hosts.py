"""By which names the service may be called.

A web page can point a name of its own at this machine's address (DNS rebinding);
the browser then takes the service for a part of that page's site. The Host header
gives it away, since it holds the page's name. Addresses and ``localhost`` cannot be
rebound, so they always work; other names must be in the settings.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

from app.errors import HostNotAllowedError

_AUTHORITY = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(:[0-9]{1,5})?")
_SHOWN_CHARS = 80


class HostRules:
    """The names in ``allowed_hosts`` and the one that the service listens on."""

    def __init__(self, allowed: Iterable[str], listening_on: str) -> None:
        rules = {rule.lower() for rule in allowed}
        self._any = "*" in rules
        self._domains = tuple(rule[1:] for rule in rules if rule.startswith("*."))
        self._names = rules | {"localhost", listening_on.lower()}

    def check(self, sent: str | None) -> None:
        """Judge a Host header. Only a client that is no browser (HTTP/1.0) sends none.

        Raises:
            HostNotAllowedError: with the remedy.
        """
        if sent is None or self._any:
            return
        match = _AUTHORITY.fullmatch(sent)
        host = match["host"].lower().rstrip(".") if match else ""
        if not host or not self._is_allowed(host):
            raise HostNotAllowedError(
                f"this service does not answer to the name {sent[:_SHOWN_CHARS]!r}; call it by its "
                "address or as localhost, or add the name to the setting allowed_hosts"
            )

    def _is_allowed(self, host: str) -> bool:
        if host in self._names or host.endswith((".localhost", *self._domains)):
            return True
        try:
            ipaddress.ip_address(host.strip("[]"))
        except ValueError:
            return False
        return True
