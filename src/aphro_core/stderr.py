"""stderr that nobody waits for: whoever reads it too slowly, or not at all, loses lines, and no request does."""

from __future__ import annotations

import io
import os
import stat
import sys
from contextlib import suppress


class LossyText(io.TextIOWrapper):
    """What cannot be written now is dropped."""

    def write(self, text: str, /) -> int:
        with suppress(OSError):
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def make_lossy() -> None:
    """For this process: a write to ``sys.stderr`` never raises."""
    raw = io.FileIO(2, "w", closefd=False)
    sys.stderr = LossyText(io.BufferedWriter(raw), encoding="utf-8", errors="backslashreplace", line_buffering=True)


def never_block() -> None:
    """For this process and its children: a full pipe, or a terminal that is held, blocks no write to descriptor 2.

    It is opened anew for that: the flag belongs to an open file, and the one that we were given is others' too.
    """
    with suppress(OSError):  # a socket cannot be opened anew; nothing is there to be opened
        mode = os.fstat(2).st_mode
        if stat.S_ISFIFO(mode) or os.isatty(2):
            anew = os.open("/proc/self/fd/2", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
            os.dup2(anew, 2)
            os.close(anew)
    make_lossy()
