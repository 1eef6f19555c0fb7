"""The fish script: one ``complete`` line a flag, hosts by fish's own function, models by globbing."""

from __future__ import annotations

from typing import Final

from aphro_cli.completion_tree import Command, Flag, Value, alike, quote

_INSTALL: Final = "# Install: aphro completion install"
_FUNCTIONS: Final = r"""
function __aphro_models  # ids in the Hugging Face cache, files in aphro's
    set -l cache $HOME/.cache
    test -n "$XDG_CACHE_HOME"; and set cache $XDG_CACHE_HOME
    set -l hub $cache/huggingface/hub
    test -n "$HF_HOME"; and set hub $HF_HOME/hub
    test -n "$HF_HUB_CACHE"; and set hub $HF_HUB_CACHE
    for entry in $hub/models--*/snapshots
        string replace -r '.*/models--(.*)/snapshots$' '$1' -- $entry | string replace -a -- '--' '/'
    end
    for entry in $cache/aphro/models/*
        echo $entry
    end
end
"""
_NAMES: Final = {
    "model": "(__aphro_models)",
    "host": "(__fish_print_hostnames)",
    "hosts": "(__fish_complete_list , __fish_print_hostnames)",
}


def render_fish(commands: list[Command], header: str) -> str:
    lines = [header, _INSTALL, *_FUNCTIONS.rstrip().splitlines(), ""]
    lines += ["complete -c aphro -n __fish_use_subcommand -f -l help -d 'Show help and exit.'"]
    lines += ["complete -c aphro -n __fish_use_subcommand -f -l version -d 'Print the versions.'"]
    for command in commands:
        lines.append(f"complete -c aphro -n __fish_use_subcommand -f -a {command.name} -d '{quote(command.help)}'")
    for names, command in alike(commands):
        seen = f"__fish_seen_subcommand_from {' '.join(names)}"
        if command.children:
            inner = " ".join(child.name for child in command.children)
            first = f"'{seen}; and not __fish_seen_subcommand_from {inner}'"
            for child in command.children:
                lines.append(f"complete -c aphro -n {first} -f -a {child.name} -d '{quote(child.help)}'")
                lines += _command(child, f"'{seen}; and __fish_seen_subcommand_from {child.name}'")
        else:
            lines += _command(command, f"'{seen}'")
    return "\n".join([*lines, ""])


def _command(command: Command, where: str) -> list[str]:
    """``where``: the condition, in quotes, under which it is being typed."""
    offered, takes_files = _offer(command.argument), command.argument.kind in ("file", "model")
    lines = []
    if offered or not takes_files:
        lines.append(f"complete -c aphro -n {where}{'' if takes_files else ' -f'}{offered}")
    return lines + [f"complete -c aphro -n {where} {_flag(flag)}" for flag in command.flags]


def _flag(flag: Flag) -> str:
    kinds = {2: "-s", 3: "-o"}  # -h; -tp, which fish calls an old-style option
    words = [
        f"-l {name[2:]}" if name.startswith("--") else f"{kinds.get(len(name), '-o')} {name[1:]}" for name in flag.names
    ]
    value = {"none": "", "file": " -r -F", "model": " -r -F"}.get(flag.value.kind, " -x")
    return f"{' '.join(words)}{value}{_offer(flag.value)} -d '{quote(flag.help)}'"


def _offer(value: Value) -> str:
    offered = " ".join([*value.words, *([_NAMES[value.kind]] if value.kind in _NAMES else [])])
    return f" -a '{offered}'" if offered else ""
