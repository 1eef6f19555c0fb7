"""The process above the API process: owns listening sockets and fork server, and starts the API process again."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from aphro_core.errors import AphroError, ExitCode, StartInterruptedError
from aphro_core.frontend.recovery_budget import WINDOW_SECONDS, RecoveryBudget
from aphro_core.held_engine import HeldEngine
from aphro_core.host import process_state
from aphro_core.keeper.heartbeat import BEAT_SECONDS, Heartbeat
from aphro_core.keeper.reports import Beat, Leaving, Ready, Reporting, Reports
from aphro_core.lifeline import STACKS_SIGNAL, die_with_parent, name_process
from aphro_core.reporter import Reporter
from aphro_core.spawn import ForkServer

_STOPS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_MASK: Final = (*_STOPS, signal.SIGCHLD)
_STOP_SECONDS: Final = 1.5  # for a process that has nothing to drain, or is not to drain
_STACKS_SECONDS: Final = 0.2  # for a process that hangs to write its stacks


@dataclass(frozen=True)
class Kept:
    """What the API process is given. ``engine`` has outlived a predecessor, and waits to be taken over."""

    keeper_pid: int
    is_replacement: bool  # of one that served
    fork_server: ForkServer
    engine: HeldEngine | None
    _reporting: Reporting

    def mark_ready(self) -> None:
        """It serves: from then on it is replaced."""
        self._reporting.tell(Ready())

    def beat(self) -> None:
        """Its loop runs: to be called every ``BEAT_SECONDS``."""
        self._reporting.tell(Beat())

    def leave(self) -> None:
        """Its loop ends, and no beat follows."""
        self._reporting.tell(Leaving())

    def hand_on(self, engine: HeldEngine) -> None:
        """Whoever replaces this process goes on with that engine."""
        self._reporting.hand_on(engine)


def keep(run_api: Callable[[Kept], int], fork_server: ForkServer, budget: RecoveryBudget, reporter: Reporter) -> int:
    """Run ``run_api`` in a child, and again whenever that dies or hangs. Returns the exit code, in either process.

    The keeper imports no torch, parses no request and has one thread. The child returns or raises out of here as if it
    were alone; the keeper returns what it ended with. Raises AphroError when the child cannot be replaced any more.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _MASK)
    is_keeper = True
    try:
        reports: Reports | None = None
        while True:
            child = _start(fork_server, reports)
            if isinstance(child, Kept):
                is_keeper = False
                return run_api(child)
            end, reports = child.wait(), child.reports
            if end.is_final:
                _check_start(end)
                return end.exit_code
            _check(end, budget)
            reporter.line(f"the API process {end.text}; starting another one, what was open is lost.")
    finally:
        for number in _STOPS if is_keeper else ():
            signal.signal(number, signal.SIG_IGN)  # it ends: more of them change nothing, not even its exit code
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _MASK)


@dataclass(frozen=True)
class _End:
    exit_code: int
    text: str
    is_final: bool
    signal: int = 0  # that killed it before it served
    interrupted: StartInterruptedError | None = None  # before it served, where it has not spoken of it itself


def _check_start(end: _End) -> None:
    """One that says itself what it ends with has said so; one that was killed has not."""
    if end.interrupted is not None:
        raise end.interrupted
    if end.signal:
        raise AphroError(
            f"the API process {end.text} before it served",
            hint="dmesg | grep -i oom" if end.signal == signal.SIGKILL else "its last words are above, on stderr",
            exit_code=ExitCode.INTERNAL,
        )


def _check(end: _End, budget: RecoveryBudget) -> None:
    if not budget.take():
        raise AphroError(
            f"the API process {end.text}, once more than it may be started again ({budget.max_recoveries} times in "
            f"{WINDOW_SECONDS:g} s)",
            hint="--max-recoveries allows more",
            exit_code=ExitCode.RECOVERY,
        )


def _start(fork_server: ForkServer, earlier: Reports | None) -> Kept | _ApiProcess:
    """Fork; each side closes what is the other's. ``earlier``: of the process that is replaced."""
    link = fork_server.take_link()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    keeper_pid = os.getpid()
    pid = os.fork()
    if pid:
        link.close()
        theirs.close()
        return _ApiProcess(pid, Reports(ours, earlier))
    ours.close()
    os.setpgid(0, 0)  # Ctrl-C in the terminal is for the keeper, who passes it on once
    die_with_parent(keeper_pid)
    name_process("aphro-api")
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _MASK)
    engine = earlier.held_engine() if earlier is not None else None
    return Kept(keeper_pid, earlier is not None, fork_server.inherited(link), engine, Reporting(theirs))


class _ApiProcess:
    """The child, as the keeper sees it."""

    def __init__(self, pid: int, reports: Reports) -> None:
        self._pid = pid
        self._pidfd = os.pidfd_open(pid)
        self.reports = reports
        self._heartbeat = Heartbeat(time.monotonic)
        self._stopped_by = ""  # the first signal that was passed on
        self._hang = ""
        self._deadline: float | None = None  # to be gone by itself

    def wait(self) -> _End:
        """Pass signals on until it has ended; end it when it hangs."""
        while (status := self._poll()) is None:
            left = BEAT_SECONDS if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)
            info = signal.sigtimedwait(_MASK, min(left, BEAT_SECONDS))
            if info is not None and info.si_signo in _STOPS and not _is_ignored(info.si_signo):
                self._stop(info.si_signo)
            elif self._deadline is not None and time.monotonic() >= self._deadline:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
                self._deadline = None
            self._look()
        self.reports.take()
        self.reports.close()
        os.close(self._pidfd)
        return self._explain(os.waitstatus_to_exitcode(status), self.reports.has_served)

    def _look(self) -> None:
        num_reports = self.reports.take()
        hang = self._heartbeat.look(num_reports, process_state(self._pid))
        if hang and self.reports.has_served and not self.reports.is_leaving and not self._hang:
            self._hang = hang
            signal.pidfd_send_signal(self._pidfd, STACKS_SIGNAL)
            time.sleep(_STACKS_SECONDS)
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _stop(self, number: int) -> None:
        """Pass it on. One that serves drains as long as it may; before that, and at a second signal, it is hurried."""
        self.reports.take()
        is_hurried = bool(self._stopped_by) or not self.reports.is_ready
        if is_hurried and self._deadline is None:  # further signals give it no further time
            self._deadline = time.monotonic() + _STOP_SECONDS
        # a terminal that was closed (SIGHUP) is a reason to end in order, like any other
        number = signal.SIGTERM if number == signal.SIGHUP else number
        self._stopped_by = self._stopped_by or signal.Signals(number).name
        signal.pidfd_send_signal(self._pidfd, number)

    def _poll(self) -> int | None:
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        return status if pid else None

    def _explain(self, code: int, has_served: bool) -> _End:
        if self._stopped_by and not has_served and code <= 0:
            error = StartInterruptedError(self._stopped_by, "the API process, which had no time to say more")
            has_spoken = code < 0 and self.reports.is_leaving  # it was killed on its way out
            return _End(error.exit_code, "was stopped", is_final=True, interrupted=None if has_spoken else error)
        if code >= 0:
            # it says itself what it ends with; an end that nobody asked for is a death
            is_final = bool(self._stopped_by) or not has_served or code not in (ExitCode.OK, ExitCode.INTERNAL)
            return _End(code, f"exited with code {code}", is_final)
        if self._stopped_by:
            return _End(ExitCode.OK, "was stopped", is_final=True)
        how = self._hang or f"was killed by signal {-code} ({signal.Signals(-code).name})"
        return _End(ExitCode.INTERNAL, f"(pid {self._pid}) {how}", not has_served, 0 if has_served else -code)


def _is_ignored(number: int) -> bool:
    """As nohup has it for SIGHUP: blocked signals arrive all the same."""
    return signal.getsignal(number) == signal.SIG_IGN
