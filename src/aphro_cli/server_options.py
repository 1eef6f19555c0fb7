"""The options that every command about a running server has: which one, its model, its key."""

from __future__ import annotations

from typing import Annotated, Final

import typer

DEFAULT_URL: Final = "http://127.0.0.1:2242"

Url = Annotated[str, typer.Argument(metavar="URL", help=f"The server; default: {DEFAULT_URL}.", show_default=False)]
ModelName = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="As the server calls it; default: its only one.")
]
ApiKey = Annotated[
    str | None, typer.Option("--api-key", envvar="APHRO_API_KEY", help="Sent to the server.", show_envvar=True)
]
Timeout = Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds of silence after which to give up.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def first_key(api_key: str | None) -> str | None:
    """A server may have several keys, in one variable separated by spaces; a client sends one."""
    words = (api_key or "").split()
    return words[0] if words else None
