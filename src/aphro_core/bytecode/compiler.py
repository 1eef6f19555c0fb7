"""``python -m aphro_core.bytecode.compiler PARENT_PID NUM_PROCESSES``: bytecode of all that the fork server imports.

It reads modules as Python would, follows what they import at their top, and leaves bytecode where Python looks for it.
Nothing is executed.
"""

from __future__ import annotations

import dis
import os
import sys
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import cache
from importlib.machinery import (
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    SourceFileLoader,
)
from pathlib import Path
from types import CodeType
from typing import Final, NamedTuple

from aphro_core.lifeline import die_with_parent

_ROOTS: Final = (
    "torch",
    "aphro_core.forkserver",
    "aphro_core.executor.inprocess",
    "aphro_core.executor.multiprocess",
    "gguf.quants",
)


def compile_all(num_processes: int) -> int:
    """Everything that the fork server imports, as far as that can be read. Returns how many modules there were."""
    begun: set[str] = set()
    with ProcessPoolExecutor(num_processes, initializer=die_with_parent) as pool:
        running: set[Future[list[Source]]] = set()
        news = list(filter(None, map(find_source, _ROOTS)))
        while news or running:
            fresh = [source for source in dict.fromkeys(news) if source.path not in begun]
            begun |= {source.path for source in fresh}
            running |= {pool.submit(compile_source, source) for source in fresh}
            done, running = wait(running, return_when=FIRST_COMPLETED)
            news = [source for future in done for source in future.result()]
    return len(begun)


class Source(NamedTuple):
    """A module in Python."""

    name: str
    path: str
    is_package: bool


@cache
def find_source(name: str) -> Source | None:
    """Where a module stands, without importing anything; None of what is no module written in Python."""
    parent, _, _ = name.rpartition(".")
    where = None
    if parent:
        package = find_source(parent)
        if package is None or not package.is_package:
            return None
        where = [str(Path(package.path).parent)]
    for finder in filter(None, map(_finder, where or sys.path)):
        if (spec := finder.find_spec(name)) is not None:
            is_python = isinstance(spec.loader, SourceFileLoader) and spec.origin is not None
            return Source(name, spec.origin or "", spec.submodule_search_locations is not None) if is_python else None
    return None


@cache
def _finder(folder: str) -> FileFinder | None:
    """Of modules in a folder; a path that is no folder has none."""
    if not os.path.isdir(folder or "."):
        return None
    return FileFinder(folder, (ExtensionFileLoader, EXTENSION_SUFFIXES), (SourceFileLoader, SOURCE_SUFFIXES))


def compile_source(source: Source) -> list[Source]:
    """Bytecode of a module is there afterwards; gives the sources of what it may import at its top, and of the packages
    that they are in. [] of one that cannot be compiled."""
    try:
        code = SourceFileLoader(source.name, source.path).get_code(source.name)
    except (SyntaxError, OSError, UnicodeError):
        return []  # whoever imports it is told
    if code is None:
        return []
    package = source.name if source.is_package else source.name.rpartition(".")[0]
    names: set[str] = set()
    for name in imports_of(code, package):
        parts = name.split(".")
        names |= {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
    return [found for name in sorted(names) if (found := find_source(name)) is not None]


def imports_of(code: CodeType, package: str) -> set[str]:
    """Modules that the code of a module names in imports outside functions and ``if TYPE_CHECKING``; some may be no
    modules but what is in them. ``package``: what its relative imports begin at."""
    found: set[str] = set()
    constants: list[object] = []  # the last ones: level and names of an import
    skip_to, last_name = 0, ""
    for instruction in dis.get_instructions(code):
        if instruction.offset < skip_to:
            continue
        if instruction.opname in ("LOAD_NAME", "LOAD_ATTR"):
            last_name = instruction.argval
        elif "JUMP" in instruction.opname:
            if last_name == "TYPE_CHECKING" and "IF_FALSE" in instruction.opname:
                skip_to = instruction.argval
            last_name = ""
        elif instruction.opname in ("LOAD_CONST", "LOAD_SMALL_INT"):
            constants = [*constants[-1:], instruction.argval]
        elif instruction.opname == "IMPORT_NAME" and len(constants) == 2:
            level, names = constants
            base = package.rsplit(".", level - 1)[0] if isinstance(level, int) and level else ""
            module = ".".join(part for part in (base, instruction.argval) if part)
            found.add(module)
            found |= {f"{module}.{name}" for name in names} if isinstance(names, tuple) else set()
    return found


def main() -> None:
    parent, num_processes = map(int, sys.argv[1:])
    die_with_parent(parent)
    compile_all(num_processes)


if __name__ == "__main__":
    main()
