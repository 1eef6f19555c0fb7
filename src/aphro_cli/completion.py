"""``aphro completion``: put the completion script where the shell looks for it, take it away, or print it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from aphro_cli.console import open_console, run_reported

EXAMPLES: Final = """\b
Examples:
  aphro completion install                for the shell that this runs in; again after an update
  aphro completion install --shell zsh
  aphro completion install --uninstall    take it away
  aphro completion show --shell bash > /etc/bash_completion.d/aphro
"""

Action = Annotated[
    Literal["install", "show"],
    typer.Argument(metavar="install|show", help="Write the script to its place, or to standard output."),
]
Shell = Annotated[Literal["auto", "bash", "zsh", "fish"], typer.Option("--shell", help="Whose script.")]
Uninstall = Annotated[bool, typer.Option("--uninstall", help="With install: take away what it wrote.")]


def completion(action: Action, shell: Shell = "auto", uninstall: Uninstall = False) -> None:
    """Install completion by TAB for bash, zsh or fish."""
    console = open_console("info", term=os.environ.get("TERM", ""))

    def work() -> int:
        from aphro_cli import completion_install as places
        from aphro_cli.completions import HEADER, render
        from aphro_core.errors import UsageError

        if shell == "auto":
            chosen, why = places.detect_shell(os.environ, places.ancestor_names(os.getpid()))
        else:
            chosen, why = shell, ""
        if action == "show":
            if uninstall:
                raise UsageError("--uninstall is for install", hint="aphro completion install --uninstall")
            typer.echo(render(places.SHELLS[chosen]), nl=False)
            return 0
        if why:
            console.line(f"{chosen}: {why} (--shell for another)")
        place = places.find_place(chosen, os.environ, Path.home())
        if uninstall:
            lines = places.uninstall(place, HEADER)
        else:
            lines = places.install(place, render(places.SHELLS[chosen]), HEADER)
            lines.append("new shells have it")
        for line in lines:
            console.line(line)
        return 0

    raise typer.Exit(run_reported(console, work))
