"""A Ray cluster over hosts of namespaces: its head beside this process, without devices; a raylet on every host.

    with hosts(2) as nodes, ray_nodes(nodes, {"node0": 1, "node1": 2}):
        LLM(...)   # finds itself on a node of an aphro cluster

The membership that `aphro cluster up` would write is written here, in a state folder of its own.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from aphro_core.cluster.membership import Membership, with_process, write_membership
from tests.netns.hosts import DRIVER, NetnsHost

_START_SECONDS = 60.0
_RAY = (sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", "--num-cpus=1",
        "--object-store-memory=80000000", "--log-style=record", "--log-color=false")  # fmt: skip


class RayNodes:
    """The head, and the raylets of the hosts: what tests do to them."""

    def __init__(self, stack: ExitStack, address: str) -> None:
        self._stack = stack
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)))
        self.address = address
        token = self.folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self.token = token
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_enable_open_telemetry": "0",
            "OMP_NUM_THREADS": "1",
        }

    def start_head(self, port: int = 6379) -> None:
        """In process ids of its own, so that all of it ends with the first."""
        self.head = f"{self.address}:{port}"
        command = ["unshare", "--pid", "--mount-proc", "--kill-child", "--fork", *_RAY, "--head", f"--port={port}",
                   f"--node-ip-address={self.address}", "--include-dashboard=false",
                   f"--temp-dir={self.folder / 'head'}"]  # fmt: skip
        log = self._stack.enter_context((self.folder / "head.log").open("wb"))
        process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        self._stack.callback(process.wait)
        self._stack.callback(os.killpg, process.pid, signal.SIGKILL)

    def start(self, node: NetnsHost, num_slots: int) -> subprocess.Popen[str]:
        state = self.folder / f"{node.name}-state"
        state.mkdir(exist_ok=True)
        command = [*_RAY, f"--address={self.head}", f"--node-ip-address={node.address}",
                   f"--temp-dir={self.folder / node.name}", f'--resources={{"aphro_slot": {num_slots}}}']  # fmt: skip
        log = self._stack.enter_context((self.folder / f"{node.name}.log").open("ab"))
        return node.popen(*command, env={**self.environment, "XDG_STATE_HOME": str(state)}, stdout=log, stderr=log)

    def wait_for(self, number: int) -> None:
        """Until so many nodes are in it, the head among them."""
        code = (
            "import ray, sys, time\n"
            "ray.init(address=sys.argv[1], _node_ip_address=sys.argv[2], logging_level='ERROR')\n"
            "while sum(node['Alive'] for node in ray.nodes()) < int(sys.argv[3]): time.sleep(0.1)"
        )
        deadline = time.monotonic() + _START_SECONDS
        while not (self.folder / "head" / "ray_current_cluster").exists():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.1)
        try:
            subprocess.run(
                [sys.executable, "-c", code, self.head, self.address, str(number)],
                env=self.environment, check=True, timeout=_START_SECONDS, capture_output=True, text=True,
            )  # fmt: skip
        except subprocess.SubprocessError as error:
            raise AssertionError(f"{error}\n{getattr(error, 'stderr', '')}\n{self.logs()}") from error

    def logs(self) -> str:
        return "\n".join(f"== {file.name}\n{file.read_text()[-2000:]}" for file in self.folder.glob("*.log"))

    def write_membership(self) -> None:
        member = Membership(
            id="0" * 16, role="head", head_address=self.head, node_address=self.address, control_port=0,
            token_path=str(self.token), temp_dir=str(self.folder / "head"), log_dir=str(self.folder / "logs"),
            devices=0, resource="aphro_slot", environment={}, started_at=time.time(), pid=0, pid_started=0, boot_id="",
        )  # fmt: skip
        write_membership(with_process(member, os.getpid()))


@contextmanager
def ray_nodes(nodes: Sequence[NetnsHost], num_slots: Mapping[str, int]) -> Iterator[RayNodes]:
    """Skips, and says why, where Ray is not installed."""
    pytest.importorskip("ray", reason="Ray is not installed (pip install 'aphro[ray]')")
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        made = RayNodes(stack, nodes[0].address.rsplit(".", 1)[0] + f".{DRIVER}")
        made.start_head()
        for node in nodes:
            made.start(node, num_slots.get(node.name, 0))
        made.wait_for(1 + len(nodes))
        patch.setenv("XDG_STATE_HOME", str(made.folder / "state"))
        patch.delenv("RAY_ADDRESS", raising=False)
        made.write_membership()
        yield made
