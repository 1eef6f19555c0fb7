"""Lines of ranks on other hosts to stderr, by a thread of their own: a reader that stops reading stops no token."""

from __future__ import annotations

import os
import threading
from queue import Full, Queue
from typing import Final

import anyio
import anyio.to_thread

_MAX_LINES: Final = 4096
_STDERR: Final = 2


class HostLines:
    """``put`` never waits: what does not fit is dropped, and counted in the next line that does."""

    def __init__(self, fd: int = _STDERR) -> None:
        self._fd = fd  # not sys.stderr, whose lock the thread would hold while it waits
        self._lines: Queue[str] = Queue(_MAX_LINES)
        self._num_dropped = 0
        self._thread: threading.Thread | None = None

    def put(self, line: str) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, name="host-lines", daemon=True)
            self._thread.start()
        if self._num_dropped:
            line = f"({self._num_dropped} lines of other hosts were dropped: nobody read them)\n{line}"
        try:
            self._lines.put_nowait(line)
        except Full:
            self._num_dropped += 1
        else:
            self._num_dropped = 0

    async def drain(self, seconds: float) -> None:
        """Until all is written, or for ``seconds``: the last words of a rank belong before the error they explain."""
        with anyio.move_on_after(seconds):
            await anyio.to_thread.run_sync(self._lines.join, abandon_on_cancel=True)

    def _write(self) -> None:
        while True:
            data = memoryview(f"{self._lines.get()}\n".encode(errors="replace"))
            try:
                while data:
                    data = data[os.write(self._fd, data) :]
            except OSError:  # closed: there is nobody to tell
                pass
            self._lines.task_done()
