"""The bash script: everything by the shell's own means, no process is started for a TAB."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from aphro_cli.completion_tree import Command, Value, alike

_INSTALL: Final = "# Install: aphro completion install"
_FUNCTIONS: Final = r"""
_aphro_offer() {  # words that begin like the current one, behind the prefix in $1
    local prefix="$1" word
    shift
    for word in "$@"; do
        [[ "$prefix$word" == "$current"* ]] && COMPREPLY+=("$prefix$word")
    done
}

_aphro_models() {  # ids in the Hugging Face cache, files in aphro's
    local cache="${XDG_CACHE_HOME:-$HOME/.cache}" entry name
    local hub="${HF_HUB_CACHE:-${HF_HOME:-$cache/huggingface}/hub}"
    local -a words=()
    for entry in "$hub"/models--*/snapshots; do
        [[ -d "$entry" ]] || continue
        name="${entry%/snapshots}"
        name="${name##*/models--}"
        words+=("${name//--//}")
    done
    for entry in "$cache"/aphro/models/*; do
        [[ -e "$entry" ]] || continue
        printf -v name %q "$entry"
        words+=("$name")
    done
    _aphro_offer "" "${words[@]}"
    compopt -o default
}

_aphro_hosts() {  # of ~/.ssh/config, what it includes, and known_hosts that are not hashed; behind the prefix in $1
    local prefix="$1" file key rest word
    local -a words=() lines=() files=("$HOME/.ssh/config")
    if [[ -r "$HOME/.ssh/config" ]]; then
        while read -r key rest; do
            [[ "${key,,}" == include ]] || continue
            for word in $rest; do
                word="${word/#\~/$HOME}"
                [[ "$word" == /* ]] || word="$HOME/.ssh/$word"
                files+=($word)
            done
        done < "$HOME/.ssh/config"
    fi
    local -
    set -f  # what is read from here on may look like a pattern
    for file in "${files[@]}"; do
        [[ -r "$file" ]] || continue
        while read -r key rest; do
            [[ "${key,,}" == host ]] || continue
            for word in ${rest//\"/}; do
                [[ "$word" == *[*?!]* ]] || words+=("$word")
            done
        done < "$file"
    done
    if [[ -r "$HOME/.ssh/known_hosts" ]]; then
        mapfile -t lines < "$HOME/.ssh/known_hosts"
        for word in "${lines[@]%%[[:blank:]]*}"; do
            [[ "$word" == [@#\|]* ]] || words+=(${word//,/ })
        done
        words=("${words[@]/#\[/}")
        words=("${words[@]/]:/:}")  # [host]:port
    fi
    _aphro_offer "$prefix" "${words[@]}"
}
"""


def render_bash(commands: list[Command], header: str) -> str:
    """A ``complete -F`` function and what it needs."""
    lines = [header, _INSTALL, *_FUNCTIONS.rstrip().splitlines(), ""]
    lines += [
        "_aphro() {",
        '    local current="${COMP_WORDS[COMP_CWORD]}" list="" at="$COMP_CWORD"',
        '    [[ "$current" == ":" ]] && return  # readline cuts HOST:DEVICES into three words',
        '    while [[ "${COMP_WORDS[at-1]}" == ":" ]]; do at=$((at - 2)); done',
        '    local previous="${COMP_WORDS[at-1]}"',
        '    [[ "$current" == "=" ]] && current=""  # readline cuts --dtype=half into three words',
        '    [[ "$previous" == "=" ]] && previous="${COMP_WORDS[COMP_CWORD-2]}"',
        '    [[ "$current" == *,* ]] && list="${current%,*},"',
        "    local IFS=$' \\t\\n'",
        "    COMPREPLY=()",
        *_level(commands, 1, ("--help", "--version")),
    ]
    return "\n".join([*lines, "}", "complete -F _aphro aphro", ""])


def _level(commands: Sequence[Command], depth: int, flags: Sequence[str]) -> list[str]:
    """What may stand at word ``depth``, then a case for each of it."""
    indent = "    " * (2 * depth - 1)
    offered = " ".join([*(command.name for command in commands), *flags])
    lines = [
        f'if [[ "$COMP_CWORD" -eq {depth} ]]; then',
        f'    _aphro_offer "" {offered}',
        "    return",
        "fi",
        f'case "${{COMP_WORDS[{depth}]}}" in',
    ]
    lines = [indent + line for line in lines]
    for names, command in alike(list(commands)):
        lines.append(f"{indent}{'|'.join(names)})")
        if command.children:
            lines += _level(command.children, depth + 1, ("--help",))
        else:
            lines += [f"{indent}    {line}" for line in _command(command)]
        lines.append(f"{indent}    ;;")
    return [*lines, f"{indent}esac"]


def _command(command: Command) -> list[str]:
    words = " ".join(name for flag in command.flags for name in flag.names)
    offered = _offer(command.argument)
    return [
        'case "$previous" in',
        *_behind_flags(command),
        "esac",
        'if [[ "$current" == -* ]]; then',
        f'    _aphro_offer "" {words}',
        *(["else", f"    {offered}"] if offered else []),
        "fi",
    ]


def _behind_flags(command: Command) -> list[str]:
    """Case rows: what may follow the flag before the cursor. What cannot be guessed completes to nothing."""
    rows: dict[str, list[str]] = {}
    for flag in command.flags:
        if flag.value.kind != "none":
            rows.setdefault(_offer(flag.value), []).extend(flag.names)
    return [f"{'|'.join(names)}) {offered + '; ' if offered else ''}return ;;" for offered, names in rows.items()]


def _offer(value: Value) -> str:
    """The commands that fill COMPREPLY; empty where nothing can be guessed."""
    parts = [f'_aphro_offer "" {" ".join(value.words)}'] if value.words else []
    match value.kind:
        case "file":
            parts.append("compopt -o default")
        case "model":
            parts.append("_aphro_models")
        case "host":
            parts.append('_aphro_hosts ""')
        case "hosts":
            parts.append('_aphro_hosts "$list"')
    return "; ".join(parts)
