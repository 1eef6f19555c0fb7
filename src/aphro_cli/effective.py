"""Where values come from: flags over environment over ``--config`` over defaults; and ``--print-config``."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, Final

import typer

from aphro_cli.config_file import Option, match_entries, read_entries
from aphro_cli.console import open_console, run_reported
from aphro_cli.cors_options import JSON_LISTS
from aphro_core.environment import is_secret
from aphro_core.errors import UsageError

NOT_IN_FILES: Final = {"config", "print_config", "dry_run", "as_json"}
SECRET: Final = {"api_key"}
ENVIRONMENT: Final = "env"  # NAME=VALUE, some of them secrets
_LINES: Final = "aphro.config_lines"  # in the context's meta: parameter name -> file, line


def load_config(context: typer.Context, file: str | None) -> str | None:
    """Callback of ``--config``: its values become the defaults of all options that are not typed.

    Those are processed after the typed ones, so it need not be eager; an eager option would slow ``--help`` down.
    """
    if file is None or context.resilient_parsing:
        return file
    console = open_console("info", term=os.environ.get("TERM", ""))

    def load() -> int:
        path = Path(file).expanduser()
        params: Any = {param.name: param for param in context.command.params if param.name not in NOT_IN_FILES}
        found = match_entries(read_entries(path), [_option(param) for param in params.values()], path)
        for name, (value, line) in found.items():
            try:
                params[name].process_value(context, value)
            except typer.BadParameter as error:
                raise UsageError(f"{path}, line {line}: {_option(params[name]).spellings[0]}: {error}") from error
        if found.keys() & SECRET and stat.S_IMODE(path.stat().st_mode) & 0o077:
            console.warn(f"{path} has API keys, and others can read it: chmod 600 {path}")
        context.default_map = {name: value for name, (value, _) in found.items()}
        context.meta[_LINES] = {name: f"{path} line {line}" for name, (_, line) in found.items()}
        return 0

    code = run_reported(console, load)
    if code:
        raise typer.Exit(code)
    return file


def _option(param: Any) -> Option:
    """The long name first; ``model`` for MODEL."""
    flags = [name for name in param.opts if name.startswith("-")] or [param.name]
    spellings = tuple(name.lstrip("-") for name in flags)
    return Option(
        param.name,
        spellings,
        is_switch=bool(getattr(param, "is_flag", False)),
        is_repeated=bool(getattr(param, "multiple", False)),
        is_json_list=param.name in JSON_LISTS,
    )


def read_values(context: typer.Context) -> list[dict[str, Any]]:
    """Every option in the order of ``--help``: ``key``, ``value`` and ``source``. Keys of clients are never shown."""
    params: list[Any] = [param for param in context.command.params if param.name not in {*NOT_IN_FILES, "help"}]
    lines = context.meta.get(_LINES, {})
    rows = []
    for param in params:
        value: Any = context.params[param.name]
        source = _source(context, param, lines)
        if param.name in SECRET and value:
            value, source = None, f"{source}; {len(value)} set, not shown"
        if param.name == ENVIRONMENT and value:
            value = [_without_secret(word) for word in value]
        rows.append({"key": _option(param).spellings[0], "value": value, "source": source})
    return rows


def _without_secret(word: str) -> str:
    """The name alone takes the value that the shell has."""
    name = word.partition("=")[0]
    return name if is_secret(name) else word


def _source(context: Any, param: Any, lines: dict[str, str]) -> str:
    kind = context.get_parameter_source(param.name).name
    if kind == "ENVIRONMENT":
        return str(param.envvar)
    names = {"COMMANDLINE": "command line", "DEFAULT_MAP": lines.get(param.name, "file")}
    return names.get(kind, "default")


def render_values(rows: list[dict[str, Any]]) -> list[str]:
    """A file for ``--config``: the same values again; comments say where each came from."""
    lines = []
    for row in rows:
        is_set = row["value"] is not None
        text = f"{row['key']}: {_scalar(row['value'])}" if is_set else f"# {row['key']}:"
        lines.append(f"{text}  # {row['source']}")
    return lines


def _scalar(value: Any) -> str:
    """YAML that is read back as it is; a text that could be taken for something else is quoted."""
    import yaml

    if not isinstance(value, str):
        return json.dumps(value)
    quoted: str = yaml.safe_dump(value, default_style='"', width=10**9).rstrip("\n")
    try:
        return value if yaml.safe_load(f"key: {value}  # comment") == {"key": value} else quoted
    except yaml.YAMLError:
        return quoted
