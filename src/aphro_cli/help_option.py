"""The help option of groups: typer's own makes every command load pydantic before its help."""

from __future__ import annotations

from typing import Annotated

import typer


def _show_help(context: typer.Context, is_asked: bool) -> None:
    if is_asked:
        typer.echo(context.get_help())
        raise typer.Exit


ShowHelp = Annotated[
    bool,
    typer.Option("--help", "-h", callback=_show_help, is_eager=True, help="Show this message and exit."),
]
