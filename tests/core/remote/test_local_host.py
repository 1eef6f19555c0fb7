"""This host through the contract: files, links, commands with limits, processes that are spoken to."""

from __future__ import annotations

import os
import time
from pathlib import Path

import anyio
import pytest

from aphro_core.remote.local import LocalHost
from aphro_core.remote.process import start
from aphro_core.remote.remote import NOT_FOUND, HostUnreachableError, Process, read
from aphro_core.remote.ssh import _wait_connected, open_host, parse_target
from tests.e2e.server_process import is_running


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_files_and_links_below_a_root(tmp_path: Path) -> None:
    (tmp_path / "sys" / "a").mkdir(parents=True)
    (tmp_path / "sys" / "a" / "state").write_text("4: ACTIVE\n")
    (tmp_path / "sys" / "a" / "bytes").write_bytes(b"\xff\n")
    (tmp_path / "sys" / "b").symlink_to("a")
    os.mkfifo(tmp_path / "sys" / "a" / "pipe")  # would block for ever
    host = LocalHost(root=tmp_path)
    assert await host.files("/sys/*/state", "/none/*") == {"/sys/a/state": "4: ACTIVE\n", "/sys/b/state": "4: ACTIVE\n"}
    assert await host.files("/sys/a/pipe", "/sys/a/bytes") == {"/sys/a/bytes": "\ufffd\n"}
    assert await host.links("/sys/*") == {"/sys/a": "/sys/a", "/sys/b": "/sys/a"}
    assert await read(host, "/sys/a/state") == "4: ACTIVE"
    assert await read(host, "/sys/a/none") is None


@pytest.mark.anyio
async def test_commands() -> None:
    host = LocalHost()
    done = await host.run("sh", "-c", "read x; echo $x $Y; echo sad >&2; exit 3", stdin="in\n", env={"Y": "why"})
    assert (done.returncode, done.stdout, done.stderr) == (3, "in why\n", "sad\n")
    assert (await host.run("no-such-command-here")).returncode == NOT_FOUND
    big = await host.run("sh", "-c", "head -c 3000000 /dev/zero; cat", stdin="x" * 300000)
    assert len(big.stdout) == 3300000


@pytest.mark.anyio
async def test_a_command_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"`sh` did not end within 0\.3 s"):
        await LocalHost().run("sh", "-c", f"sleep 60 & echo $! > {tmp_path}/pid; wait", timeout_seconds=0.3)
    assert time.monotonic() - started < 3
    await anyio.sleep(0.1)
    assert not is_running(int((tmp_path / "pid").read_text()))


@pytest.mark.anyio
async def test_a_process_is_spoken_to_by_lines() -> None:
    async with LocalHost().start("sh", "-c", "while read x; do echo got $x; done; echo end >&2; exit 4") as process:
        await process.send_line("one")
        assert await process.receive_line() == "got one"
        with anyio.move_on_after(0.1):
            await process.receive_line()
        await process.send_line("two")  # a limit that struck has lost nothing
        assert await process.receive_line() == "got two"


@pytest.mark.anyio
async def test_a_process_that_ended_says_so() -> None:
    async with LocalHost().start("sh", "-c", "echo last words >&2; exit 4") as process:
        assert await process.receive_line() is None
        assert await process.wait() == 4
        assert process.stderr_tail == "last words"
        await anyio.sleep(0.1)  # until the loop has seen that the pipe is closed
        with pytest.raises(HostUnreachableError, match="last words"):
            await _send_often(process)


async def _send_often(process: Process) -> None:
    for _ in range(50):
        await process.send_line("x")


@pytest.mark.anyio
async def test_a_connection_that_ended_before_it_was_spoken_to_says_whose_it_was() -> None:
    async with start(["sh", "-c", "echo connection refused >&2; exit 255"], None) as connection:
        await connection.wait()
        await anyio.sleep(0.1)  # until the loop has seen that the pipe is closed
        with pytest.raises(HostUnreachableError, match="no ssh connection to node9: connection refused") as caught:
            await _wait_connected(connection, "node9", 1.0)
    assert "ssh-copy-id node9" in str(caught.value.hint)


@pytest.mark.anyio
async def test_names_of_this_host_need_no_ssh() -> None:
    async with open_host("") as host:
        assert (host.name, host.address) == ("", "")


def test_targets() -> None:
    assert parse_target("node1") == (["--", "node1"], True)
    assert parse_target("me@node1:2222") == (["-l", "me", "-p", "2222", "--", "node1"], False)
    assert parse_target("[fd00::1]:22") == (["-p", "22", "--", "fd00::1"], False)
