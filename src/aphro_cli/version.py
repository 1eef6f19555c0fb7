"""``aphro version``: what is installed here."""

from __future__ import annotations

import sys
from typing import Final

import typer

EXAMPLES: Final = """\b
Examples:
  aphro version
"""


def version() -> None:
    """Print the versions of aphro, Python and torch."""
    from importlib import metadata

    python = ".".join(map(str, sys.version_info[:3]))
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:  # the single file
        torch = "is not there"
    typer.echo(f"aphro {metadata.version('aphro')} (Python {python}, torch {torch})")
