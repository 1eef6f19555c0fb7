"""Ranks on the nodes of a Ray cluster: the tokens of one process, whatever dies; nothing stays; refusals name nodes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aphro import LLM, SamplingParams
from tests.netns.hosts import NetnsHost, hosts
from tests.netns.ray_nodes import RayNodes, ray_nodes
from tests.tiny import write_tiny_checkpoint

SMALL: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "max_model_len": 128, "num_blocks": 64, "skip_tokenizer_init": True,
}  # fmt: skip
PROMPTS = [[3, 4, 5], [7] * 40, [1]]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    write_tiny_checkpoint(folder, "llama")
    return folder


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    with LLM(str(model), **SMALL) as llm:
        return tokens_of(llm)


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[NetnsHost]]:
    with hosts(3) as made:
        yield made


@pytest.fixture(scope="module")
def cluster(expected: list[list[int]], nodes: list[NetnsHost]) -> Iterator[RayNodes]:
    """Two slots, one, and one: the driver's own node has none."""
    with ray_nodes(nodes, {"node0": 2, "node1": 1, "node2": 1}) as made:
        yield made


def tokens_of(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


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


@pytest.mark.parametrize(
    ("tp", "pp", "where"),
    [(2, 1, ["node0", "node0"]), (1, 3, ["node0", "node0", "node1"]), (2, 2, ["node0", "node0", "node1", "node2"])],
)
def test_tokens_of_one_process(
    cluster: RayNodes,
    nodes: list[NetnsHost],
    model: Path,
    expected: list[list[int]],
    tp: int,
    pp: int,
    where: list[str],
) -> None:
    with LLM(str(model), tensor_parallel_size=tp, pipeline_parallel_size=pp, **SMALL) as llm:
        assert hosts_of(llm) == where
        assert tokens_of(llm) == expected
    wait_until_gone(nodes, 3)


def test_a_killed_rank_is_a_pause(
    cluster: RayNodes, nodes: list[NetnsHost], model: Path, expected: list[list[int]]
) -> None:
    with LLM(str(model), tensor_parallel_size=2, **SMALL) as llm:
        os.kill(ranks_on(nodes)[0], signal.SIGKILL)
        assert tokens_of(llm) == expected
    wait_until_gone(nodes, 3)
