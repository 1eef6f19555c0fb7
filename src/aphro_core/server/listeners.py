"""Who holds a port: best effort, from /proc, for the error message that names it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_LISTEN: Final = "0A"  # the state column of /proc/net/tcp


def holder_of(port: int) -> str | None:
    """``pid 123 (nginx)`` of a process that listens on ``port``; None where the kernel does not let us see it."""
    inodes = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    for pid in _pids() if inodes else ():
        if inodes & set(_open_files(pid)):
            return f"pid {pid} ({_name_of(pid)})"
    return None


def _listening_inodes(port: int) -> Iterator[str]:
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for columns in map(str.split, rows):
            if columns[3] == _LISTEN and int(columns[1].rpartition(":")[2], 16) == port:
                yield columns[9]


def _pids() -> Iterator[int]:
    yield from (int(name) for name in _entries("/proc") if name.isdigit())


def _open_files(pid: int) -> Iterator[str]:
    for name in _entries(f"/proc/{pid}/fd"):
        try:
            yield os.readlink(f"/proc/{pid}/fd/{name}")
        except OSError:
            continue  # closed meanwhile


def _entries(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []  # gone, or another user's


def _name_of(pid: int) -> str:
    """The short name only: a whole command line may hold secrets."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "unknown"
