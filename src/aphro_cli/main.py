"""The command ``aphro``: one row a command, imported when it is named; the names by which options may be typed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import cache
from typing import Annotated, Any, Final

import typer

from aphro_cli.help_option import ShowHelp


def _normalise(name: str) -> str:
    """``--tensor_parallel_size`` is ``--tensor-parallel-size``: both spellings are in the field's recipes."""
    return name.replace("_", "-")


def _show_version(is_asked: bool) -> None:
    if is_asked:
        from aphro_cli.version import version

        version()
        raise typer.Exit


def aphro(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="The same as aphro version.")
    ] = False,
    show_help: ShowHelp = False,
) -> None:
    pass


def _run(app: typer.Typer) -> None:
    from aphro_cli import run

    app.command("run", epilog=run.EXAMPLES)(run.run)


def _serve(app: typer.Typer) -> None:
    from aphro_cli import run

    app.command("serve", epilog=run.EXAMPLES, short_help="The same as run.")(run.run)


def _doctor(app: typer.Typer) -> None:
    from aphro_cli import doctor

    app.command("doctor", epilog=doctor.EXAMPLES)(doctor.doctor)


def _estimate(app: typer.Typer) -> None:
    from aphro_cli import estimate

    short = "Say what fits, on which devices, with which tp/pp."
    app.command("estimate", epilog=estimate.EXAMPLES, short_help=short)(estimate.estimate)


def _cluster(app: typer.Typer) -> None:
    from aphro_cli import cluster

    app.add_typer(cluster.app)


def _chat(app: typer.Typer) -> None:
    from aphro_cli import chat

    app.command("chat", epilog=chat.EXAMPLES)(chat.chat)


def _bench(app: typer.Typer) -> None:
    from aphro_cli import bench

    app.command("bench", epilog=bench.EXAMPLES)(bench.bench)


def _top(app: typer.Typer) -> None:
    from aphro_cli import top

    app.command("top", epilog=top.EXAMPLES)(top.top)


def _completion(app: typer.Typer) -> None:
    from aphro_cli import completion

    app.command("completion", epilog=completion.EXAMPLES)(completion.completion)


def _models(app: typer.Typer) -> None:
    from aphro_cli import catalogue

    app.command("models", epilog=catalogue.MODELS_EXAMPLES)(catalogue.models)


def _quants(app: typer.Typer) -> None:
    from aphro_cli import catalogue

    app.command("quants", epilog=catalogue.QUANTS_EXAMPLES)(catalogue.quants)


def _version(app: typer.Typer) -> None:
    from aphro_cli import version

    app.command("version", epilog=version.EXAMPLES)(version.version)


COMMANDS: Final[dict[str, Callable[[typer.Typer], None]]] = {
    "run": _run,
    "serve": _serve,
    "doctor": _doctor,
    "estimate": _estimate,
    "cluster": _cluster,
    "chat": _chat,
    "bench": _bench,
    "top": _top,
    "completion": _completion,
    "models": _models,
    "quants": _quants,
    "version": _version,
}


def build_app(names: Iterable[str] = COMMANDS) -> typer.Typer:
    """With the commands of these names."""
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
    app.callback()(aphro)
    for name in names:
        COMMANDS[name](app)
    return app


@cache
def _whole() -> typer.Typer:
    return build_app()


def __getattr__(name: str) -> Any:
    """``app``: all commands, for whoever reads them off."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _whole()


def main() -> None:
    """Whoever names a command waits for the modules of that one alone."""
    asked = sys.argv[1] if len(sys.argv) > 1 else ""
    build_app([asked] if asked in COMMANDS else COMMANDS)(prog_name="aphro")


if __name__ == "__main__":
    main()
