"""What may be typed: commands, flags and what may follow each, read off the functions that parse them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer

Kind = Literal["none", "any", "words", "file", "model", "host", "hosts"]
# metavar -> what is typed in its place; ``hosts``: several, separated by commas
_KINDS: dict[str, Kind] = {"FILE": "file", "MODEL": "model", "URL": "host", "HOST,": "hosts", "HOST:DEVICES,": "hosts"}


@dataclass(frozen=True)
class Value:
    """What stands behind a flag, or as an argument: nothing, anything, one of ``words``, or a name of some kind."""

    kind: Kind
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Flag:
    names: tuple[str, ...]
    help: str
    value: Value


@dataclass(frozen=True)
class Command:
    """Either a command with flags, or a group of ``children``."""

    name: str
    help: str
    flags: tuple[Flag, ...]
    argument: Value
    children: tuple[Command, ...] = ()


def read_commands(app: typer.Typer) -> list[Command]:
    """The commands of ``aphro``: names and help as it parses them, choices as their functions' annotations say."""
    parsed: Any = typer.main.get_command(app)
    commands: list[Command] = []
    for row in app.registered_commands:
        assert row.name is not None
        assert row.callback is not None
        hints = get_type_hints(row.callback, include_extras=True)
        kinds = {name: get_args(hint)[0] for name, hint in hints.items() if get_args(hint)}
        command = parsed.commands[row.name]
        flags, argument = [], Value("none")
        for param in command.params:
            if param.opts[0].startswith("-"):
                names = (*param.opts, *param.secondary_opts)
                flags.append(Flag(names, param.help, _value_of(param, kinds[param.name])))
            else:
                argument = _value_of(param, kinds[param.name])
        help_flag = Flag(("--help", "-h"), "Show help and exit.", Value("none"))
        summary = row.short_help or (row.callback.__doc__ or "").splitlines()[0]
        commands.append(Command(row.name, summary, (*flags, help_flag), argument))
    for group in app.registered_groups:
        inner = group.typer_instance
        assert inner is not None
        assert inner.info.name is not None
        children = tuple(read_commands(inner))
        commands.append(Command(inner.info.name, str(inner.info.help), (), Value("none"), children))
    return commands


def _value_of(param: Any, kind: Any) -> Value:
    """The annotation names the choices, or the metavar does: its words in small letters can be typed as they are."""
    if getattr(param, "is_flag", False):
        return Value("none")
    if get_origin(kind) is Literal:
        return Value("words", tuple(map(str, get_args(kind))))
    words = re.split(r"[|\[\] .]+", (param.metavar or "").replace("...", " "))
    named = [_KINDS[word] for word in words if word in _KINDS]
    small = tuple(word for word in words if word and word == word.lower())
    if param.name == "gpu":
        return Value("words", _cards())
    return Value(named[0], small) if named else Value("words", small) if small else Value("any")


def _cards() -> tuple[str, ...]:
    from aphro_core.estimate.cards import CARDS

    return tuple(card.name.replace(" ", "-") for card in CARDS)


def alike(commands: list[Command]) -> list[tuple[list[str], Command]]:
    """Commands with the same flags (``run`` and ``serve``) under one entry."""
    groups: dict[tuple[tuple[Flag, ...], tuple[Command, ...]], tuple[list[str], Command]] = {}
    for command in commands:
        key = (command.flags, command.children)
        groups.setdefault(key, ([], command))[0].append(command.name)
    return list(groups.values())


def quote(text: str) -> str:
    """Fit for single quotes in all three shells, and for zsh's brackets and colons."""
    return text.replace("'", "\u2019").replace("[", "(").replace("]", ")").replace(":", " -")
