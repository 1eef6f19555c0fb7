"""A cluster of real hosts: joined in any order, refused by name, seen from anywhere, gone without a trace."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aphro_core.errors import ExitCode
from tests.netns.hosts import NetnsHost, hosts

TOKEN = "5ec2e7" * 10
SECRET = "hf_verysecret"
PORT = 22420
pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray, of the extra, is not installed")


class Node:
    """A host with a state folder of its own: what it knows of its cluster is there."""

    def __init__(self, host: NetnsHost, folder: Path) -> None:
        self.host = host
        self.state = folder / host.name
        self.before = len(host.processes())

    def command(self, *words: str, **env: str) -> list[str]:
        variables = {"XDG_STATE_HOME": str(self.state), "APHRO_CLUSTER_TOKEN": TOKEN, "HF_TOKEN": SECRET, **env}
        aphro = [sys.executable, "-m", "aphro_cli.main", "cluster", *words]
        return ["env", *(f"{name}={value}" for name, value in variables.items()), *aphro]

    def run(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self.host.run(*self.command(*words, **env), check=False, timeout=100)

    def ask(self, *words: str) -> Any:
        done = self.run(*words, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def open_ports(self) -> set[int]:
        """All but sshd's."""
        rows = [line.split() for line in self.host.run("ss", "-Hltn").stdout.splitlines()]
        return {int(row[3].rpartition(":")[2]) for row in rows} - {22}

    def left(self) -> dict[str, Any]:
        """What of a cluster is on this host."""
        names = [name for name in _names(self.host) if name not in ("sshd", "sh")]
        return {
            "processes": names[self.before - 1 :],
            "shared memory": self.host.run("ls", "/dev/shm").stdout.split(),
            "ports": sorted(self.open_ports()),
            "files": sorted(path.name for path in (self.state / "aphro" / "cluster").iterdir()),
        }


NOTHING = {"processes": [], "shared memory": [], "ports": [], "files": ["logs"]}


def _names(host: NetnsHost) -> list[str]:
    found = []
    for pid in host.processes():
        try:
            found.append(Path(f"/proc/{pid}/comm").read_text().strip())
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Node]]:
    """node0 is the head; node1 and node2 are in; node3 is not."""
    folder = tmp_path_factory.mktemp("state")
    with hosts(4) as made:
        nodes = [Node(host, folder) for host in made]
        late = nodes[2].host.popen(
            *nodes[2].command("join", "--head", made[0].address), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        _up_in_a_terminal_that_closes(nodes[0])
        done = nodes[1].run(
            "join", "--head", f"{made[0].address}:{PORT}", "--devices", "2", "-e", "NCCL_SOCKET_IFNAME=eth0"
        )
        assert done.returncode == 0, done.stderr
        assert late.stdout is not None
        text = late.stdout.read()
        assert late.wait() == 0, text
        assert "waiting for the head" in text
        assert "Connection refused" in text
        yield nodes


def _up_in_a_terminal_that_closes(node: Node) -> None:
    """A shell on a terminal of its own runs `up`, then the terminal is gone, and with it the shell."""
    ours, theirs = pty.openpty()
    words = " ".join(node.command("up", "-e", "NCCL_DEBUG=INFO", "-e", "HF_TOKEN"))
    shell = node.host.popen(
        "bash", "-c", f"{words}; echo came back with $?; sleep 60",
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    text = ""
    while "came back with" not in text:
        text += os.read(ours, 4096).decode()
    assert f"aphro cluster join --head {node.host.address}" in text
    time.sleep(0.1)
    os.close(ours)
    assert shell.wait(5) == -signal.SIGHUP


def test_status_is_the_same_from_every_node(nodes: list[Node]) -> None:
    for node in (nodes[0], nodes[2]):
        status = node.ask("status", "--expect", "3")
        assert [(row["name"], row["address"], row["devices"], row["state"]) for row in status["nodes"]] == [
            ("node0", nodes[0].host.address, 1, "in"),
            *sorted([("node1", nodes[1].host.address, 2, "in"), ("node2", nodes[2].host.address, 1, "in")],
                    key=lambda row: [each["name"] for each in status["nodes"]].index(row[0])),
        ]  # fmt: skip
        assert all(row["free_bytes"] > 0 and row["versions"]["aphro"] for row in status["nodes"])
    short = nodes[1].run("status", "--expect", "4")
    assert short.returncode == ExitCode.CLUSTER
    assert "error: 3 of 4 expected nodes are in" in short.stderr
    assert "node2" in short.stdout


def test_up_again_says_so(nodes: list[Node]) -> None:
    done = nodes[0].run("up")
    assert done.returncode == 0
    assert "the cluster is up already" in done.stderr
    assert f"APHRO_CLUSTER_TOKEN={TOKEN} aphro cluster join --head {nodes[0].host.address}" in done.stdout
    done = nodes[1].run("up")
    assert done.returncode == ExitCode.CLUSTER
    assert f"error: this host is in the cluster of {nodes[0].host.address}:{PORT} already" in done.stderr


def test_the_environment_of_each_node_without_secrets(nodes: list[Node]) -> None:
    found = nodes[2].ask("env")
    assert [found[f"node{number}"]["NCCL_DEBUG"] for number in range(3)] == [{"value": "INFO", "source": "-e"}] * 3
    assert found["node1"]["NCCL_SOCKET_IFNAME"] == {"value": "eth0", "source": "-e"}
    assert "NCCL_SOCKET_IFNAME" not in found["node0"] | found["node2"]
    marks = {found[f"node{number}"]["HF_TOKEN"]["value"] for number in range(3)}
    assert len(marks) == 1
    assert marks.pop().startswith("*** (")
    text = nodes[0].run("env").stdout
    assert "* NCCL_SOCKET_IFNAME" in text
    assert SECRET not in text + json.dumps(found)


def test_no_secret_is_in_an_argument_list_or_a_log(nodes: list[Node]) -> None:
    for node in nodes[:3]:
        for pid in node.host.processes():
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            assert TOKEN.encode() not in words
            assert SECRET.encode() not in words
        for log in (node.state / "aphro" / "cluster" / "logs").iterdir():
            assert TOKEN not in log.read_text()
            assert SECRET not in log.read_text()


def test_every_port_is_of_the_list(nodes: list[Node]) -> None:
    found = nodes[1].ask("ports")
    listed = {number for port in found["ports"] for number in range(port["first"], port["last"] + 1)}
    for number in range(3):
        opened = nodes[number].open_ports()
        assert opened <= listed
        assert {each["port"] for each in found["listening"][f"node{number}"]} == opened
    assert f"{PORT}:{PORT + 119},32768:60999" in nodes[0].run("ports").stdout


def test_logs_of_all_nodes(nodes: list[Node]) -> None:
    text = nodes[2].run("logs").stdout
    assert all(f"[node{number}] " in text for number in range(3))
    missing = nodes[2].run("logs", "--rank", "7")
    assert missing.returncode == ExitCode.CLUSTER
    assert "has no log of rank 7" in missing.stderr
    (nodes[1].state / "aphro" / "cluster" / "logs" / "rank-7.log").write_text("a step\nanother\n")
    assert nodes[2].run("logs", "--rank", "7", "-n", "1").stdout == "[node1 rank 7] another\n"


def test_a_model_is_shown_as_long_as_it_is_served(nodes: list[Node]) -> None:
    code = (
        "from aphro_core.cluster.announce import announced\n"
        "from aphro_core.cluster.membership import read_membership\n"
        "from aphro_core.cluster.messages import Model\n"
        "here = read_membership()\n"
        "model = Model('tiny', 'http://x', 'node1', {0: here.node_address})\n"
        "with announced(here, model): print('on', flush=True); input()"
    )
    state = f"XDG_STATE_HOME={nodes[1].state}"
    python = [sys.executable, "-c", code]
    server = nodes[1].host.popen("env", state, *python, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout is not None
    assert server.stdout.readline() == "on\n"
    assert "model tiny at http://x, from node1: rank 0 on node1" in nodes[0].run("status").stdout
    (pid,) = map(int, Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split())
    os.kill(pid, signal.SIGKILL)
    server.wait()
    time.sleep(0.2)
    assert nodes[0].ask("status")["models"] == []


REFUSED = {
    "wrong token": (["--head", "{head}"], {"APHRO_CLUSTER_TOKEN": "f" * 64}, 10, "refuses the token"),
    "own address": (["--head", "{own}"], {}, 2, "--head {own} is this host's own address (eth0), not the head's"),
    "loopback": (["--head", "127.0.0.1"], {}, 2, "--head 127.0.0.1 is this host itself"),
    "another member": (["--head", "{member}"], {}, 10, "node1 ({member}) is not the head"),
    "no head": (
        ["--head", "{head}:23000", "--wait-timeout", "0"],
        {},
        10,
        "no head after 0 s: {head} port 23001",
    ),
    "wrong interface": (["--head", "{head}", "--interface", "storage0"], {}, 10, "cannot reach this host at 192.0.2.5"),
    "container bridge": (["--head", "{head}", "--interface", "docker0"], {}, 2, "docker0 is a container bridge"),
    "no such interface": (["--head", "{head}", "--interface", "eth9"], {}, 2, "--interface eth9 does not exist"),
    "wrong version": (["--head", "{head}"], {"PYTHONPATH": "{fake}"}, 10, "ray 1.2.3 here"),
}


@pytest.fixture(scope="module")
def stranger(nodes: list[Node], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """node3 with cards that lead nowhere, and a ray that says another version."""
    fake = tmp_path_factory.mktemp("fake") / "ray-1.2.3.dist-info"
    fake.mkdir()
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: ray\nVersion: 1.2.3\n")
    nodes[3].host.add_interface("storage0", "192.0.2.5/24")
    nodes[3].host.add_interface("docker0", "172.17.0.1/16")
    addresses = {"head": nodes[0].host.address, "member": nodes[1].host.address, "own": nodes[3].host.address}
    return addresses | {"fake": str(fake.parent)}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name_and_nothing_is_left(case: str, nodes: list[Node], stranger: dict[str, str]) -> None:
    words, env, code, message = REFUSED[case]
    filled = [word.format(**stranger) for word in words]
    done = nodes[3].run("join", *filled, **{name: value.format(**stranger) for name, value in env.items()})
    assert done.returncode == code, done.stderr
    assert message.format(**stranger) in done.stderr
    hint = done.stderr.splitlines()[-1]
    assert hint.startswith("try: ")
    if case == "wrong interface":
        assert "--interface eth0" in hint
    if case == "wrong version":
        assert "pip install ray==" in hint
    if (nodes[3].state / "aphro").exists():
        assert nodes[3].left() == NOTHING


def test_a_closed_port_is_named_with_the_line_that_opens_it(nodes: list[Node], stranger: dict[str, str]) -> None:
    nodes[3].host.drop(f"tcp dport {PORT + 1}")
    try:
        done = nodes[3].run("join", "--head", stranger["head"])
    finally:
        nodes[3].host.clear()
    assert done.returncode == ExitCode.CLUSTER
    assert (
        f"the head node0 cannot reach this host at {stranger['own']} (eth0), port {PORT + 1}: no answer" in done.stderr
    )
    assert f"try: on this host: sudo ufw allow proto tcp from {stranger['head']} to any port {PORT}:" in done.stderr


def test_interrupted_while_it_joins_leaves_nothing(nodes: list[Node]) -> None:
    process = nodes[3].host.popen(*nodes[3].command("join", "--head", nodes[0].host.address), stderr=subprocess.PIPE)
    assert process.stderr is not None
    while "starting Ray" not in process.stderr.readline():
        pass
    time.sleep(1)
    for pid in nodes[3].host.processes():
        if b"aphro_cli.main" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGINT)
    assert process.wait(20) == ExitCode.INTERRUPTED
    assert nodes[3].left() == NOTHING


def test_ray_itself_lets_no_stranger_in(nodes: list[Node]) -> None:
    code = (
        "import sys; from ray._raylet import GcsClient\n"
        f"print(GcsClient(address='{nodes[0].host.address}:{PORT}').get_all_node_info())"
    )
    for mode in ("disabled", "token"):
        variables = [f"RAY_AUTH_MODE={mode}", "RAY_AUTH_TOKEN=" + "0" * 64]
        done = nodes[3].host.run("env", *variables, sys.executable, "-c", code, check=False, timeout=30)
        assert done.returncode != 0
        assert "uthenticat" in done.stderr or "token" in done.stderr.lower(), done.stderr


def test_a_node_whose_ray_dies_leaves_and_says_why(nodes: list[Node]) -> None:
    (raylet,) = [pid for pid in nodes[2].host.processes() if Path(f"/proc/{pid}/comm").read_text() == "raylet\n"]
    os.kill(raylet, signal.SIGKILL)
    deadline = time.monotonic() + 15
    while not (left := nodes[0].ask("status")["left"]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [(each["name"], each["reason"]) for each in left] == [("node2", "raylet ended: SIGKILL")]
    deadline = time.monotonic() + 5
    while nodes[2].left() != NOTHING and time.monotonic() < deadline:
        time.sleep(0.1)
    assert nodes[2].left() == NOTHING
    assert nodes[2].run("status").returncode == ExitCode.CLUSTER


def test_a_member_that_was_killed_is_cleaned_up_after(nodes: list[Node]) -> None:
    (member,) = [pid for pid in nodes[1].host.processes() if Path(f"/proc/{pid}/comm").read_text() == "aphro-member\n"]
    os.kill(member, signal.SIGKILL)
    assert "raylet" in _names(nodes[1].host)
    told = nodes[1].run("status")
    assert told.returncode == ExitCode.CLUSTER
    assert "this host's member was killed" in told.stderr
    done = nodes[1].run("down")
    assert done.returncode == 0, done.stderr
    assert nodes[1].left() == NOTHING
    done = nodes[1].run("join", "--head", nodes[0].host.address)  # at once
    assert done.returncode == 0, done.stderr


def test_down_on_the_head_ends_every_node(nodes: list[Node]) -> None:
    folders = [Path(json.loads((node.state / "aphro/cluster/member.json").read_text())["temp_dir"]) for node in
               (nodes[0], nodes[1])]  # fmt: skip
    assert all(folder.is_dir() and folder.stat().st_mode & 0o777 == 0o700 for folder in folders)
    start = time.monotonic()
    done = nodes[0].run("down")
    assert time.monotonic() - start < 20
    assert done.returncode == 0, done.stderr
    assert [nodes[number].left() for number in (0, 1)] == [NOTHING, NOTHING]
    assert not any(folder.exists() for folder in folders)
    again = nodes[0].run("down")
    assert again.returncode == ExitCode.CLUSTER
    assert "error: this host is in no cluster" in again.stderr


def test_over_ipv6_and_logs_follow_who_joins_later(nodes: list[Node]) -> None:
    """The last test of this file: it needs a head of its own."""
    for number in (0, 1):
        nodes[number].run("down")
        given = ["ip", "-6", "address", "add", f"fd00::{number + 1}/64", "dev", "eth0", "nodad"]
        if nodes[number].host.run(*given, check=False).returncode:
            pytest.skip("no IPv6 here")
    done = nodes[0].run("up", "--advertise", "fd00::1", "--devices", "0")
    assert done.returncode == 0, done.stderr
    assert "aphro cluster join --head fd00::1\n" in done.stdout
    logs = nodes[0].host.popen(*nodes[0].command("logs", "-f"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert logs.stdout is not None
    assert "[node0] " in logs.stdout.readline()
    done = nodes[1].run("join", "--head", f"[fd00::1]:{PORT}")
    assert done.returncode == 0, done.stderr
    assert [row["address"] for row in nodes[1].ask("status", "--expect", "2")["nodes"]] == ["fd00::1", "fd00::2"]
    while not (line := logs.stdout.readline()).startswith("[node1] "):
        assert line
    done = nodes[0].run("down")
    assert done.returncode == 0, done.stderr
    assert "node1 (fd00::2) is gone" in logs.stdout.read()
    assert logs.wait(30) == ExitCode.CLUSTER
    assert [nodes[number].left() for number in (0, 1)] == [NOTHING, NOTHING]
