"""Ranks on hosts of their own, over ssh: the tokens of one process; refusals before anything loads; nothing stays."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from aphro import LLM
from aphro_core.config import HostSlots
from aphro_core.errors import AphroError, ExitCode, PlacementError
from tests.e2e.server_process import running_server
from tests.netns.hosts import NetnsHost
from tests.netns.small import SMALL, tokens_of
from tests.tiny import write_tiny_checkpoint

pytestmark = pytest.mark.usefixtures("warm_start")


def ranks_on(nodes: list[NetnsHost]) -> list[int]:
    """Processes of ranks, wherever they are left."""
    return [pid for node in nodes for pid in node.processes() if b"aphro_core" in _command_line(pid)]


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def wait_until_gone(nodes: list[NetnsHost], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while ranks_on(nodes) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ranks_on(nodes) == []


@pytest.mark.parametrize(
    ("tp", "pp", "slots"),
    [(2, 1, {"node0": 1, "node1": 1}), (1, 3, {"node0": 1, "node1": 1, "node2": 1}), (2, 2, {"node0": 2, "node1": 2})],
)
def test_tokens_of_one_process(
    nodes: list[NetnsHost], model: Path, expected: list[list[int]], tp: int, pp: int, slots: dict[str, int]
) -> None:
    where = tuple(HostSlots(name, number) for name, number in slots.items())
    with LLM(str(model), tensor_parallel_size=tp, pipeline_parallel_size=pp, hosts=where, **SMALL) as llm:
        ready = llm._session.ready
        assert ready is not None
        assert [rank.host for rank in ready.ranks] == [name for name, number in slots.items() for _ in range(number)]
        assert tokens_of(llm) == expected
    wait_until_gone(nodes, 3)


def test_a_killed_rank_is_a_pause(nodes: list[NetnsHost], model: Path, expected: list[list[int]]) -> None:
    where = (HostSlots("node0", 1), HostSlots("node1", 1))
    with LLM(str(model), tensor_parallel_size=2, hosts=where, **SMALL) as llm:
        os.kill(ranks_on([nodes[1]])[0], signal.SIGKILL)
        assert tokens_of(llm) == expected
    wait_until_gone(nodes, 3)


def test_a_host_that_is_cut_off_is_replaced(nodes: list[NetnsHost], model: Path, expected: list[list[int]]) -> None:
    where = tuple(HostSlots(node.name, 1) for node in nodes)
    with LLM(str(model), tensor_parallel_size=2, hosts=where, **SMALL) as llm:
        nodes[1].link_down()
        try:
            assert tokens_of(llm) == expected
        finally:
            nodes[1].link_up()
        ready = llm._session.ready
        assert ready is not None
        assert [rank.host for rank in ready.ranks] == ["node0", "node2"]
    wait_until_gone(nodes, 17)


def start(model: Path, *where: HostSlots, tp: int = 2) -> LLM:
    return LLM(str(model), tensor_parallel_size=tp, hosts=where, **SMALL)


def test_a_model_that_is_another_one(nodes: list[NetnsHost], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_tiny_checkpoint(folder, "llama")
    nodes[1].run("sh", "-c", f"mount -t tmpfs tmpfs {folder} && echo '{{}}' > {folder}/config.json")
    with pytest.raises(AphroError, match=r"node1: config.json of .* has 3 bytes, \d+ on this host") as refused:
        start(folder, HostSlots("node0", 1), HostSlots("node1", 1))
    assert refused.value.exit_code == ExitCode.MODEL
    nodes[1].run("sh", "-c", f"rm {folder}/config.json")
    with pytest.raises(AphroError, match="node1 has no model at"):
        start(folder, HostSlots("node0", 1), HostSlots("node1", 1))
    nodes[1].run("umount", str(folder))


def test_hosts_that_do_not_answer(nodes: list[NetnsHost], model: Path) -> None:
    with pytest.raises(AphroError, match="no ssh connection to node9"):
        start(model, HostSlots("node0", 1), HostSlots("node9", 1))
    nodes[1].link_down()
    try:
        with pytest.raises(AphroError, match="no ssh connection to node1"):
            start(model, HostSlots("node0", 1), HostSlots("node1", 1))
    finally:
        nodes[1].link_up()


def test_a_name_that_is_another_host_elsewhere(model: Path) -> None:
    with pytest.raises(AphroError, match="--hosts names localhost beside other hosts"):
        start(model, HostSlots("localhost", 1), HostSlots("node1", 1))


def test_too_few_devices(model: Path) -> None:
    with pytest.raises(PlacementError, match=r"World size \(4\) is larger than .* of the hosts \(3\)"):
        start(model, HostSlots("node0", 2), HostSlots("node1", 1), tp=4)


@pytest.mark.parametrize("victim", ["the keeper", "all at once"])
def test_a_killed_driver_leaves_nothing(nodes: list[NetnsHost], model: Path, tmp_path: Path, victim: str) -> None:
    arguments = ["--hosts", "node0:1,node1:1", "-tp", "2", "--dtype", "float32", "--skip-tokenizer-init"]
    with running_server(tmp_path, model, *arguments) as server:
        assert [worker["host"] for worker in server.record["workers"]] == ["node0", "node1"]
        assert len(ranks_on(nodes)) == 2
        doomed = [server.process.pid] if victim == "the keeper" else [server.process.pid, *server.descendants]
        for pid in doomed:
            with suppress(ProcessLookupError):  # it went with those that were killed before it
                os.kill(pid, signal.SIGKILL)
        wait_until_gone(nodes, 3)
