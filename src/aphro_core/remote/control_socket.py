"""The socket by which ssh shares a connection: nameless once it is connected, so that no death leaves a name."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

_PREFIX: Final = "aphro-ssh-"


class ControlSocket:
    """``path`` is for the ssh that opens the connection; once it has, ``take`` gives the path for those that share it.

    That one leads through a descriptor of this process: the socket's own name, and the folder that hides it from other
    users, are removed then. A process that is killed before leaves its folder to the next one.
    """

    def __init__(self) -> None:
        _sweep(Path(tempfile.gettempdir()))
        self._folder, self._lock = _locked_folder()
        self._socket = -1
        self.path = self._folder / "s"

    def take(self) -> Path:
        """Raises OSError when no ssh has made the socket."""
        self._socket = os.open(self.path, os.O_PATH)
        self._remove()
        return Path(f"/proc/{os.getpid()}/fd/{self._socket}")

    def _remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._remove()
        os.close(self._lock)
        if self._socket >= 0:
            os.close(self._socket)


def _locked_folder() -> tuple[Path, int]:
    """A new folder, and the descriptor whose lock says that its owner lives."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        with suppress(FileNotFoundError):  # swept by another process before it was locked
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return folder, lock
            os.close(lock)


def _sweep(folder: Path) -> None:
    """Remove what processes left that were killed while they connected: folders that nobody holds locked."""
    for stale in folder.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another user's, or just removed by its owner
            lock = os.open(stale, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(lock).st_uid == os.geteuid():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(stale, ignore_errors=True)
            finally:
                os.close(lock)
