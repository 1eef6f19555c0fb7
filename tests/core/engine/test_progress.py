"""Whether ranks compute, from what the kernel says of their processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from aphro_core.engine.progress import Progress, describe_hang
from aphro_core.messages.steps import WorkerLoaded


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def sleeper() -> Iterator[int]:
    """A process that computes nothing."""
    process = subprocess.Popen([sys.executable, "-c", "print(flush=True); import time; time.sleep(60)"], stdout=-1)
    assert process.stdout is not None
    process.stdout.readline()
    yield process.pid
    process.kill()
    process.wait()
    process.stdout.close()


def rank_of(pid: int, device: str = "cpu", host: str = "") -> WorkerLoaded:
    return WorkerLoaded(0, pid, host or socket.gethostname(), device, 1, 1, 1, 1, 1, 1)


def test_a_rank_that_sleeps_in_a_step_stands_still(sleeper: int) -> None:
    clock = Clock()
    progress = Progress([rank_of(sleeper)], clock)
    assert progress.look(0, is_in_flight=True) == ""
    clock.now += 1.5
    assert progress.look(0, is_in_flight=True) == "no rank computes"
    assert progress.look(1, is_in_flight=True) == "", "an answer came"
    clock.now += 1.5
    assert progress.look(1, is_in_flight=False) == "", "there is nothing to compute"


def test_a_rank_that_computes_does_not() -> None:
    clock = Clock()
    progress = Progress([rank_of(os.getpid())], clock)
    progress.look(0, is_in_flight=True)
    began = time.process_time()
    while time.process_time() - began < 0.06:
        pass
    clock.now += 1.5
    assert progress.look(0, is_in_flight=True) == ""


def test_a_process_that_waits_for_its_gpu_may_sleep(sleeper: int) -> None:
    clock = Clock()
    progress = Progress([rank_of(sleeper, "cuda:0")], clock)
    progress.look(0, is_in_flight=True)
    clock.now += 30
    assert progress.look(0, is_in_flight=True) == ""


def test_a_stopped_rank_is_seen_at_once_and_named(sleeper: int) -> None:
    progress = Progress([rank_of(sleeper)], Clock())
    os.kill(sleeper, signal.SIGSTOP)
    deadline = time.monotonic() + 2
    while progress.look(0, is_in_flight=False) != "rank 0 is stopped":
        assert time.monotonic() < deadline
    error = describe_hang([rank_of(sleeper), rank_of(os.getpid())], 10.0)
    assert f"(pid {sleeper}) is stopped (SIGSTOP): a step has not ended within 10.0 s" in error.message
    assert error.is_external
    os.kill(sleeper, signal.SIGCONT)


def test_ranks_that_hang_are_all_named(sleeper: int) -> None:
    error = describe_hang([rank_of(sleeper), rank_of(os.getpid()), rank_of(1, host="elsewhere")], 10.0)
    assert f"(pid {os.getpid()})" in error.message
    assert "rank 0 on elsewhere" in error.message
    assert not error.is_external
