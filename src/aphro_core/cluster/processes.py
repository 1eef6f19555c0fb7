"""The processes of this host's member: known by its session or a mark in their environment, `down` ends no others."""

from __future__ import annotations

import os
import select
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from aphro_core.cluster.membership import Membership, boot_id, process_start

MARK: Final = "APHRO_CLUSTER_NODE"  # = the member's id; children inherit it
_GRACE_SECONDS: Final = 3.0
_KILL_SECONDS: Final = 5.0


def processes_of(member: Membership) -> list[int]:
    """All that it has started and that still runs, also after its own end; neither itself nor this process.

    Ray's workers write their title over their environment, so the session tells; what made a session of its own has
    the mark. (A session's number is not given to anything else while one process of it is left.)
    """
    if member.boot_id != boot_id():
        return []
    is_ours = process_start(member.pid) in (0, member.pid_started)  # else another process has that number by now
    mark = f"{MARK}={member.id}".encode()
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    return [
        pid
        for pid in pids
        if pid not in (os.getpid(), member.pid) and ((is_ours and _session(pid) == member.pid) or mark in _environ(pid))
    ]


def name_of(pid: int) -> str:
    """The short name only: a whole command line may hold secrets."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def end_processes(member: Membership) -> list[int]:
    """End them: the raylet in good order, so that the other nodes hear of it; what is left after that by force.

    Returns those that did not end (they hang in the kernel).
    """
    raylets = _hold([pid for pid in processes_of(member) if name_of(pid) == "raylet"])
    _signal(raylets, signal.SIGTERM)
    _wait(raylets, _GRACE_SECONDS)
    deadline = time.monotonic() + _KILL_SECONDS
    while time.monotonic() < deadline:
        held = _hold(processes_of(member))  # again: what ends may have started something meanwhile
        if not held:
            return []
        _signal(held, signal.SIGKILL)
        _wait(held, max(0.1, deadline - time.monotonic()))
    return processes_of(member)


def _session(pid: int) -> int:
    """0 of a process that is gone, also of one that only waits for its parent to notice."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[3])


def _environ(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []  # it ended, or is another user's


def _hold(pids: list[int]) -> list[int]:
    """A pidfd of each that still is there."""
    held = []
    for pid in pids:
        with suppress(OSError):
            held.append(os.pidfd_open(pid))
    return held


def _signal(held: list[int], number: signal.Signals) -> None:
    for pidfd in held:
        with suppress(OSError):
            signal.pidfd_send_signal(pidfd, number)


def _wait(held: list[int], seconds: float) -> None:
    """Until all have ended or the time is over; closes the pidfds."""
    deadline = time.monotonic() + seconds
    for pidfd in held:
        ended = select.poll()
        ended.register(pidfd, select.POLLIN)
        ended.poll(max(0.0, deadline - time.monotonic()) * 1000)
        os.close(pidfd)
