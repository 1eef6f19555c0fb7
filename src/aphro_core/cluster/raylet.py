"""How Ray is started on a node: its command and environment, with every port fixed and nothing open to strangers."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from aphro_core.cluster.membership import Membership
from aphro_core.cluster.ports import Layout
from aphro_core.cluster.processes import MARK
from aphro_core.errors import ClusterError, UsageError

_START_SECONDS: Final = 120.0
_LAST_WORDS: Final = 400
_OBJECT_STORE_BYTES: Final = 128 * 2**20  # plans and tokens do not pass through it
_NOT_INHERITED: Final = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "APHRO_API_KEY", "APHRO_CLUSTER_TOKEN")
INSTALL: Final = "pip install 'aphro[ray]'"


class SlowStartError(ClusterError):
    """Ray gave up on a node that was not registered within its own 30 s, which no option changes."""


def check_installed(*, dashboard: bool = False) -> None:
    """Raises UsageError with the line that installs what is missing."""
    if importlib.util.find_spec("ray") is None:
        raise UsageError("a cluster needs Ray, which is not installed here", hint=INSTALL)
    if dashboard and any(importlib.util.find_spec(name) is None for name in ("aiohttp", "opentelemetry")):
        raise UsageError("--dashboard needs more of Ray than is installed here", hint="pip install 'ray[default]'")


def start_command(membership: Membership, layout: Layout, *, name: str, dashboard: bool) -> list[str]:
    """``ray start`` for the head or a member. It returns when the node is registered."""
    first, last = layout.workers
    is_gpu = membership.resource == "GPU"
    options: dict[str, object] = {
        "node-ip-address": membership.node_address,
        "node-name": name,
        "node-manager-port": layout.node_manager,
        "object-manager-port": layout.object_manager,
        "runtime-env-agent-port": layout.runtime_env,
        "dashboard-agent-grpc-port": layout.agent_grpc,
        "dashboard-agent-listen-port": layout.agent_http,
        "metrics-export-port": layout.metrics,
        "min-worker-port": first,
        "max-worker-port": last,
        "num-gpus": membership.devices if is_gpu else 0,
        "resources": json.dumps({} if is_gpu or not membership.devices else {membership.resource: membership.devices}),
        "object-store-memory": _OBJECT_STORE_BYTES,
        "temp-dir": f"{membership.temp_dir}/ray",
        "include-log-monitor": "false",
    }
    if membership.role == "head":
        options |= {
            "port": layout.head,
            "include-dashboard": str(dashboard).lower(),
            "dashboard-port": layout.dashboard,
        }
        if importlib.util.find_spec("grpc") is not None:  # Ray opens it then, at 10001 unless told otherwise
            options |= {"ray-client-server-port": layout.client}
        flags = ["head", "no-monitor", "disable-usage-stats"]
    else:
        options |= {"address": membership.head_address}
        flags = []
    words = [*flags, *(f"{option}={value}" for option, value in options.items())]
    return [sys.executable, "-m", "ray.scripts.scripts", "start", *(f"--{word}" for word in words)]


def ray_environment(membership: Membership, inherited: Mapping[str, str]) -> dict[str, str]:
    """What Ray's processes, and so ranks, start with: the shell's variables, then what was typed with ``-e``."""
    kept = {name: value for name, value in inherited.items() if name not in _NOT_INHERITED}
    return {
        **kept,
        **membership.environment,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": membership.token_path,
        "RAY_USAGE_STATS_ENABLED": "0",
        "DASHBOARD_METRIC_PORT": str(Layout(membership.head[1]).dashboard_metrics),
        MARK: membership.id,
    }


def start_ray(command: list[str], environment: Mapping[str, str], log: Path) -> None:
    """Run ``ray start`` to its end. Raises SlowStartError, or ClusterError with Ray's own words."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            code = process.wait(_START_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise ClusterError(f"Ray did not start within {_START_SECONDS:g} s", hint=f"look into {log}") from None
    if code and "timed out during startup" in log.read_text(errors="replace")[-_LAST_WORDS:]:
        raise SlowStartError(
            "Ray's own limit of 30 s to register this node was too short: this host or the head is very busy",
            hint=f"the same command again; if it does not help, look into {log}",
        )
    if code:
        raise ClusterError(f"Ray did not start: {_reason(log)}", hint=f"look into {log}")


def _reason(log: Path) -> str:
    """The last line that names an error, else the last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "error" in line]
    return (errors or lines or ["it said nothing"])[-1][:400]
