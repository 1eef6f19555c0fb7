"""What a rank in a Ray cluster is told: whose variable wins, its share of the host, and where its words are kept."""

from __future__ import annotations

import pytest

from aphro_core.config import EngineConfig, ModelConfig, ParallelConfig
from aphro_core.executor.ray.agents import Group
from aphro_core.executor.ray.protocol import AgentPlace, AgentReport, RankEnded, RayNode
from aphro_core.executor.ray.rank import RayRank
from aphro_core.executor.ray.ray import _start_message
from aphro_core.executor.ray.seats import Seat
from aphro_core.worker.host_report import HostReport

HOST = HostReport("a", {}, num_cores=8, num_gpus=0, memory_bytes=2**30, files={})
NODES = [RayNode(name, name, f"10.0.0.{number}", True, []) for number, name in enumerate("ab")]


def group(**environment: str) -> Group:
    """Two ranks on node a, one on node b, which has an environment and a log folder of its own."""
    seats = [Seat(NODES[0], 0, 0), Seat(NODES[0], 0, 1), Seat(NODES[1], 1, 0)]
    places = [AgentPlace("a", -1, "aphro_slot", 2), AgentPlace("b", -1, "aphro_slot", 1)]
    reports = [AgentReport(HOST), AgentReport(HOST, environment, "/logs")]
    return Group("10.0.0.0", places, reports, seats, {"a": "a", "b": "b"}, frozenset())


def config(**environment: str) -> EngineConfig:
    model = ModelConfig(path="/m", served_name="m", dtype="float32", max_model_len=8)
    return EngineConfig(model=model, parallel=ParallelConfig(backend="ray", environment=environment))


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What travels, under what the node has, under what was asked for all ranks."""
    for name in ("NCCL_DEBUG", "NCCL_ALGO", "HF_TOKEN"):
        monkeypatch.setenv(name, "shell")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    where = group(NCCL_DEBUG="node", NCCL_ALGO="node", NCCL_SOCKET_IFNAME="eth1")
    first, _, last = (_start_message(config(NCCL_ALGO="asked", FOO="asked"), rank, where, None) for rank in range(3))
    assert first.environment["NCCL_DEBUG"] == first.environment["HF_TOKEN"] == "shell"
    assert "NCCL_SOCKET_IFNAME" not in first.environment
    assert first.environment["OMP_NUM_THREADS"] == "4"
    named = ("NCCL_DEBUG", "NCCL_ALGO", "NCCL_SOCKET_IFNAME", "HF_TOKEN", "FOO", "OMP_NUM_THREADS")
    assert [last.environment[name] for name in named] == ["node", "asked", "eth1", "shell", "asked", "8"]


def test_shares() -> None:
    first, second, last = (_start_message(config(), rank, group(), None) for rank in range(3))
    assert [each.local_rank for each in (first, second, last)] == [0, 1, 0]
    assert first.memory_bytes * 2 == second.memory_bytes * 2 == last.memory_bytes == 2**29
    assert [each.num_ranks_here for each in (first, second, last)] == [2, 2, 1]
    assert (first.peers, last.peers) == (["10.0.0.1"], ["10.0.0.0"])
    assert (first.log_file, last.log_file) == ("", "/logs/rank-2.log")


class Link:
    def tell(self, request: object) -> None: ...


@pytest.mark.parametrize(
    ("ended", "words", "is_lost"),
    [
        (RankEnded(0, -9, ""), "was killed by signal 9 (SIGKILL)", False),
        (RankEnded(0, 1, "Traceback\nImportError: no torch\n"), "ended (ImportError: no torch)", False),
        (RankEnded(0, 3, ""), "ended (exit code 3)", False),
        (RankEnded(0, None, "its node is dead"), "was lost: its node is dead", True),
    ],
)
def test_how_it_ended(ended: RankEnded, words: str, is_lost: bool) -> None:
    rank = RayRank(0, Link())  # type: ignore[arg-type]
    assert not rank.poll()
    assert (rank.is_lost, rank.describe_end()) == (
        True,
        "was lost: its connection broke, and nothing is heard of its end",
    )
    rank.end(ended)
    rank.end(RankEnded(0, 0, "said later"))
    assert rank.poll()
    assert rank.describe_end() == words
    assert rank.is_lost == is_lost
