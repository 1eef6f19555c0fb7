"""Options of ``aphro run`` about pages of other origins: vLLM's names and JSON lists. Its defaults, but that no origin
is let in unless it is named: with vLLM's, every open page may ask a server that listens on loopback only."""

from __future__ import annotations

import json
import re
from typing import Annotated, Final

import typer

from aphro_core.errors import UsageError

JSON_LISTS: Final = {"allowed_origins", "allowed_methods", "allowed_headers"}  # parameters; a file may write lists
ALL: Final = '["*"]'
NONE: Final = "[]"

AllowedOrigins = Annotated[
    str,
    typer.Option(
        "--allowed-origins",
        metavar="JSON",
        help="JSON list of origins whose pages may ask from a browser (CORS); *: any. Default: none.",
    ),
]
AllowedMethods = Annotated[
    str,
    typer.Option("--allowed-methods", metavar="JSON", help="JSON list of methods that pages may use; default: any."),
]
AllowedHeaders = Annotated[
    str,
    typer.Option("--allowed-headers", metavar="JSON", help="JSON list of headers that pages may send; default: any."),
]
AllowCredentials = Annotated[
    bool,
    typer.Option("--allow-credentials", help="Pages may send cookies and logins of the browser; default: they do not."),
]

_ORIGIN: Final = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(:[1-9][0-9]{0,4})?")
_OWN_PORTS: Final = {"http": ":80", "https": ":443"}  # browsers leave them out
_METHOD: Final = re.compile("[A-Z][A-Z-]*")
_HEADER: Final = re.compile(r"[A-Za-z0-9!#$%&'+.^_`|~-]+")


def parse_origins(text: str) -> tuple[str, ...]:
    """``'["https://a.example"]'`` -> its origins, each as a browser spells it: any other would never be met."""
    origins = _parse_list("--allowed-origins", text, '["https://chat.example.com", "http://localhost:3000"]')
    for origin in origins:
        if origin not in ("*", "null") and not _is_origin(origin):
            raise UsageError(
                f"--allowed-origins has {origin!r}, allowed: '*', 'null', or what browsers send: SCHEME://HOST or "
                "SCHEME://HOST:PORT in small letters, without a slash at its end, and without the scheme's own port",
                hint="for example https://chat.example.com",
            )
    return origins


def parse_methods(text: str) -> tuple[str, ...]:
    methods = _parse_list("--allowed-methods", text, '["GET", "POST"]')
    for method in methods:
        if method != "*" and not _METHOD.fullmatch(method):
            raise UsageError(
                f"--allowed-methods has {method!r}, allowed: '*', or a method in capitals", hint="for example GET"
            )
    return methods


def parse_headers(text: str) -> tuple[str, ...]:
    headers = _parse_list("--allowed-headers", text, '["Authorization", "Content-Type"]')
    for header in headers:
        if header != "*" and not _HEADER.fullmatch(header):
            raise UsageError(
                f"--allowed-headers has {header!r}, allowed: '*', or the name of a header",
                hint="for example Authorization",
            )
    return headers


def _parse_list(option: str, text: str, example: str) -> tuple[str, ...]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise UsageError(f"{option} is {text!r}, allowed: a JSON list of texts", hint=f"{option} '{example}'")
    return tuple(values)


def _is_origin(text: str) -> bool:
    match = _ORIGIN.fullmatch(text)
    return match is not None and (match[3] is None or match[3] != _OWN_PORTS.get(match[1]))
