"""Where a server is: from a URL as it is typed to the base that paths are appended to."""

from __future__ import annotations

import ipaddress
from typing import Final
from urllib.parse import urlsplit

from aphro_core.errors import UsageError

DEFAULT_PORT: Final = 2242


def parse_base_url(text: str) -> str:
    """``node1`` -> ``http://node1:2242``, ``:8000`` -> this host; with a scheme as it is, less ``/v1`` and slashes.

    Raises UsageError for what is no address of an HTTP server.
    """
    typed = text.strip()
    has_scheme = "://" in typed
    url = typed if has_scheme else f"http://{'127.0.0.1' if typed.startswith(':') else ''}{typed}"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise _no_address(text, str(error)) from error
    if parts.scheme not in ("http", "https") or not parts.hostname or len(url.split()) != 1:
        raise _no_address(text, "allowed: http:// or https://, a host, and perhaps a port and a path")
    if parts.username or parts.query or parts.fragment:
        raise _no_address(text, "it may not have a user, a query or a fragment")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    port = port if port is not None or has_scheme else DEFAULT_PORT
    path = parts.path.rstrip("/").removesuffix("/v1")
    return f"{parts.scheme}://{host}{'' if port is None else f':{port}'}{path}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can be meant."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False  # a name: where it leads is not ours to guess


def _no_address(text: str, why: str) -> UsageError:
    return UsageError(f"{text!r} is not the address of a server: {why}", hint="for example http://127.0.0.1:2242")
