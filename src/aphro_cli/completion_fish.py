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
        where = f"'__fish_seen_subcommand_from {' '.join(names)}'"
        offered, takes_files = _offer(command.argument), command.argument.kind in ("file", "model")
        if offered or not takes_files:
            lines.append(f"complete -c aphro -n {where}{'' if takes_files else ' -f'}{offered}")
        lines += [f"complete -c aphro -n {where} {_flag(flag)}" for flag in command.flags]
    return "\n".join([*lines, ""])


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
