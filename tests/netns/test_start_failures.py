"""Starts over several hosts that cannot succeed: they end in seconds, and name host, cause and what to try."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from aphro import LLM
from aphro_core.config import HostSlots
from aphro_core.errors import AphroError, ExitCode
from tests.netns.hosts import NetnsHost, hosts
from tests.netns.small import SMALL
from tests.netns.test_ssh_backend import wait_until_gone

pytestmark = pytest.mark.usefixtures("warm_start")

WHERE = (HostSlots("node0", 1), HostSlots("node1", 1))
_SECONDS = 30.0  # on a busy machine; two interpreters that import torch are most of it


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[NetnsHost]]:
    with hosts(2, env={"node1": {"XDG_CACHE_HOME": "/proc"}}) as made:
        for number, node in enumerate(made):
            node.add_interface("ib0", f"10.99.0.{number + 1}/24")
        yield made


@contextmanager
def refused(nodes: list[NetnsHost], model: Path, message: str, hint: str, **options: str) -> Iterator[None]:
    """Whatever the block arranges, the start ends soon with ``message`` and ``hint``, and leaves nothing."""
    yield
    began = time.monotonic()
    with pytest.raises(AphroError, match=message) as error:
        LLM(str(model), tensor_parallel_size=2, hosts=WHERE, **options, **SMALL)
    assert time.monotonic() - began < _SECONDS
    assert hint in (error.value.hint or "")
    assert error.value.exit_code in (ExitCode.PLACEMENT, ExitCode.MODEL)
    wait_until_gone(nodes, 3)


def test_a_firewall_between_them(nodes: list[NetnsHost], model: Path) -> None:
    found = r"rank \d on node[01] .*: node[01] does not reach node[01] at 198.* \(eth0\): nothing comes back within 5 s"
    try:
        with refused(nodes, model, found, "open TCP between node"):
            nodes[1].drop("tcp dport != 22")
    finally:
        nodes[1].clear()


@pytest.mark.parametrize(
    ("interface", "message", "hint"),
    [
        ("eth9", r"node[01] has no interface eth9 \(GLOO_SOCKET_IFNAME\); it has .*eth0", "unset GLOO_SOCKET_IFNAME"),
        ("ib0", r"node[01] does not reach node[01] at 10\.99\.0\.", "unset GLOO_SOCKET_IFNAME: the route to node"),
    ],
)
def test_a_wrong_interface(
    nodes: list[NetnsHost], model: Path, monkeypatch: pytest.MonkeyPatch, interface: str, message: str, hint: str
) -> None:
    with refused(nodes, model, message, hint):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)


def test_a_rank_that_fails(nodes: list[NetnsHost], model: Path) -> None:
    nodes[1].run("mount", "--bind", "/mnt", str(model))
    try:
        with refused(
            nodes, model, r"rank 1 on node1 .*: node1 cannot keep the model in /proc", "free space", model_from="head"
        ):
            pass
    finally:
        nodes[1].run("umount", str(model))
