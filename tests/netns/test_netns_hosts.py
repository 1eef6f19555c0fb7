"""The hosts made of namespaces are hosts: they reach each other, and each fault does what it says."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.netns.hosts import NetnsHost, hosts


@pytest.fixture(scope="module")
def pair() -> Iterator[list[NetnsHost]]:
    with hosts(2, env={"node1": {"NCCL_SOCKET_IFNAME": "eth0"}}) as made:
        yield made


@pytest.fixture(autouse=True)
def _healthy(pair: list[NetnsHost]) -> Iterator[None]:
    yield
    for host in pair:
        host.resume()
        host.clear()
        host.link_up()


def _ssh(host: str, command: str, timeout: float = 10) -> str:
    argv = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=2", host, command]
    return subprocess.run(argv, capture_output=True, text=True, timeout=timeout, check=False).stdout.strip()


def test_a_session_is_on_that_host(pair: list[NetnsHost]) -> None:
    assert _ssh("node1", "uname -n; echo $NCCL_SOCKET_IFNAME; ls /sys/class/net; ls /dev/shm").split() == [
        "node1", "eth0", "eth0", "lo"
    ]  # fmt: skip
    assert _ssh("node0", "ssh node1 uname -n") == "node1"
    assert pair[0].run("uname", "-n").stdout == "node0\n"
    assert pair[0].run("getent", "hosts", "node1").stdout.split() == [pair[1].address, "node1"]


def _reach(source: NetnsHost, target: NetnsHost) -> bool:
    connect = ["timeout", "1", "bash", "-c", f"exec 3<>/dev/tcp/{target.address}/22"]
    return source.run(*connect, check=False).returncode == 0


def test_what_is_dropped_does_not_arrive(pair: list[NetnsHost]) -> None:
    node0, node1 = pair
    assert _reach(node0, node1)
    node1.drop(f"ip saddr {node0.address} tcp dport 22")
    assert not _reach(node0, node1)
    node1.clear()
    assert _reach(node0, node1)


def test_a_cut_cable(pair: list[NetnsHost]) -> None:
    pair[1].link_down()
    assert not _reach(*pair)
    pair[1].link_up()
    assert _reach(*pair)


def test_a_slow_link_is_slow(pair: list[NetnsHost]) -> None:
    pair[1].slow_link("8mbit")
    started = time.monotonic()
    assert _ssh("node1", "head -c 1000000 /dev/zero | wc -c; head -c 1000000 /dev/zero")[:7] == "1000000"
    assert time.monotonic() - started > 0.7


def test_a_paused_host_accepts_and_says_nothing(pair: list[NetnsHost]) -> None:
    pair[1].pause()
    assert _reach(*pair)
    assert _ssh("node1", "true; echo yes") == ""
    pair[1].resume()
    assert _ssh("node1", "echo yes") == "yes"


def test_nothing_is_left(pair: list[NetnsHost]) -> None:
    with hosts(1) as [host]:
        card = f"aphro{host.address.split('.')[2]}"
        assert card in os.listdir("/sys/class/net")
        inside = host.processes()
        folder = host.folder
    assert card not in os.listdir("/sys/class/net")
    assert not any(os.path.exists(f"/proc/{pid}") for pid in inside)
    assert not folder.exists()
