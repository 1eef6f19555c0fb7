"""Bytecode of torch and all that the fork server imports, where a host has none: compiled by many processes at once.

Python compiles a module when it is first imported, one after the other: 3 to 5 s for torch. An image without bytecode,
or one that may not be written, pays that at every start; here a first start pays a part of it.

``python -m aphro_core.bytecode PARENT_PID PREFIX NUM_PROCESSES`` reads modules as Python would, follows what they import
at their top, and leaves bytecode where Python looks for it. Nothing is executed.
"""

from __future__ import annotations

import dis
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import cache_from_source
from pathlib import Path
from types import CodeType
from typing import Final

from aphro_core.lifeline import die_with_parent

_ROOTS: Final = (
    "torch",
    "aphro_core.forkserver",
    "aphro_core.executor.inprocess",
    "aphro_core.executor.multiprocess",
    "gguf.quants",
)
_FEWEST_CORES: Final = 4  # with fewer it would only take them from the imports
_SPARE_CORES: Final = 2  # for the command line and the fork server
_MOST_PROCESSES: Final = 12


def bytecode_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What to change in an environment so that imports find bytecode of torch: nothing where torch has its own, or
    Python can write it beside torch; else a folder of ours, however Python was told to write none."""
    if environment.get("PYTHONPYCACHEPREFIX") or (spec := PathFinder.find_spec("torch")) is None or not spec.origin:
        return {}
    if Path(cache_from_source(spec.origin)).exists():
        return {}
    may_write = not environment.get("PYTHONDONTWRITEBYTECODE") and os.access(Path(spec.origin).parent, os.W_OK)
    if may_write:
        return {}
    cache = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return {"PYTHONPYCACHEPREFIX": str(cache / "aphro" / "bytecode"), "PYTHONDONTWRITEBYTECODE": ""}


def compile_beside(environment: Mapping[str, str]) -> None:
    """Begin to compile what has no bytecode, in processes of their own; returns at once. They end with this one."""
    environment = {**environment, **bytecode_environment(environment)}
    prefix, num_processes = environment.get("PYTHONPYCACHEPREFIX", ""), len(os.sched_getaffinity(0)) - _SPARE_CORES
    if num_processes < _FEWEST_CORES - _SPARE_CORES or _is_there("torch", prefix):
        return
    words = [str(os.getpid()), prefix, str(min(num_processes, _MOST_PROCESSES))]
    subprocess.Popen(
        [sys.executable, "-m", "aphro_core.bytecode", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )


def _is_there(name: str, prefix: str) -> bool:
    spec = PathFinder.find_spec(name)
    if spec is None or spec.origin is None:
        return True  # there is nothing to compile
    path = Path(cache_from_source(spec.origin))
    return (Path(prefix) / path.relative_to("/") if prefix else path).exists()


def compile_all(num_processes: int) -> int:
    """Everything that the fork server imports, as far as that can be read. Returns how many modules there were."""
    finder = Finder()
    with ProcessPoolExecutor(num_processes, initializer=die_with_parent) as pool:
        running: set[Future[list[str]]] = set()
        news = list(_ROOTS)
        while news or running:
            running |= {pool.submit(compile_module, name, path) for name, path in finder.sources(news)}
            done, running = wait(running, return_when=FIRST_COMPLETED) if running else (set(), running)
            news = [name for future in done for name in future.result()]
    return len(finder.found)


class Finder:
    """Finds each module once, without importing it."""

    def __init__(self) -> None:
        self.found: dict[str, ModuleSpec | None] = {}

    def sources(self, names: list[str]) -> Iterator[tuple[str, str]]:
        """Names and files of those that are new, and of the packages that they are in."""
        for name in names:
            parts = name.split(".")
            for count in range(1, len(parts) + 1):
                part = ".".join(parts[:count])
                if part not in self.found:
                    spec = self.found[part] = self._find(part)
                    if spec is not None and isinstance(spec.loader, SourceFileLoader) and spec.origin is not None:
                        yield part, spec.origin
                if self.found[part] is None:
                    break

    def _find(self, name: str) -> ModuleSpec | None:
        parent = self.found.get(name.rpartition(".")[0])
        where = None if parent is None else parent.submodule_search_locations
        if "." in name and where is None:
            return None
        try:
            return PathFinder.find_spec(name, where)
        except KeyError:  # a folder without code of its own in a package, which is not imported here
            return None


def compile_module(name: str, path: str) -> list[str]:
    """Bytecode of a module is there afterwards; what it may import at its top. [] of one that cannot be compiled."""
    try:
        code = SourceFileLoader(name, path).get_code(name)
    except (SyntaxError, OSError, UnicodeError):
        return []  # whoever imports it is told
    package = name if Path(path).name == "__init__.py" else name.rpartition(".")[0]
    return [] if code is None else sorted(imports_of(code, package))


def imports_of(code: CodeType, package: str) -> set[str]:
    """Modules that the code of a module names in imports outside functions; some may be no modules but what is in
    them. ``package``: what its relative imports begin at."""
    found: set[str] = set()
    constants: list[object] = []  # the last ones: level and names of an import
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_CONST", "LOAD_SMALL_INT"):
            constants = [*constants[-1:], instruction.argval]
        elif instruction.opname == "IMPORT_NAME" and len(constants) == 2:
            level, names = constants
            base = package.rsplit(".", level - 1)[0] if isinstance(level, int) and level else ""
            module = ".".join(part for part in (base, instruction.argval) if part)
            found.add(module)
            found |= {f"{module}.{name}" for name in names} if isinstance(names, tuple) else set()
    return found


def main() -> None:
    parent, prefix, num_processes = sys.argv[1:]
    die_with_parent(int(parent))
    os.nice(5)  # whoever waits for a module, and not for these, goes first
    sys.pycache_prefix = prefix or None
    sys.dont_write_bytecode = False
    compile_all(int(num_processes))


if __name__ == "__main__":
    main()
