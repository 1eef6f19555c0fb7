"""``aphro version``: what is installed here."""

from __future__ import annotations

import json
import sys
from typing import Final

import typer

from aphro_cli.catalogue import AsJson

EXAMPLES: Final = """\b
Examples:
  aphro version
  aphro version --json | jq -r .torch
"""


def version(as_json: AsJson = False) -> None:
    """Print the versions of aphro, Python and torch."""
    from importlib import metadata

    aphro, python = metadata.version("aphro"), ".".join(map(str, sys.version_info[:3]))
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:  # the single file
        torch = None
    if as_json:
        typer.echo(json.dumps({"aphro": aphro, "python": python, "torch": torch}))
    else:
        typer.echo(f"aphro {aphro} (Python {python}, torch {torch or 'is not there'})")
