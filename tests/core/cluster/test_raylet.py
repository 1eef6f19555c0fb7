"""How Ray is started: every port fixed, with a token, and no secret in an argument list."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from aphro_core.cluster.ports import NUM_PORTS, Layout
from aphro_core.cluster.raylet import SlowStartError, ray_environment, start_command, start_ray
from aphro_core.errors import ClusterError
from tests.core.cluster.test_membership import HERE

LAYOUT = Layout(30000)
METRICS = str(Layout(HERE.head[1]).dashboard_metrics)


def options(role: str = "head", **changes: object) -> dict[str, str]:
    here = replace(HERE, role=role, environment={"HF_TOKEN": "hf_secret"}, **changes)  # type: ignore[arg-type]
    words = start_command(here, LAYOUT, name="node0", dashboard=False)
    assert "hf_secret" not in " ".join(words)
    return dict(word.lstrip("-").partition("=")[::2] for word in words[4:])


def test_a_head() -> None:
    found = options()
    assert {"head", "no-monitor", "disable-usage-stats"} <= set(found)
    assert found["port"] == "30000"
    assert found["include-dashboard"] == "false"
    assert "address" not in found


def test_a_member_with_slots_and_one_with_gpus() -> None:
    found = options("member")
    assert found["address"] == HERE.head_address
    assert not {"head", "port", "include-dashboard"} & set(found)
    assert (found["resources"], found["num-gpus"]) == ('{"aphro_slot": 2}', "0")
    found = options("member", resource="GPU", devices=3)
    assert (found["resources"], found["num-gpus"]) == ("{}", "3")
    assert options("member", devices=0)["resources"] == "{}"


def test_every_port_is_of_the_layout_and_none_twice() -> None:
    ports = LAYOUT.ports()
    numbers = [number for port in ports for number in range(port.first, port.last + 1)]
    assert len(numbers) == len(set(numbers))
    assert set(numbers) <= set(range(30000, 30000 + NUM_PORTS))
    typed = {int(value) for name, value in options().items() if name.endswith("port")}
    assert typed <= set(numbers)
    assert len(typed) >= 10


@pytest.mark.parametrize("has_grpc", [True, False])
def test_the_port_of_rays_client_is_fixed_where_ray_would_open_it(
    monkeypatch: pytest.MonkeyPatch, has_grpc: bool
) -> None:
    """Ray refuses to be told a port without grpcio, and opens 10001 with it unless it is told one."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if has_grpc else None)
    assert options().get("ray-client-server-port") == (str(LAYOUT.client) if has_grpc else None)
    assert "ray-client-server-port" not in options("member")


def test_a_node_that_ray_gave_up_on_is_told_from_other_failures(tmp_path: Path) -> None:
    log = tmp_path / "ray.log"
    start_ray(["true"], {}, log)
    with pytest.raises(SlowStartError, match="30 s"):
        start_ray([sys.executable, "-c", "raise Exception('The current node timed out during startup.')"], {}, log)
    with pytest.raises(ClusterError, match="RuntimeError: no space") as refused:
        start_ray([sys.executable, "-c", f"print({'.' * 400!r}); raise RuntimeError('no space')"], {}, log)
    assert not isinstance(refused.value, SlowStartError)


def test_the_environment_of_ray() -> None:
    shell = {
        "PATH": "/bin", "NCCL_DEBUG": "WARN", "RAY_ADDRESS": "elsewhere:1", "RAY_AUTH_TOKEN": "old",
        "APHRO_API_KEY": "secret", "APHRO_CLUSTER_TOKEN": "secret",
    }  # fmt: skip
    assert ray_environment(replace(HERE, environment={"NCCL_DEBUG": "INFO"}), shell) == {
        "PATH": "/bin", "NCCL_DEBUG": "INFO", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/state/token",
        "RAY_USAGE_STATS_ENABLED": "0", "DASHBOARD_METRIC_PORT": METRICS, "APHRO_CLUSTER_NODE": "c0ffee",
    }  # fmt: skip


@pytest.mark.parametrize(("asked", "expected"), [(True, "true"), (False, "false")])
def test_the_dashboard_only_when_asked(asked: bool, expected: str) -> None:
    assert f"--include-dashboard={expected}" in start_command(HERE, LAYOUT, name="n", dashboard=asked)
