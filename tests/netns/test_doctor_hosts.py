"""The doctor's live check between hosts: what breaks is named, with its host and what to type, within a limit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from aphro_core.doctor.check import LiveOptions
from aphro_core.doctor.doctor import run_checks
from aphro_core.doctor.finding import Finding, Status
from tests.netns.hosts import NetnsHost, hosts

LIMIT_SECONDS = 2.0
NAMES = ["node0", "node1"]


@pytest.fixture(scope="module")
def pair() -> Iterator[list[NetnsHost]]:
    with hosts(2) as made:
        made[1].add_interface("storage0", "192.0.2.5/24")
        yield made


@pytest.fixture(autouse=True)
def _healthy(pair: list[NetnsHost]) -> Iterator[None]:
    yield
    for host in pair:
        host.resume()
        host.clear()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def _gloo(progress: Callable[[str], None] = lambda line: None, **env: str) -> Finding:
    live = LiveOptions(limit_seconds=LIMIT_SECONDS, env=env)
    (finding,) = await run_checks(only=["comm.gloo"], hosts=NAMES, live=live, progress=progress)
    return finding


@pytest.mark.anyio
async def test_two_hosts_add_up_and_say_what_it_costs(pair: list[NetnsHost]) -> None:
    finding = await _gloo()
    assert finding.status in (Status.PASS, Status.WARN), finding  # WARN: this machine is too busy to be fast
    text = "\n".join(line.text for line in finding.evidence)
    assert "0 node0 - 1 node1: all-reduce 8 B" in text
    assert "all 2 ranks: all-reduce 8 KiB" in text
    assert "at -tp 2 spends" in text
    assert "WRONG" not in text


@pytest.mark.anyio
async def test_a_slow_link_is_a_warning_with_both_numbers(pair: list[NetnsHost]) -> None:
    pair[1].slow_link("50mbit")
    finding = await _gloo()
    assert finding.status is Status.WARN
    assert "MB/s, of a link of 1250 MB/s" in finding.title
    assert "left out" in "\n".join(line.text for line in finding.evidence)


@pytest.mark.anyio
async def test_a_blocked_port_names_both_ends(pair: list[NetnsHost]) -> None:
    pair[0].drop("tcp dport != 22 ct state new")
    finding = await _gloo()
    assert (finding.status, finding.host) == (Status.FAIL, "node1")
    assert "between node0 and node1" in finding.title
    assert f"reaching the store at {pair[0].address} port" in finding.title
    assert "ufw allow" in finding.remedy


@pytest.mark.anyio
async def test_a_wrong_interface_is_answered_with_the_right_one(pair: list[NetnsHost]) -> None:
    finding = await _gloo(GLOO_SOCKET_IFNAME="storage0")
    assert finding.status is Status.FAIL
    assert "on node1: export GLOO_SOCKET_IFNAME=eth0" in finding.remedy
    assert any("sockets use storage0" in line.text for line in finding.evidence)


@pytest.mark.anyio
async def test_a_host_that_stops_answering_is_found_and_named(pair: list[NetnsHost]) -> None:
    stopped_at: list[float] = []

    def stop(line: str) -> None:
        if "round 1" in line:
            pair[1].pause()
            stopped_at.append(time.monotonic())

    finding = await _gloo(stop)
    assert time.monotonic() - stopped_at[0] < LIMIT_SECONDS + 10
    assert (finding.status, finding.host, finding.root_cause) == (Status.FAIL, "node1", True)
    assert "rank 1 (node1) stopped answering" in finding.title


@pytest.mark.anyio
async def test_a_host_that_is_stopped_before_is_no_longer_asked(pair: list[NetnsHost]) -> None:
    pair[1].pause()
    found = await run_checks(only=["shm.size", "limit.memlock"], hosts=NAMES, connect_seconds=2)
    assert [(finding.id, finding.host) for finding in found] == [
        ("host.ssh", "node1"), ("shm.size", "node0"), ("limit.memlock", "node0")
    ]  # fmt: skip
    assert "no ssh connection to node1" in found[0].title


async def _network(host: str = "") -> dict[str, Finding]:
    """Check id -> finding, of a host or of all together."""
    found = await run_checks(only=["net", "name"], hosts=NAMES)
    return {finding.id: finding for finding in found if finding.host in ("", host)}


@pytest.mark.anyio
async def test_the_network_between_healthy_hosts(pair: list[NetnsHost]) -> None:
    found = await _network("node0")
    assert {name: finding.status for name, finding in found.items()} == {
        "name.loopback": Status.PASS,
        "name.unique": Status.PASS,
        "net.interface": Status.PASS,
        "net.reach": Status.PASS,
        "net.mtu": Status.PASS,
        "net.speed": Status.WARN,  # veth says 10 Gb/s
    }
    assert found["net.interface"].title == f"eth0 ({pair[0].address}) leads to the peers"


@pytest.mark.anyio
async def test_what_is_wrong_between_hosts_is_found_from_both_sides(pair: list[NetnsHost]) -> None:
    pair[1].drop("tcp dport != 22 ct state new")  # which Gloo does not notice: here node1 connects to node0
    pair[1].run("ip", "link", "set", "eth0", "mtu", "1400")
    try:
        found = await _network("node1")
    finally:
        pair[1].run("ip", "link", "set", "eth0", "mtu", "1500")
    assert found["net.reach"].status is Status.FAIL
    assert "node0 cannot connect to node1: no answer within 3 s" in found["net.reach"].title
    assert "on node1: sudo ufw allow from" in found["net.reach"].remedy
    assert (found["net.mtu"].status, found["net.mtu"].title) == (Status.FAIL, "different MTUs: node0 1500, node1 1400")
    assert found["net.interface"].status is Status.WARN  # NCCL would start with storage0
    assert "storage0" in found["net.interface"].title
    assert "NCCL_SOCKET_IFNAME==eth0" in found["net.interface"].remedy


def test_nothing_runs_on_when_the_driver_is_killed(pair: list[NetnsHost]) -> None:
    code = (
        "import anyio, functools\nsay = functools.partial(print, flush=True)\n"
        "from aphro_core.doctor.doctor import run_checks\n"
        f"run = functools.partial(run_checks, only=['comm.gloo'], hosts={NAMES}, progress=say)\n"
        "anyio.run(run)\n"
    )
    before = [set(host.processes()) for host in pair]
    driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    for line in driver.stdout:
        if "starting 2 ranks" in line:
            break
    while not all(_ranks_on(host) for host in pair):
        time.sleep(0.05)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and any(
        set(host.processes()) - old for host, old in zip(pair, before, strict=True)
    ):
        time.sleep(0.1)
    assert [set(host.processes()) - old for host, old in zip(pair, before, strict=True)] == [set(), set()]


def _ranks_on(host: NetnsHost) -> list[int]:
    found = []
    for pid in host.processes():
        try:
            with open(f"/proc/{pid}/cmdline") as file:
                if "aphro_core.doctor.live.rank" in file.read():
                    found.append(pid)
        except OSError:
            continue
    return found
