"""API keys: who may ask, decided on the very path that is routed, and whose prefix cache a request may share."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from typing import Final

from starlette.types import Scope

from aphro_core.errors import UsageError
from aphro_core.server.refusals import HttpError

OPEN_PATHS: Final = frozenset({"/livez", "/readyz", "/health"})


class Keys:
    """The keys that are good. None at all: anybody may ask."""

    def __init__(self, keys: Sequence[str]) -> None:
        if not all(key.strip() for key in keys):
            raise UsageError("an API key is empty", hint="leave --api-key out, or give it a value")
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def admit(self, scope: Scope) -> str:
        """The cache salt of the caller, the same for all its requests. Raises HttpError (401)."""
        if not self._digests or scope["path"] in OPEN_PATHS:
            return ""
        given = hashlib.sha256(_bearer_token(scope)).digest()
        # every key is compared whatever the others said: time tells nothing about any of them
        if not any([hmac.compare_digest(digest, given) for digest in self._digests]):
            raise HttpError(
                401,
                "missing or wrong API key, expected the header 'Authorization: Bearer YOUR_API_KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return hashlib.sha256(b"prefix cache" + given).hexdigest()[:32]


def _bearer_token(scope: Scope) -> bytes:
    """The token, or nothing where there is none or more than one."""
    values = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
    if len(values) != 1:
        return b""
    scheme, _, token = values[0].strip().partition(b" ")
    return bytes(token.strip()) if scheme.lower() == b"bearer" else b""
