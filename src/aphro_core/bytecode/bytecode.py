"""Bytecode of torch and all that the fork server imports, where a host has none: where it is kept, and who makes it.

Python compiles a module when it is first imported, one after the other: 3 to 5 s for torch. An image without bytecode,
or one that may not be written, pays that at every start; here a first start pays a part of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Final

from aphro_core.host import num_cores

_SPARE_CORES: Final = 2  # for the command line and the one that imports
_MOST_PROCESSES: Final = 12
_DATED_FROM: Final = 1_262_300_000.0  # 2010, in seconds; before it are the times that builds give to every file


def bytecode_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What to change in an environment so that Python finds bytecode of torch, or leaves it for the next time: nothing
    where torch has its own, or Python may write it beside torch; else a folder of ours."""
    if environment.get("PYTHONPYCACHEPREFIX") or (torch := _torch()) is None or _is_there(torch, ""):
        return {}
    if not environment.get("PYTHONDONTWRITEBYTECODE") and os.access(torch.parent, os.W_OK):
        return {}
    try:
        folder = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aphro" / "bytecode"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_good = _is_of_this_user(folder) and _is_dated(torch)
    except (OSError, RuntimeError):  # it cannot be made; there is no home
        return {}
    return {"PYTHONPYCACHEPREFIX": str(folder), "PYTHONDONTWRITEBYTECODE": ""} if is_good else {}


@contextmanager
def compiling_beside() -> Iterator[None]:
    """While the block imports, processes compile what it will import, if this Python finds no bytecode of torch and
    keeps what it compiles. They end with the block, or with this process."""
    num_processes = min(num_cores() - _SPARE_CORES, _MOST_PROCESSES)
    torch, prefix = _torch(), sys.pycache_prefix or ""
    if torch is None or _is_there(torch, prefix) or num_processes < 2 or not _keeps(_bytecode_of(torch, prefix)):
        yield
        return
    words = [sys.executable, "-m", "aphro_core.bytecode.compiler", str(os.getpid()), str(num_processes)]
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=2)
    try:
        yield
    finally:
        process.kill()  # its own processes end with it
        process.wait()


def _torch() -> Path | None:
    spec = PathFinder.find_spec("torch")
    return None if spec is None or spec.origin is None else Path(spec.origin)


def _is_of_this_user(folder: Path) -> bool:
    """Whether nobody else may write there: what stands in it is executed. And whether this user may."""
    state = folder.stat()
    return state.st_uid == os.geteuid() and not state.st_mode & 0o022 and os.access(folder, os.W_OK)


def _is_dated(source: Path) -> bool:
    """Whether files have times of their own: Python tells bytecode of another version by time and size alone, and the
    folder outlives the image that torch is in."""
    return source.stat().st_mtime >= _DATED_FROM


def _is_there(source: Path, prefix: str) -> bool:
    """Whether this user finds bytecode of it: a folder of another one may have no door."""
    return os.path.exists(_bytecode_of(source, prefix))


def _keeps(file: Path) -> bool:
    """Whether this Python may write such a file."""
    there = next(folder for folder in file.parents if os.path.exists(folder))
    return not sys.dont_write_bytecode and os.access(there, os.W_OK)


def _bytecode_of(source: Path, prefix: str) -> Path:
    """Where Python looks for it, told of such a ``prefix``."""
    name = f"{source.stem}.{sys.implementation.cache_tag}.pyc"
    folder = Path(prefix) / source.parent.relative_to("/") if prefix else source.parent / "__pycache__"
    return folder / name
