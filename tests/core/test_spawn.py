"""The fork server: children come warm, are held by pidfd, and end with whoever asked for them."""

from __future__ import annotations

import os
import resource
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from aphro_core import spawn
from aphro_core.channel import BlockingChannel
from aphro_core.errors import EngineDeadError
from aphro_core.messages import codec
from aphro_core.spawn import Child, ForkServer, NoDescriptorsError, Spawner, open_fork_server

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with open_fork_server(dict(os.environ)) as server:
        yield server


def fork_worker(link: Spawner) -> tuple[Child, socket.socket]:
    ours, theirs = socket.socketpair()
    with theirs:
        return link.fork("worker", "aphro-test", theirs), ours


def read(path: str) -> str:
    return Path(path).read_text()


def is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}/stat").exists()


async def test_a_child_is_fast_named_and_its_end_is_known(server: ForkServer) -> None:
    link = server.open_link()
    began = time.monotonic()
    child, channel = fork_worker(link)
    assert time.monotonic() - began < 1.0
    while read(f"/proc/{child.pid}/comm") != "aphro-test\n":
        assert time.monotonic() - began < 5.0
    assert not child.poll()
    assert child.describe_end() == "closed its channel but has not ended"
    child.send_signal(signal.SIGKILL)
    with anyio.fail_after(5):
        await child.wait()
    assert child.describe_end() == "was killed by signal 9 (SIGKILL)"
    assert is_gone(child.pid), "no zombie is left"
    child.send_signal(signal.SIGKILL)  # a pidfd never means another process
    child.close()
    channel.close()
    link.close()


async def test_a_worker_ends_by_itself_when_its_engine_is_gone(server: ForkServer) -> None:
    link = server.open_link()
    child, channel = fork_worker(link)
    channel.close()
    with anyio.fail_after(5):
        await child.wait()
    assert child.exit_code == 1
    child.close()
    link.close()


async def test_children_of_a_link_end_with_it_and_those_of_others_do_not(server: ForkServer) -> None:
    one, other = server.open_link(), server.open_link()
    mine, my_channel = fork_worker(one)
    stopped, its_channel = fork_worker(one)
    stopped.send_signal(signal.SIGSTOP)
    others, channel = fork_worker(other)
    one.close()
    server.open_link().close()  # answered behind it
    assert is_gone(mine.pid)
    assert is_gone(stopped.pid)
    assert not others.poll()
    other.close()
    for sock in (my_channel, its_channel, channel):
        sock.close()
    for child in (mine, stopped, others):
        child.close()


async def test_a_worker_answers_over_its_channel(server: ForkServer) -> None:
    link = server.open_link()
    child, sock = fork_worker(link)
    channel = BlockingChannel(sock, codec.engine_side_of_worker())
    sock.sendall((3).to_bytes(4, "little") + b"???")  # no StartWorker
    failed = channel.receive()
    assert failed.message.startswith("ValidationError") or "Error" in failed.message
    with anyio.fail_after(5):
        await child.wait()
    assert child.exit_code == 7
    child.close()
    channel.close()
    link.close()


async def test_a_fork_server_that_died_is_replaced_and_its_children_are_gone() -> None:
    with open_fork_server(dict(os.environ)) as server:
        link = server.open_link()
        child, channel = fork_worker(link)
        os.kill(server.pid, signal.SIGKILL)
        with anyio.fail_after(5):
            await child.wait()
        assert child.exit_code == -signal.SIGKILL
        deadline = time.monotonic() + 3
        while not is_gone(child.pid) and "Z" not in read(f"/proc/{child.pid}/stat"):
            assert time.monotonic() < deadline
        with pytest.raises(EngineDeadError, match="the fork server is gone"):
            link.open_link()
        again = server.open_link()
        other, its_channel = fork_worker(again)
        assert not other.poll()
        channel.close()
        its_channel.close()


async def test_a_fork_server_that_is_stopped_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_fork_server(dict(os.environ)) as server:
        server.open_link().close()
        monkeypatch.setattr(spawn, "_ANSWER_SECONDS", 0.5)
        link, pid = server.open_link(), server.pid
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(EngineDeadError, match="has not answered within"):
            link.open_link()
        with pytest.raises(EngineDeadError, match="the fork server is gone"):
            link.open_link()  # a late answer is nobody's
        child, channel = fork_worker(server.open_link())
        assert server.pid != pid
        assert not child.poll()
        child.close()
        channel.close()


async def test_without_descriptors_nothing_is_started_and_nothing_is_lost() -> None:
    with open_fork_server(dict(os.environ)) as server:
        link, pid = server.open_link(), server.pid
        ours, theirs = socket.socketpair()
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest_free = os.dup(0)
        os.close(lowest_free)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 1, before[1]))
            with pytest.raises(NoDescriptorsError):
                link.fork("worker", "aphro-test", theirs)
            with pytest.raises(OSError, match="Too many open files"):
                os.pipe()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert server.pid == pid
        child, channel = fork_worker(server.open_link())
        assert not child.poll()
        child.close()
        for sock in (channel, ours, theirs):
            sock.close()
