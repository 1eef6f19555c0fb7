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
from aphro_core.cluster.ports import Layout
from aphro_core.cluster.raylet import ray_environment, start_command
from tests.netns.hosts import DRIVER, NetnsHost

_START_SECONDS = 120.0


class RayNodes:
    """The head, and the raylets of the hosts, started as `aphro cluster` starts them."""

    def __init__(self, stack: ExitStack, address: str) -> None:
        self._stack = stack
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)))
        self.address = address
        self.layout = Layout(20000 + os.getpid() % 100 * 200)
        self.head = f"{address}:{self.layout.head}"
        self.token = self.folder / "token"
        self.token.write_text(secrets.token_hex(32))
        self.token.chmod(0o600)
        self.environment = {**ray_environment(self._member("head", address, 0), os.environ), "OMP_NUM_THREADS": "1"}

    def _member(self, name: str, address: str, num_slots: int) -> Membership:
        return Membership(
            id="0" * 16, role="head" if name == "head" else "member", head_address=self.head, node_address=address,
            control_port=0, token_path=str(self.token), temp_dir=str(self.folder / name),
            log_dir=str(self.folder / "logs"), devices=num_slots, resource="aphro_slot", environment={},
            started_at=time.time(), pid=0, pid_started=0, boot_id="",
        )  # fmt: skip

    def start_head(self) -> None:
        """In process ids of its own, so that all of it ends with the first, and that with the tests."""
        own = ["setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--mount-proc", "--kill-child", "--fork"]
        log = self._stack.enter_context((self.folder / "head.log").open("wb"))
        process = subprocess.Popen(
            [*own, *self._command("head", self.address, 0)],
            env=self.environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        self._stack.callback(process.wait)
        self._stack.callback(os.killpg, process.pid, signal.SIGKILL)

    def start(self, node: NetnsHost, num_slots: int) -> None:
        """A member of an aphro cluster as far as Ray is concerned; nothing of it is written down on ``node``."""
        log = self._stack.enter_context((self.folder / f"{node.name}.log").open("ab"))
        env = {**self.environment, "XDG_STATE_HOME": str(self.folder / node.name)}
        node.popen(*self._command(node.name, node.address, num_slots), env=env, stdout=log, stderr=log)

    def _command(self, name: str, address: str, num_slots: int) -> list[str]:
        member = self._member(name, address, num_slots)
        return [*start_command(member, self.layout, name=name, dashboard=False), "--block", "--log-color=false"]

    def wait_for(self, number: int) -> None:
        """Until so many nodes are in it, the head among them."""
        code = (
            "import ray, sys, time\n"
            "ray.init(address=sys.argv[1], _node_ip_address=sys.argv[2], logging_level='ERROR')\n"
            "while sum(node['Alive'] for node in ray.nodes()) < int(sys.argv[3]): time.sleep(0.1)"
        )
        deadline = time.monotonic() + _START_SECONDS
        while not (self.folder / "head" / "ray" / "ray_current_cluster").exists():
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
        write_membership(with_process(self._member("head", self.address, 0), os.getpid()))


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
