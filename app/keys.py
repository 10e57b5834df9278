"""API keys: how one is made, what the settings keep of it, and who sent it.

The settings hold a hash and never the key. SHA-256 without salt or stretching is
enough because a key is no password: 256 random bits cannot be found by trying.
Knows nothing of HTTP.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

# "sk-": some apps refuse to send anything else as the key of an OpenAI-style service.
PREFIX = "sk-fluxd-"
RANDOM_BYTES = 32
# Of keys that were made elsewhere. Shorter ones could be found by trying.
MIN_KEY_CHARS = 32
MAX_KEY_CHARS = 512

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NAME_RULE = (
    "a key is written NAME:HASH, the name of letters, digits, '.', '_' and '-'; "
    "'fluxd hash-key NAME' makes one"
)
_HASH = re.compile(r"[0-9a-f]{64}")
_PER_MINUTE = re.compile(r"[0-9]{1,7}")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One entry of the settings.

    Attributes:
        name: who it is; stands in logs and decides whose turn it is.
        digest: SHA-256 of the key, in hexadecimal.
        per_minute: this key's own rate limit; None takes the service's, 0 is none.
    """

    name: str
    digest: str
    per_minute: int | None = None

    def __post_init__(self) -> None:
        if _NAME.fullmatch(self.name) is None:
            raise ValueError(_NAME_RULE)

    @classmethod
    def parse(cls, entry: str) -> ApiKey:
        """``NAME:HASH`` or ``NAME:HASH:PER_MINUTE``.

        Raises:
            ValueError: saying what is wrong, without quoting what may be a key.
        """
        name, named, rest = entry.partition(":")
        digest, limited, per_minute = rest.partition(":")
        if not named or _NAME.fullmatch(name) is None:
            raise ValueError(_NAME_RULE)
        if _HASH.fullmatch(digest) is None:
            raise ValueError(
                f"the key of {name!r} must be the 64 hexadecimal digits of its hash, never the "
                "key itself; 'fluxd hash-key NAME' makes one"
            )
        if not limited:
            return cls(name, digest)
        if _PER_MINUTE.fullmatch(per_minute) is None:
            raise ValueError(f"the rate limit of {name!r} must be a number of requests a minute")
        return cls(name, digest, int(per_minute))

    @property
    def entry(self) -> str:
        """As the settings hold it."""
        own_limit = "" if self.per_minute is None else f":{self.per_minute}"
        return f"{self.name}:{self.digest}{own_limit}"


class KeyRing:
    """All keys of the settings; says whose a sent key is."""

    def __init__(self, entries: Iterable[str]) -> None:
        self._keys = tuple(ApiKey.parse(entry) for entry in entries)

    def __bool__(self) -> bool:
        """Whether there are keys; without any, everyone may use the service."""
        return bool(self._keys)

    def find(self, sent: str) -> ApiKey | None:
        """The key's owner. Takes the same time whichever key matches, or none."""
        digest = digest_of(sent)
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found


def new_key() -> str:
    """A random key."""
    return PREFIX + secrets.token_urlsafe(RANDOM_BYTES)


def check_key(key: str) -> None:
    """Whether a key that was made elsewhere can be used.

    Raises:
        ValueError: it is too short or cannot be sent in a header.
    """
    if not MIN_KEY_CHARS <= len(key) <= MAX_KEY_CHARS:
        raise ValueError(
            f"a key must have {MIN_KEY_CHARS} to {MAX_KEY_CHARS} characters; got {len(key)}"
        )
    if not all("!" <= character <= "~" for character in key):
        raise ValueError("a key must be of ASCII characters without spaces")


def digest_of(key: str) -> str:
    """The key's SHA-256 in hexadecimal."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
