"""The process above the API process: owns listening sockets and fork server, and starts the API process again."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from aphro_core.errors import AphroError, ExitCode
from aphro_core.frontend.recovery_budget import WINDOW_SECONDS, RecoveryBudget
from aphro_core.lifeline import die_with_parent, name_process
from aphro_core.reporter import Reporter
from aphro_core.spawn import ForkServer

_STOPS: Final = (signal.SIGINT, signal.SIGTERM)
_MASK: Final = (*_STOPS, signal.SIGCHLD)
_STOP_SECONDS: Final = 1.5  # for a process that has nothing to drain, or is not to drain
_FOREVER: Final = 3600.0


@dataclass(frozen=True)
class Kept:
    """What the API process is given. ``mark_ready`` tells the keeper that it serves: from then on it is replaced."""

    keeper_pid: int
    is_replacement: bool  # of one that served
    fork_server: ForkServer
    _ready_fd: int

    def mark_ready(self) -> None:
        os.write(self._ready_fd, b"r")


def keep(run_api: Callable[[Kept], int], fork_server: ForkServer, budget: RecoveryBudget, reporter: Reporter) -> int:
    """Run ``run_api`` in a child, and again whenever that dies. Returns the exit code, in either process.

    The keeper imports no torch, parses no request and has one thread. The child returns or raises out of here as if it
    were alone; the keeper returns what it ended with. Raises AphroError when the child cannot be replaced any more.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _MASK)
    try:
        end = None
        while True:
            child = _start(fork_server, is_replacement=end is not None)
            if isinstance(child, Kept):
                return run_api(child)
            end = child.wait()
            if end.is_final:
                return end.exit_code
            _check(end, budget)
            reporter.line(f"the API process {end.text}; starting another one, what was open is lost.")
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _MASK)


@dataclass(frozen=True)
class _End:
    exit_code: int
    text: str
    is_final: bool


def _check(end: _End, budget: RecoveryBudget) -> None:
    if not budget.take():
        raise AphroError(
            f"the API process {end.text}, once more than it may be started again ({budget.max_recoveries} times in "
            f"{WINDOW_SECONDS:g} s)",
            hint="--max-recoveries allows more",
            exit_code=ExitCode.RECOVERY,
        )


def _start(fork_server: ForkServer, *, is_replacement: bool) -> Kept | _ApiProcess:
    """Fork; each side closes what is the other's."""
    link = fork_server.take_link()
    ready, mark = os.pipe()
    keeper_pid = os.getpid()
    pid = os.fork()
    if pid:
        link.close()
        os.close(mark)
        return _ApiProcess(pid, ready)
    os.close(ready)
    os.setpgid(0, 0)  # Ctrl-C in the terminal is for the keeper, who passes it on once
    die_with_parent(keeper_pid)
    name_process("aphro-api")
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _MASK)
    return Kept(keeper_pid, is_replacement, fork_server.inherited(link), mark)


class _ApiProcess:
    """The child, as the keeper sees it."""

    def __init__(self, pid: int, ready_fd: int) -> None:
        self._pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._ready_fd = ready_fd
        self._is_stopping = False
        self._was_ready = False
        self._deadline: float | None = None  # to be gone by itself

    def wait(self) -> _End:
        """Pass signals on until it has ended."""
        while (status := self._poll()) is None:
            left = _FOREVER if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)
            info = signal.sigtimedwait(_MASK, left)
            if info is None and self._deadline is not None:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
                self._deadline = None
            elif info is not None and info.si_signo in _STOPS:
                self._stop(info.si_signo)
        was_ready = self._is_ready()
        os.close(self._ready_fd)
        os.close(self._pidfd)
        return self._explain(os.waitstatus_to_exitcode(status), was_ready)

    def _stop(self, number: int) -> None:
        """Pass it on. One that serves drains as long as it may; before that, and at a second signal, it is hurried."""
        if self._is_stopping or not self._is_ready():
            self._deadline = time.monotonic() + _STOP_SECONDS
        self._is_stopping = True
        signal.pidfd_send_signal(self._pidfd, number)

    def _is_ready(self) -> bool:
        if not self._was_ready:
            os.set_blocking(self._ready_fd, False)
            with suppress(BlockingIOError):  # nothing is written yet
                self._was_ready = bool(os.read(self._ready_fd, 1))
        return self._was_ready

    def _poll(self) -> int | None:
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        return status if pid else None

    def _explain(self, code: int, was_ready: bool) -> _End:
        if code >= 0:
            # it says itself what it ends with; an end that nobody asked for is a death
            is_final = self._is_stopping or not was_ready or code not in (ExitCode.OK, ExitCode.INTERNAL)
            return _End(code, f"exited with code {code}", is_final)
        if self._is_stopping:
            return _End(ExitCode.OK, "was stopped", is_final=True)
        text = f"(pid {self._pid}) was killed by signal {-code} ({signal.Signals(-code).name})"
        return _End(ExitCode.INTERNAL, text, not was_ready)
