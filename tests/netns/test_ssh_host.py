"""Another host through the contract, over a real sshd: the same answers as here, whatever is in a path or a word."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aphro_core.remote import control_socket
from aphro_core.remote.remote import NOT_FOUND, HostUnreachableError, read
from aphro_core.remote.ssh import open_host
from tests.e2e.server_process import descendants_of, is_running
from tests.netns.hosts import NetnsHost, hosts


@pytest.fixture(scope="module")
def node() -> Iterator[NetnsHost]:
    with hosts(1) as [made]:
        yield made


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_the_contract_over_ssh(node: NetnsHost, tmp_path: Path) -> None:
    odd = tmp_path / "it's $HOME; `x`"
    odd.mkdir()
    (odd / "one").write_text("first\nsecond\n")
    (odd / "two").write_text("")
    (tmp_path / "link").symlink_to(odd)
    async with open_host(node.name) as host:
        assert (host.name, host.address) == (node.name, node.address)
        pattern = f"{tmp_path}/it's*/*"
        assert await host.files(pattern) == {f"{odd}/one": "first\nsecond", f"{odd}/two": ""}
        assert await host.links(f"{tmp_path}/li*") == {f"{tmp_path}/link": str(odd)}
        assert await read(host, "/proc/sys/kernel/hostname") == node.name
        assert await host.files("/proc/self/mem", "/none") == {}
        words = ["a b", "$(id)", "'", '"', "*", "-n", "ü"]
        done = await host.run("printf", "[%s]", *words)
        assert done.stdout == "".join(f"[{word}]" for word in words)
        done = await host.run("sh", "-c", 'echo "$X"; cat; exit 5', stdin="in", env={"X": "a'b c"})
        assert (done.returncode, done.stdout) == (5, "a'b c\nin")
        assert (await host.run("no-such-command")).returncode == NOT_FOUND
        with pytest.raises(TimeoutError, match=r"node0: `sleep` did not end within 0\.3 s"):
            await host.run("sleep", "60", timeout_seconds=0.3)


@pytest.mark.anyio
async def test_a_process_there_ends_with_its_block(node: NetnsHost) -> None:
    async with open_host(node.name) as host:
        before = set(node.processes())
        async with host.start("sh", "-c", "echo up; exec cat", env={"A": "1"}) as process:
            assert await process.receive_line() == "up"
            await process.send_line("hello")
            assert await process.receive_line() == "hello"
            assert set(node.processes()) - before
    deadline = time.monotonic() + 5
    while set(node.processes()) - before and time.monotonic() < deadline:
        time.sleep(0.05)  # noqa: ASYNC251
    assert not set(node.processes()) - before


@pytest.mark.anyio
async def test_a_connection_that_is_lost_or_refused_says_why(node: NetnsHost) -> None:
    with pytest.raises(HostUnreachableError, match=r"no ssh connection to .*:2222: .*Connection refused"):
        async with open_host(f"{node.name}:2222"):
            raise AssertionError


@pytest.mark.anyio
async def test_an_unknown_host_key_is_refused(node: NetnsHost) -> None:
    known = node.folder / "known_hosts"
    text = known.read_text()
    known.write_text("")
    try:
        with pytest.raises(HostUnreachableError, match="Host key verification failed"):
            async with open_host(node.name):
                raise AssertionError
    finally:
        known.write_text(text)


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder for temporary files that no other test uses, with a path short enough for a socket's name."""
    with tempfile.TemporaryDirectory() as name:
        monkeypatch.setenv("TMPDIR", name)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield name


@pytest.mark.anyio
async def test_a_connection_has_no_name(node: NetnsHost, temporary: str) -> None:
    """While it is open already, so that there is nothing to be left behind; and commands still go through it."""
    async with open_host(node.name) as host:
        assert not os.listdir(temporary)
        connections = node.run("sh", "-c", "ss -tnH state established sport = :22 | wc -l").stdout
        assert (await host.run("echo", "yes")).stdout == "yes\n"
        assert node.run("sh", "-c", "ss -tnH state established sport = :22 | wc -l").stdout == connections == "1\n"
    assert not os.listdir(temporary)


_OWNER = """
import sys, anyio
from aphro_core.remote import ssh
async def main():
    async with ssh.open_host(sys.argv[1]) as host:
        print("open", flush=True)
        await anyio.sleep_forever()
anyio.run(main)
"""


def test_a_killed_owner_leaves_neither_name_nor_ssh(node: NetnsHost, temporary: str) -> None:
    owner = subprocess.Popen([sys.executable, "-c", _OWNER, node.name], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "open\n"
    masters = descendants_of(owner.pid)
    assert masters
    owner.kill()
    owner.wait()
    deadline = time.monotonic() + 3
    while any(map(is_running, masters)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_running, masters))
    assert not os.listdir(temporary)


def test_what_was_left_while_connecting_is_swept(node: NetnsHost, tmp_path: Path) -> None:
    """The one moment in which there is a name: until ssh has connected, here to something that never answers."""
    node.pause()
    owner = subprocess.Popen([sys.executable, "-c", _OWNER, node.name], env={**os.environ, "TMPDIR": str(tmp_path)})
    while not any(tmp_path.glob("aphro-ssh-*")):
        time.sleep(0.02)
    owner.kill()
    owner.wait()
    node.resume()
    assert list(tmp_path.iterdir())
    held, lock = control_socket._locked_folder()
    try:
        control_socket._sweep(tmp_path)
        control_socket._sweep(held.parent)
        assert not list(tmp_path.iterdir())
        assert held.exists()
    finally:
        held.rmdir()
        os.close(lock)
