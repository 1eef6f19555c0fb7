"""SIGINT and SIGTERM before the server is up: they end the start, and what was going on is said."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from aphro_core.errors import StartInterruptedError


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM, which passes wherever Ctrl-C does, through event loops too."""


@contextmanager
def interruptible(phase: str) -> Iterator[None]:
    """Within, both signals raise StartInterruptedError with ``phase``; one that is ignored stays so. Main thread
    only."""
    before = signal.getsignal(signal.SIGTERM)
    if before != signal.SIG_IGN:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        name = "SIGTERM" if isinstance(interrupt, _TerminatedError) else "SIGINT"
        raise StartInterruptedError(name, phase) from None
    finally:
        if signal.getsignal(signal.SIGTERM) == _terminate:  # else the block has decided itself what comes next
            signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _TerminatedError
