"""This host: its files are read in threads that may be left behind, since even reading one can hang."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

import anyio.to_thread

from aphro_core.remote import process
from aphro_core.remote.remote import MAX_FILE_BYTES, Output, Process


class LocalHost:
    """``root`` is another folder in tests, with the files of a recorded host."""

    def __init__(self, name: str = "", *, address: str = "", root: Path = Path("/")) -> None:
        self.name = name
        self.address = address
        self.python = sys.executable
        self._root = root

    @property
    def is_connected(self) -> bool:
        return True

    async def files(self, *patterns: str) -> dict[str, str]:
        return await self._each_match(patterns, _read_text)

    async def links(self, *patterns: str) -> dict[str, str]:
        return await self._each_match(patterns, self._resolve)

    async def run(
        self, *argv: str, timeout_seconds: float = 10.0, stdin: str = "", env: Mapping[str, str] | None = None
    ) -> Output:
        return await process.run(argv, timeout_seconds=timeout_seconds, stdin=stdin, env=env)

    def start(self, *argv: str, env: Mapping[str, str] | None = None) -> AbstractAsyncContextManager[Process]:
        return process.start(argv, env)

    async def _each_match(self, patterns: tuple[str, ...], read: Callable[[Path], str | None]) -> dict[str, str]:
        matches = partial(_read_matches, self._root, patterns, read)
        return await anyio.to_thread.run_sync(matches, abandon_on_cancel=True)

    def _resolve(self, path: Path) -> str:
        return "/" + os.path.relpath(os.path.realpath(path), os.path.realpath(self._root))


def _read_matches(root: Path, patterns: tuple[str, ...], read: Callable[[Path], str | None]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pattern in patterns:
        for name in sorted(glob.glob(pattern.lstrip("/"), root_dir=root)):
            text = read(root / name)
            if text is not None:
                found[f"/{name}"] = text
    return found


def _read_text(path: Path) -> str | None:
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES).decode(errors="replace")
    except OSError:  # sysfs answers EINVAL for entries that are not in use
        return None
