"""A worker's end over stdio: frames both ways, and an end by itself when the engine is silent or gone."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from aphro_core.messages import codec
from aphro_core.messages.steps import Beat, StopWorker, StoreCall, StoreReply, ToWorker, WorkerReady

LEASE_SECONDS = 1.5
WORKER = f"""
import os
from aphro_core.messages.steps import StopWorker, StoreCall, WorkerReady
from aphro_core.worker.stdio_channel import StdioChannel

channel = StdioChannel(0, os.dup(1), {LEASE_SECONDS})
assert channel.ask(StoreCall("get", ["key"])).value == b"there"
channel.send(WorkerReady(7))
assert isinstance(channel.receive(), StopWorker)
os._exit(0)
"""


@pytest.fixture
def worker() -> Iterator[subprocess.Popen[bytes]]:
    """One that has asked the store, been answered, and waits for a message."""
    with subprocess.Popen([sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert _receive(process) == StoreCall("get", ["key"])
        _send(process, StoreReply(value=b"there"))
        assert _receive(process) == WorkerReady(7)
        yield process
        process.kill()


def _send(process: subprocess.Popen[bytes], message: ToWorker) -> None:
    assert process.stdin is not None
    process.stdin.write(codec.engine_side_of_worker().encode(message))
    process.stdin.flush()


def _receive(process: subprocess.Popen[bytes]) -> object:
    assert process.stdout is not None
    length = int.from_bytes(process.stdout.read(4), "little")
    return codec.engine_side_of_worker().decode(process.stdout.read(length))


def test_beats_keep_it_and_are_nobody_elses_messages(worker: subprocess.Popen[bytes]) -> None:
    for _ in range(5):
        time.sleep(LEASE_SECONDS / 3)
        _send(worker, Beat())
    assert worker.poll() is None, "alive for longer than a lease"
    _send(worker, StopWorker())
    assert worker.wait(5) == 0


def test_a_silent_engine_ends_it(worker: subprocess.Popen[bytes]) -> None:
    started = time.monotonic()
    assert worker.wait(LEASE_SECONDS + 5) == 1
    assert time.monotonic() - started > LEASE_SECONDS / 2


def test_a_closed_input_ends_it_at_once(worker: subprocess.Popen[bytes]) -> None:
    assert worker.stdin is not None
    started = time.monotonic()
    worker.stdin.close()
    assert worker.wait(5) == 1
    assert time.monotonic() - started < LEASE_SECONDS


def test_bytes_that_are_no_message_end_it(worker: subprocess.Popen[bytes]) -> None:
    assert worker.stdin is not None
    worker.stdin.write(b"\x03\x00\x00\x00???")
    worker.stdin.flush()
    assert worker.wait(5) == 1
