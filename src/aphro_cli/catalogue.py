"""``aphro models`` and ``aphro quants``: what can be served, and on which devices."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, NoReturn

import typer

from aphro_cli.console import open_console, render_table, run_reported
from aphro_core.errors import ExitCode

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
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def models(as_json: AsJson = False) -> None:
    """List the model families that can be served, and those known only by name."""
    from aphro_core.models.catalogue import model_rows

    rows = model_rows()
    if as_json:
        tell(json.dumps([asdict(row) for row in rows]))
    supported = [[row.architecture, row.family, ", ".join(row.devices)] for row in rows if row.is_supported]
    title = "Supported, each with any tensor and pipeline parallel size:"
    others = ", ".join(row.architecture for row in rows if not row.is_supported)
    _tell_rows(title, ["architecture", "family", "devices"], supported, others)


def quants(as_json: AsJson = False) -> None:
    """List the weight formats that can be served, and those known only by name."""
    from aphro_core.models.catalogue import format_rows

    rows = format_rows()
    if as_json:
        tell(json.dumps([asdict(row) for row in rows]))
    supported = [[row.name, row.what, ", ".join(row.devices)] for row in rows if row.status == "supported"]
    title = "Supported, each with any tensor parallel size that cuts between its groups:"
    others = ", ".join(row.name for row in rows if row.status != "supported")
    _tell_rows(title, ["-q", "weights", "devices"], supported, others)


def _tell_rows(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], others: str) -> NoReturn:
    tell("\n".join([*render_table(title, columns, rows), "", f"Recognised, not supported: {others}"]))


def tell(text: str) -> NoReturn:
    """Print it, and that is all; a reader that leaves early (``| head``) wanted no more."""

    def write() -> int:
        typer.echo(text)
        return ExitCode.OK

    raise typer.Exit(run_reported(open_console("info"), write))
