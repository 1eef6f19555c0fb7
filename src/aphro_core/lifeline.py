"""A child process ends with its parent, however the parent dies: a kernel signal, and a watch on the shared socket."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import threading
import time
from typing import Final

STACKS_SIGNAL: Final = signal.SIGUSR2  # engines and workers write the stacks of all their threads to stderr

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15


def die_with_parent(expected_parent: int | None = None) -> None:
    """Ask the kernel to SIGKILL this process when the thread that started it ends (Linux; elsewhere nothing).

    ``expected_parent`` closes the gap between start and this call: if that process is gone already, exit at once.
    """
    try:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    except (OSError, AttributeError):
        return
    if expected_parent is not None and os.getppid() != expected_parent:
        os._exit(1)


def name_process(name: str) -> None:
    """What ``ps`` shows of this process: 15 bytes at most."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)


def exit_on_hangup(fd: int, grace_seconds: float) -> None:
    """Watch a connected socket in a thread: when the peer is gone, this process has ``grace_seconds`` to end by itself.

    The main thread may sit in a collective that nobody will ever answer, so the thread ends the process with
    ``os._exit``. It only polls: the bytes on the socket stay for their reader.
    """
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP | select.POLLHUP | select.POLLERR)

    def watch() -> None:
        while not poll.poll():
            pass
        time.sleep(grace_seconds)
        os._exit(1)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
