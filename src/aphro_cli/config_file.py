"""``--config FILE``: options out of YAML or TOML, each with the line that it stands in."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from aphro_core.errors import UsageError

Value = str | bool | list[str]
_MAX_BYTES: Final = 2**20
_BOOL, _NULL = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:null"


@dataclass(frozen=True)
class Entry:
    """One key of a file. A value is as it would be typed behind the flag; booleans are those of switches."""

    key: str
    value: Value
    line: int


@dataclass(frozen=True)
class Option:
    """What a key may stand for: the parameter's name, how its flag is spelled, and what it takes."""

    name: str
    spellings: tuple[str, ...]  # without dashes in front; the first is the one to show
    is_switch: bool
    is_repeated: bool
    is_json_list: bool


def read_entries(path: Path) -> list[Entry]:
    """In the file's order. Raises UsageError with file and line for what cannot be read."""
    readers = {".yaml": _read_yaml, ".yml": _read_yaml, ".toml": _read_toml}
    reader = readers.get(path.suffix)
    if reader is None:
        raise UsageError(f"--config {path} is neither YAML nor TOML", hint="name it .yaml, .yml or .toml")
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UsageError(f"--config {path} has more than {_MAX_BYTES} bytes")
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"--config {path} cannot be read: {why}", hint="check the path") from error
    return list(reader(text, path))


def match_entries(entries: Sequence[Entry], options: Sequence[Option], path: Path) -> dict[str, tuple[Value, int]]:
    """Parameter name -> (value, line). Raises UsageError for keys that are unknown (with the nearest), twice, or of the
    wrong kind."""
    known = {spelling: option for option in options for spelling in option.spellings}
    found: dict[str, tuple[Value, int]] = {}
    for entry in entries:
        where = f"{path}, line {entry.line}"
        option = known.get(entry.key.replace("_", "-").lstrip("-"))
        if option is None:
            near = difflib.get_close_matches(entry.key.replace("_", "-"), known, n=1, cutoff=0.0)
            raise UsageError(f"{where}: {entry.key!r} is not an option", hint=f"the nearest is {near[0]}")
        if option.name in found:
            raise UsageError(f"{where}: {entry.key!r} stands in line {found[option.name][1]} already")
        found[option.name] = _fit(entry, option, where), entry.line
    return found


def _fit(entry: Entry, option: Option, where: str) -> Value:
    value = entry.value
    if option.is_switch:
        if not isinstance(value, bool):
            raise UsageError(f"{where}: {entry.key} is {value!r}, allowed: true or false")
        return value
    if isinstance(value, bool):
        word = str(value).lower()
        raise UsageError(f"{where}: {entry.key} is {word}, which is a switch's", hint=f'a text is quoted: "{word}"')
    if option.is_repeated:
        return value if isinstance(value, list) else [value]
    if option.is_json_list and isinstance(value, list):
        return json.dumps(value)
    return ",".join(value) if isinstance(value, list) else value


def _read_yaml(text: str, path: Path) -> Iterator[Entry]:
    """From the nodes, not from values: they have lines, and the text of a number as it was typed."""
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise UsageError(
            f"{path}{line}: {getattr(error, 'problem', None) or error}", hint="KEY: VALUE a line"
        ) from error
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(
            f"{path}, line {root.start_mark.line + 1}: expected KEY: VALUE", hint="tensor-parallel-size: 2"
        )
    for key, value in root.value:
        line = key.start_mark.line + 1
        yield Entry(str(key.value), _yaml_value(value, f"{path}, line {line}: {key.value}"), line)


def _yaml_value(node: Any, where: str) -> Value:
    import yaml

    if isinstance(node, yaml.SequenceNode) and all(isinstance(each, yaml.ScalarNode) for each in node.value):
        return [str(each.value) for each in node.value]
    if not isinstance(node, yaml.ScalarNode) or node.tag == _NULL:
        raise _no_value(where, is_empty=isinstance(node, yaml.ScalarNode))
    return bool(yaml.safe_load(node.value)) if node.tag == _BOOL else str(node.value)


def _read_toml(text: str, path: Path) -> Iterator[Entry]:
    try:
        values: Mapping[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: {error}", hint="KEY = VALUE a line, texts in quotes") from error
    lines = text.splitlines()
    for key, value in values.items():
        starts = re.compile(rf"""\s*\[*\s*["']?{re.escape(key)}["']?\s*[\]=.]""")
        line = next((number for number, each in enumerate(lines, start=1) if starts.match(each)), 1)
        yield Entry(key, _toml_value(value, f"{path}, line {line}: {key}"), line)


def _toml_value(value: Any, where: str) -> Value:
    if isinstance(value, bool):
        return value
    if isinstance(value, list) and not any(isinstance(each, (bool, list, dict)) for each in value):
        return [str(each) for each in value]
    if isinstance(value, (dict, list)):
        raise _no_value(where, is_empty=False)
    return str(value)


def _no_value(where: str, *, is_empty: bool) -> UsageError:
    if is_empty:
        return UsageError(f"{where} has no value", hint="give it one, or take the line out")
    return UsageError(
        f"{where} is nested, allowed: a value or a list of values", hint="all keys stand at the left edge"
    )
