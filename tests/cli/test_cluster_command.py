"""``aphro cluster``: what it prints, and what it refuses where there is no cluster or no Ray."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from aphro_cli.cluster_view import (
    environment_to_json,
    join_command,
    ports_to_json,
    render_environments,
    render_head,
    render_ports,
    render_status,
    status_to_json,
)
from aphro_cli.main import app
from aphro_core.cluster import cluster
from aphro_core.cluster.address import Chosen
from aphro_core.cluster.messages import (
    Departed,
    Environment,
    Listening,
    Memory,
    Model,
    Node,
    NodeRow,
    Ports,
    Status,
    Variable,
)
from aphro_core.cluster.ports import Layout
from aphro_core.errors import ExitCode
from tests.core.cluster.test_membership import HERE

GIB = 2**30


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("APHRO_CLUSTER_TOKEN", raising=False)


def node(number: int, **changes: Any) -> Node:
    values: dict[str, Any] = {
        "id": str(number), "name": f"node{number}", "role": "member" if number else "head",
        "address": f"10.0.0.{number}", "interface": "eth0", "devices": 1, "resource": "aphro_slot",
        "device_names": [], "started_at": 0.0,
        "versions": {"aphro": "0.1.0", "driver": "580.1"},
    }  # fmt: skip
    return Node(**{**values, **changes})


STATUS = Status(
    rows=[
        NodeRow(node=node(0), state="in", age_seconds=0.0, memory=Memory(12 * GIB, [], [])),
        NodeRow(
            node=node(1, devices=2, resource="GPU", device_names=["H100", "H100"], versions={"aphro": "0.1.0"}),
            state="in", age_seconds=1.0, memory=Memory(5 * GIB, [70 * GIB, 79 * GIB], [80 * GIB, 80 * GIB]),
        ),
        NodeRow(node=node(2, devices=0), state="lost", age_seconds=41.2, memory=None),
    ],
    departed=[Departed("node3", "10.0.0.3", "raylet ended: SIGKILL", 12.0)],
    models=[Model("tiny", "http://10.0.0.0:2242", "node0", {0: "10.0.0.1", 1: "10.0.0.9"})],
)  # fmt: skip


def test_status() -> None:
    lines = render_status(HERE, STATUS)
    assert lines[0] == "cluster of 198.18.0.1:22420: 2 nodes in, 3 devices"
    assert lines[2].split("  ")[-1].strip() == "now"
    assert "2 GPUs H100" in lines[3]
    assert "5.0 GiB, GPUs 149.0 of 160.0 GiB" in lines[3]
    assert "no device" in lines[4]
    assert lines[4].endswith("41 s ago (lost)")
    assert lines[5:] == [
        "versions on all nodes: aphro 0.1.0",
        "* driver: node0 580.1, node1 not there, node2 580.1",
        "model tiny at http://10.0.0.0:2242, from node0: rank 0 on node1, rank 1 on 10.0.0.9",
        "left 12 s ago: node3 (10.0.0.3): raylet ended: SIGKILL",
    ]


def test_status_for_scripts() -> None:
    found = status_to_json(HERE, STATUS)
    assert (found["head"], found["num_in"]) == ("198.18.0.1:22420", 2)
    assert [row["state"] for row in found["nodes"]] == ["in", "in", "lost"]
    assert found["nodes"][1]["gpu_free_bytes"] == [70 * GIB, 79 * GIB]
    assert found["nodes"][2]["free_bytes"] is None
    assert found["models"] == [
        {"name": "tiny", "url": "http://10.0.0.0:2242", "driver": "node0", "ranks": {"0": "10.0.0.1", "1": "10.0.0.9"}}
    ]


def test_environment_marks_differences() -> None:
    found = {
        "node0": Environment({"NCCL_DEBUG": Variable("INFO", "-e"), "OMP_NUM_THREADS": Variable("4", "shell")}),
        "node1": Environment({"NCCL_DEBUG": Variable("INFO", "-e"), "GLOO_SOCKET_IFNAME": Variable("x" * 60, "-e")}),
    }
    lines = render_environments(found)[2:]
    assert [line.split()[:2] for line in lines] == [["*", "GLOO_SOCKET_IFNAME"], ["NCCL_DEBUG", "INFO"],
                                                   ["*", "OMP_NUM_THREADS"]]  # fmt: skip
    assert lines[0].split()[2:] == ["-", "x" * 39 + "…", "(-e)"]
    assert environment_to_json(found)["node0"]["OMP_NUM_THREADS"] == {"value": "4", "source": "shell"}


def test_ports_and_what_is_outside_of_them() -> None:
    found = {"node0": Ports([Listening(30000, "::", 1, "gcs_server"), Listening(40001, "10.0.0.1", 9, "aphro-rank-0")])}
    lines = render_ports(Layout(30000), found)
    assert lines[2].split()[0] == "30000"
    assert lines[2].endswith("node0")
    assert "  node0: 40001 at 10.0.0.1 by aphro-rank-0" in lines
    assert "to any port 30000:30119,32768:60999" in lines[-1]
    assert ports_to_json(Layout(30000), found)["listening"]["node0"][1]["port"] == 40001


def test_the_join_command_has_a_port_only_where_it_is_another() -> None:
    assert join_command(HERE) == "aphro cluster join --head 198.18.0.1"
    other = replace(HERE, head_address="198.18.0.1:6379")
    assert join_command(other) == "aphro cluster join --head 198.18.0.1:6379"
    assert "  APHRO_CLUSTER_TOKEN=secret aphro cluster join --head 198.18.0.1:6379" in render_head(other, "secret")


def aphro(*words: str) -> Any:
    return CliRunner().invoke(app, ["cluster", *words])


@pytest.mark.parametrize("words", [["status"], ["env"], ["ports"], ["logs"], ["down"]])
def test_in_no_cluster(words: list[str]) -> None:
    done = aphro(*words)
    assert done.exit_code == ExitCode.CLUSTER
    assert "error: this host is in no cluster" in done.stderr
    assert "\ntry: " in done.stderr
    assert done.stdout == ""


def test_a_state_folder_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")
    monkeypatch.setattr(cluster, "choose_address", lambda **_: Chosen("10.0.0.1", "eth0", "so"))
    done = aphro("up")
    assert done.exit_code == ExitCode.USAGE
    assert "error: /dev/null/aphro/cluster: Not a directory" in done.stderr
    assert "try: a folder that you may write to: export XDG_STATE_HOME=DIR" in done.stderr


@pytest.mark.parametrize("words", [["up"], ["join", "--head", "10.0.0.1", "--token", "t" * 64]])
def test_without_ray_the_line_that_installs_it(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = aphro(*words)
    assert done.exit_code == ExitCode.USAGE
    assert "error: a cluster needs Ray" in done.stderr
    assert "try: pip install 'aphro[ray]'" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["join", "--head", "10.0.0.1"], "no token"),
        (["join", "--head", "10.0.0.1", "--token", "short"], "--token is no token of a cluster: 5 characters"),
        (["up", "-e", "NO_SUCH_VARIABLE_HERE"], "this shell has no such variable"),
        (["up", "--port", "80"], "port 80 cannot be the first of a cluster's"),
        (["join", "--head", "127.0.0.1", "--token", "t" * 64], "--head 127.0.0.1 is this host itself"),
    ],
)
def test_wrong_words_are_refused_before_anything_starts(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    done = aphro(*words)
    assert done.exit_code == ExitCode.USAGE, done.stderr
    assert message in done.stderr
