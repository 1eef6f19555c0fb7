"""The command ``aphro``: one row a command, and the names by which options may be typed."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from aphro_cli import bench, catalogue, chat, cluster, completion, doctor, top
from aphro_cli import estimate as estimate_command
from aphro_cli.help_option import ShowHelp
from aphro_cli.run import EXAMPLES, run

VERSION_EXAMPLES = """\b
Examples:
  aphro version
"""


def _normalise(name: str) -> str:
    """``--tensor_parallel_size`` is ``--tensor-parallel-size``: both spellings are in the field's recipes."""
    return name.replace("_", "-")


app = typer.Typer(
    name="aphro",
    help="A distributed LLM inference server: tensor and pipeline parallel, on GPUs and CPUs.",
    add_completion=False,  # completions/ holds static scripts, which answer TAB without starting Python
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help needs no rich and is there at once
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": _normalise,
        "max_content_width": 110,
    },
)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        version()
        raise typer.Exit


@app.callback()
def aphro(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="The same as aphro version.")
    ] = False,
    show_help: ShowHelp = False,
) -> None:
    pass


def version() -> None:
    """Print the versions of aphro, Python and torch."""
    from importlib import metadata

    python = ".".join(map(str, sys.version_info[:3]))
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:  # the single file
        torch = "is not there"
    typer.echo(f"aphro {metadata.version('aphro')} (Python {python}, torch {torch})")


app.command("run", epilog=EXAMPLES)(run)
app.command("serve", epilog=EXAMPLES, short_help="The same as run.")(run)
app.command("doctor", epilog=doctor.EXAMPLES)(doctor.doctor)
app.command(
    "estimate", epilog=estimate_command.EXAMPLES, short_help="Say what fits, on which devices, with which tp/pp."
)(estimate_command.estimate)
app.add_typer(cluster.app)
app.command("chat", epilog=chat.EXAMPLES)(chat.chat)
app.command("bench", epilog=bench.EXAMPLES)(bench.bench)
app.command("top", epilog=top.EXAMPLES)(top.top)
app.command("completion", epilog=completion.EXAMPLES)(completion.completion)
app.command("models", epilog=catalogue.MODELS_EXAMPLES)(catalogue.models)
app.command("quants", epilog=catalogue.QUANTS_EXAMPLES)(catalogue.quants)
app.command("version", epilog=VERSION_EXAMPLES)(version)


def main() -> None:
    app(prog_name="aphro")


if __name__ == "__main__":
    main()
