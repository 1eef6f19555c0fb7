"""The zsh script: ``_arguments`` a command, hosts by zsh's own function, models by globbing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from aphro_cli.completion_tree import Command, Value, alike, quote

_INSTALL: Final = "# Install: aphro completion install"
_FUNCTIONS: Final = r"""
_aphro_models() {  # ids in the Hugging Face cache, files in aphro's, any other file
    local cache="${XDG_CACHE_HOME:-$HOME/.cache}"
    local hub="${HF_HUB_CACHE:-${HF_HOME:-$cache/huggingface}/hub}"
    local -a ids files
    ids=($hub/models--*/snapshots(N:h:t))
    ids=(${${ids#models--}//--//})
    files=($cache/aphro/models/*(N))
    compadd -a ids
    compadd -a files
    _files
}
"""


def render_zsh(commands: list[Command], header: str) -> str:
    """To be found in ``$fpath``, or sourced."""
    lines = ["#compdef aphro", header, _INSTALL, *_FUNCTIONS.rstrip().splitlines(), "", "_aphro() {"]
    lines += _level(commands, 1, ("--help[Show help and exit.]", "--version[Print the versions.]"))
    return "\n".join([*lines, "}", "", 'if [ "$funcstack[1]" = "_aphro" ]; then', '    _aphro "$@"',
                      "else", "    compdef _aphro aphro", "fi", ""])  # fmt: skip


def _level(commands: Sequence[Command], depth: int, flags: Sequence[str]) -> list[str]:
    """What may stand next, then a case for each of it. Each level has shifted the words before it away."""
    indent = "    " * (2 * depth - 1)
    rows = " ".join(f"'{command.name}:{quote(command.help)}'" for command in commands)
    lines = [
        "if (( CURRENT == 2 )); then",
        f"    local -a commands=({rows})",
        "    _describe command commands",
        "    _arguments " + " ".join(f"'{flag}'" for flag in flags),
        "    return",
        "fi",
        'local command="${words[2]}"',
        "shift words",
        "(( CURRENT-- ))",
        'case "$command" in',
    ]
    lines = [indent + line for line in lines]
    for names, command in alike(list(commands)):
        lines.append(f"{indent}{'|'.join(names)})")
        if command.children:
            lines += _level(command.children, depth + 1, ("--help[Show help and exit.]",))
        else:
            lines += [f"{indent}    {line}" for line in _command(command)]
        lines.append(f"{indent}    ;;")
    return [*lines, f"{indent}esac"]


def _command(command: Command) -> list[str]:
    lines = ["_arguments \\"]
    for flag in command.flags:
        value = "" if flag.value.kind == "none" else f":value:{_action(flag.value)}"
        lines += [f"    '*{name}[{quote(flag.help)}]{value}' \\" for name in flag.names]
    action = _action(command.argument)
    return [*lines, f"    '*:{command.argument.kind}:{action}'" if action else "    && return"]


def _action(value: Value) -> str:
    actions = {"file": "_files", "model": "_aphro_models", "host": "_ssh_hosts", "hosts": "_sequence _ssh_hosts"}
    words = f"({' '.join(value.words)})"
    action = actions.get(value.kind, "")
    if value.words and action:
        return f"{{compadd {' '.join(value.words)}; {action}}}"
    return words if value.words else action
