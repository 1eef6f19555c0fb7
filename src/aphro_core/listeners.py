"""Which processes listen on which TCP ports of this host: best effort, from /proc."""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

_LISTEN: Final = "0A"  # the state column of /proc/net/tcp


class Listener(NamedTuple):
    """``address`` is 0.0.0.0 or :: for all of this host; ``pid`` is 0 where the kernel does not let us see it."""

    port: int
    address: str
    pid: int
    name: str


def listeners() -> list[Listener]:
    """All of this host's network, by port."""
    found = dict(_listening())
    owners: dict[str, int] = {}
    for pid in _pids() if found else ():
        for inode in found.keys() & set(_open_files(pid)):
            owners.setdefault(inode, pid)
    rows = [
        Listener(port, address, owners.get(inode, 0), _name_of(owners[inode]) if inode in owners else "unknown")
        for inode, (port, address) in found.items()
    ]
    return sorted(rows)


def holder_of(port: int) -> str | None:
    """``pid 123 (nginx)`` of a process that listens on ``port``; None where the kernel does not let us see it."""
    inodes = {inode for inode, (listening, _) in _listening() if listening == port}
    for pid in _pids() if inodes else ():
        if inodes & set(_open_files(pid)):
            return f"pid {pid} ({_name_of(pid)})"
    return None


def _listening() -> Iterator[tuple[str, tuple[int, str]]]:
    """``socket:[inode]``, as open files are called, and its port and address."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for columns in map(str.split, rows):
            if columns[3] == _LISTEN:
                address, _, port = columns[1].rpartition(":")
                yield f"socket:[{columns[9]}]", (int(port, 16), _read_address(address))


def _read_address(text: str) -> str:
    """The kernel writes an address as 32-bit words of this host's byte order."""
    words = [int(text[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(text), 8)]
    return str(ipaddress.ip_address(b"".join(words)))


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
