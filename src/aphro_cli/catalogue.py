"""``aphro models`` and ``aphro quants``: what can be served, and on which devices."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer

from aphro_cli.console import render_table

MODELS_EXAMPLES = """\b
Examples:
  aphro models                                  architectures, as config.json names them
  aphro models --json | jq '.[].architecture'   for scripts
"""
QUANTS_EXAMPLES = """\b
Examples:
  aphro quants                    formats of checkpoints, and what -q makes of other weights
  aphro run ./llama -q int4       4-bit weights, made while loading
"""
AsJson = Annotated[bool, typer.Option("--json", help="One JSON array, for scripts.")]


def models(as_json: AsJson = False) -> None:
    """List the model families that can be served, and those known only by name."""
    from aphro_core.models.catalogue import model_rows

    rows = model_rows()
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows]))
        return
    supported = [[row.architecture, row.family, ", ".join(row.devices)] for row in rows if row.is_supported]
    _print(
        "Supported, each with any tensor and pipeline parallel size:", ["architecture", "family", "devices"], supported
    )
    others = ", ".join(row.architecture for row in rows if not row.is_supported)
    typer.echo(f"\nRecognised, not supported: {others}")


def quants(as_json: AsJson = False) -> None:
    """List the weight formats that can be served, and those known only by name."""
    from aphro_core.models.catalogue import format_rows

    rows = format_rows()
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows]))
        return
    supported = [[row.name, row.what, ", ".join(row.devices)] for row in rows if row.status == "supported"]
    _print(
        "Supported, each with any tensor parallel size that cuts between its groups:",
        ["-q", "weights", "devices"],
        supported,
    )
    others = ", ".join(row.name for row in rows if row.status != "supported")
    typer.echo(f"\nRecognised, not supported: {others}")


def _print(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    typer.echo("\n".join(render_table(title, columns, rows)))
