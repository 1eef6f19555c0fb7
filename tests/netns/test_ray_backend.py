"""Ranks on the nodes of a Ray cluster: the tokens of one process, whatever dies; nothing stays; refusals name nodes."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from aphro import LLM
from aphro_core.checkpoint.digests import cache_folder
from aphro_core.errors import AphroError, ExitCode, PlacementError
from aphro_core.reporter import SilentReporter
from tests.e2e.server_process import running_server
from tests.netns.hosts import NetnsHost
from tests.netns.ray_nodes import RayNodes, ray_nodes
from tests.netns.small import SMALL, tokens_of

pytestmark = pytest.mark.usefixtures("warm_start")


@pytest.fixture(scope="module")
def cluster(expected: list[list[int]], nodes: list[NetnsHost]) -> Iterator[RayNodes]:
    """Two slots, one, and one: the driver's own node has none."""
    with ray_nodes(nodes, {"node0": 2, "node1": 1, "node2": 1}) as made:
        yield made


class PrintReporter(SilentReporter):
    """Lines to standard error."""

    def line(self, text: str) -> None:
        print(text, file=sys.stderr)


def ranks_on(nodes: list[NetnsHost]) -> list[int]:
    return [pid for node in nodes for pid in node.processes() if b"remote_entry" in _command_line(pid)]


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


def hosts_of(llm: LLM) -> list[str]:
    ready = llm._session.ready
    assert ready is not None
    return [rank.host for rank in ready.ranks]


def places_with(secret: str, nodes: list[NetnsHost], folder: Path) -> list[str]:
    """Argument lists of hosts, and files of Ray (logs, above all), that a secret has come into."""
    lists = [str(pid) for node in nodes for pid in node.processes() if secret.encode() in _command_line(pid)]
    files = [str(file) for file in folder.rglob("*") if file.is_file() and secret.encode() in file.read_bytes()]
    return lists + files


def test_a_group_over_three_hosts(
    cluster: RayNodes,
    nodes: list[NetnsHost],
    model: Path,
    expected: list[list[int]],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two slots, one, and one: a stage on the first host, another that spans two; a killed rank is a pause."""
    monkeypatch.setenv("HF_TOKEN", secret := secrets.token_hex(16))
    with LLM(str(model), tensor_parallel_size=2, pipeline_parallel_size=2, reporter=PrintReporter(), **SMALL) as llm:
        assert hosts_of(llm) == ["node0", "node0", "node1", "node2"]
        assert tokens_of(llm) == expected
        os.kill(ranks_on([nodes[1]])[0], signal.SIGKILL)
        assert tokens_of(llm) == expected
        assert hosts_of(llm) == ["node0", "node0", "node1", "node2"]
        assert places_with(secret, nodes, cluster.folder) == []
    wait_until_gone(nodes, 3)
    said = capfd.readouterr().err
    assert "Defaulting to use ray for distributed inference: 4 ranks, no devices on this host" in said
    assert "4 ranks on 3 of 4 nodes of the cluster" in said
    assert "A tensor parallel group spans hosts" in said
    assert re.search(r"rank 2 on node1 \(pid \d+\) was killed by signal 9", said)


def test_a_killed_driver_leaves_nothing(cluster: RayNodes, nodes: list[NetnsHost], model: Path, tmp_path: Path) -> None:
    arguments = ["-pp", "3", "--dtype", "float32", "--skip-tokenizer-init", "--max-model-len", "128"]
    with running_server(tmp_path, model, *arguments) as server:
        assert [worker["host"] for worker in server.record["workers"]] == ["node0", "node0", "node1"]
        for pid in [server.process.pid, *server.descendants]:
            with suppress(ProcessLookupError):  # it went with those that were killed before it
                os.kill(pid, signal.SIGKILL)
        wait_until_gone(nodes, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pipeline_parallel_size": 5}, r"World size \(5\) .* free slots .*\(4\): .*node0 \(.*\): 2 of 2 free, node1"),
        (
            {"wait_nodes": 9, "wait_timeout": 0.1},
            "--wait-nodes 9: 4 nodes are there after 0.1 s: .*node2 .*: 1 of 1",
        ),
    ],
)
def test_refusals_say_what_is_there(cluster: RayNodes, model: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(PlacementError, match=words):
        LLM(str(model), **options, **SMALL)


def test_a_node_without_the_model_reads_ours(
    cluster: RayNodes, nodes: list[NetnsHost], model: Path, expected: list[list[int]]
) -> None:
    nodes[0].run("mount", "--bind", "/mnt", str(model))
    try:
        with LLM(str(model), tensor_parallel_size=2, model_from="head", **SMALL) as llm:
            assert hosts_of(llm) == ["node0", "node0"]
            assert tokens_of(llm) == expected
            ready = llm._session.ready
            assert ready is not None
            assert all(rank.bytes_fetched for rank in ready.ranks)
    finally:
        nodes[0].run("umount", str(model))
        for kept in (cache_folder() / "from-head").glob(f"{model.name}-*"):
            shutil.rmtree(kept)


def test_a_flipped_bit(cluster: RayNodes, nodes: list[NetnsHost], model: Path, tmp_path: Path) -> None:
    weights = model / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-5] ^= 1
    (tmp_path / "damaged").write_bytes(damaged)
    nodes[1].run("mount", "--bind", str(tmp_path / "damaged"), str(weights))
    try:
        with pytest.raises(AphroError, match=r"node1: model\.safetensors of .* has other contents") as error:
            LLM(str(model), pipeline_parallel_size=3, verify="full", **SMALL)
    finally:
        nodes[1].run("umount", str(weights))
    assert error.value.exit_code == ExitCode.MODEL


def test_a_dead_node_is_replaced_by_a_spare(cluster: RayNodes, nodes: list[NetnsHost], smollm2_gguf: Path) -> None:
    """Uneven hosts, two devices and one. The last test of this file: node1 stays dead."""
    options = {**SMALL, "max_model_len": 64, "num_blocks": 16}
    with LLM(str(smollm2_gguf), **options) as llm:
        alone = tokens_of(llm)
    with LLM(str(smollm2_gguf), pipeline_parallel_size=3, **options) as llm:
        assert hosts_of(llm) == ["node0", "node0", "node1"]
        assert tokens_of(llm) == alone
        nodes[1].kill()
        assert tokens_of(llm) == alone
        assert hosts_of(llm) == ["node0", "node0", "node2"]
    with pytest.raises(PlacementError, match=r"node1 \(.*\): does not answer"):
        LLM(str(smollm2_gguf), pipeline_parallel_size=4, **SMALL)
