"""Faults of a cluster's edge: who may not join, what does not match, and what a stranger on the network reaches."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.faults.case import Case, Outcome
from tests.faults.lab import SMALL, Lab
from tests.netns.hosts import hosts
from tests.netns.test_cluster import PORT, Node

_STATUS: Final = """
import json, sys, time, urllib.request
found = {}
for address in sys.argv[1:]:
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=2) as answer:
            found[address] = answer.status
    except Exception as error:
        found[address] = getattr(error, "code", None)
print(json.dumps(found))
"""
_NOISE: Final = """
import os, socket, sys
for address in sys.argv[1:]:
    host, _, port = address.rpartition(":")
    for noise in (os.urandom(4096), b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n" + os.urandom(512), b"\\0" * 65536):
        try:
            with socket.create_connection((host, int(port)), timeout=2) as sock:
                sock.settimeout(0.2)
                sock.sendall(noise)
                sock.recv(4096)
        except OSError:
            pass
"""
_ASK_RAY: Final = """
import sys
from ray._raylet import GcsClient
print("nodes", len(GcsClient(address=sys.argv[1]).get_all_node_info()))
"""
_KEY: Final = "k" * 20
_COMPLETE: Final = f"""
from urllib.request import Request, urlopen
body = b'{{"prompt": [5, 6, 7], "max_tokens": 8}}'
headers = {{"Authorization": "Bearer {_KEY}", "Content-Type": "application/json"}}
print(urlopen(Request("http://127.0.0.1:8000/v1/completions", body, headers)).status)
"""
# how long the head takes to refuse, apart from the start of a command
_ASK_HEAD: Final = """
import sys, time
from aphro_core.cluster.messages import Reach
from aphro_core.cluster.wire import WrongTokenError, ask
began = time.monotonic()
try:
    print("let in:", ask(sys.argv[1], int(sys.argv[2]), sys.argv[3], Reach("127.0.0.1", 1)))
except WrongTokenError:
    print("refused after", time.monotonic() - began)
"""


@contextmanager
def cluster(lab: Lab, num_nodes: int = 1) -> Iterator[list[Node]]:
    """node0 is the head of so many; the last one that is yielded is a stranger on the same network."""
    with hosts(num_nodes + 1) as made:
        folder = lab.folder / f"cluster{len(list(lab.folder.iterdir()))}"
        nodes = [Node(host, folder) for host in made]
        for node in nodes[:-1]:
            words = ["up"] if node is nodes[0] else ["join", "--head", made[0].address]
            for is_last in (False, True):  # Ray gives itself half a minute, on busy cores too
                done = node.run(*words)
                if done.returncode == 0:
                    break
                assert not is_last, done.stderr
        try:
            yield nodes
        finally:
            for node in nodes[-2::-1]:
                node.run("down")


def p50(lab: Lab) -> Outcome:
    """Without a token, with a wrong one, and hostile bytes where it would be proved."""
    outcome = Outcome()
    with cluster(lab) as nodes:
        head, stranger = nodes[0].host.address, nodes[-1]
        for name, token in (("no token", ""), ("a wrong token", "f" * 64)):
            done = stranger.run("join", "--head", head, "--wait-timeout", "0", APHRO_CLUSTER_TOKEN=token)
            outcome.check(f"{name}: not in, and told why", done.returncode != 0 and "token" in done.stderr)
        for token in ("f" * 64, "0", ""):
            asked = [sys.executable, "-c", _ASK_HEAD, head, str(PORT + 1), token]
            answer = stranger.host.run(*asked, check=False, timeout=60).stdout
            seconds = re.fullmatch(r"refused after ([\d.]+)\n", answer)
            outcome.check(f"the head refuses, not: {answer!r}", seconds is not None)
            outcome.at_most("refused", float(seconds[1]) if seconds else 99.0, 1.0)
        stranger.host.run(sys.executable, "-c", _NOISE, f"{head}:{PORT + 1}", timeout=60)
        status = nodes[0].ask("status", "--expect", "1")
        outcome.check("one node, as before", [row["state"] for row in status["nodes"]] == ["in"])
        outcome.figures["nodes afterwards"] = str(len(status["nodes"]))
    return outcome


def p52(lab: Lab) -> Outcome:
    """A host with another Ray, one with another aphro: both values are told, and what to do."""
    outcome = Outcome()
    with cluster(lab) as nodes:
        head, stranger = nodes[0].host.address, nodes[-1]
        for name in ("ray", "aphro"):
            fake = lab.folder / f"fake-{name}" / f"{name}-1.2.3.dist-info"
            fake.mkdir(parents=True, exist_ok=True)
            (fake / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2.3\n")
            done = stranger.run("join", "--head", head, PYTHONPATH=str(fake.parent))
            outcome.check(f"another {name} is refused", done.returncode != 0)
            line = next((line for line in done.stderr.splitlines() if line.startswith("error: ")), done.stderr[-300:])
            outcome.check(f"both values are in: {line}", len(re.findall(r"\b\d+\.\d+[\w.]*", line)) >= 2)
            outcome.check("1.2.3 is one of them", "1.2.3" in line)
            outcome.check("and what to do", done.stderr.splitlines()[-1].startswith("try: "))
        outcome.check("one node, as before", len(nodes[0].ask("status", "--expect", "1")["nodes"]) == 1)
    return outcome


def p58(lab: Lab) -> Outcome:
    """A model is served by ranks on two nodes; a stranger tries every port that any process of the two listens on."""
    outcome = Outcome()
    with cluster(lab, num_nodes=2) as nodes:
        ready, log = lab.folder / "ray.json", (lab.folder / "ray.log").open("wb")
        words = ["run", str(lab.model), "--device", "cpu", *SMALL, "-tp", "2", "--host", "0.0.0.0"]
        words += ["--port", "8000", "--api-key", _KEY, "--json-ready", str(ready)]
        state = f"XDG_STATE_HOME={nodes[0].state}"
        server = nodes[0].host.popen(
            "env", state, "OMP_NUM_THREADS=1", sys.executable, "-m", "aphro_cli.main", *words, stdout=log, stderr=log
        )
        try:
            _wait(ready, server)
            targets = [f"{node.host.address}:{port}" for node in nodes[:2] for port in sorted(node.open_ports())]
            outcome.figures["ports tried"] = str(len(targets))
            outcome.check("ranks on both nodes", all(_has_rank(node) for node in nodes[:2]))
            stranger = nodes[2].host
            found = stranger.run(sys.executable, "-c", _STATUS, *targets, timeout=200).stdout
            answering = re.findall(r'"([\d.:]+)": 200', found)
            outcome.figures["that answer a stranger"] = str(len(answering))
            outcome.check(f"none answers but the API, which wants its key: {found}", not answering)
            stranger.run(sys.executable, "-c", _NOISE, *targets, timeout=200)
            for mode in ("disabled", "token"):
                variables = [f"RAY_AUTH_MODE={mode}", "RAY_AUTH_TOKEN=" + "0" * 64]
                python = [sys.executable, "-c", _ASK_RAY, f"{nodes[0].host.address}:{PORT}"]
                done = stranger.run("env", *variables, *python, check=False, timeout=60)
                outcome.check(f"Ray tells nothing ({mode})", "nodes" not in done.stdout)
            served = nodes[0].host.run(sys.executable, "-c", _COMPLETE, check=False, timeout=60)
            outcome.check("it serves as before", served.stdout == "200\n")
            outcome.check("no restart", "recover" not in (lab.folder / "ray.log").read_text().lower())
        finally:
            server.kill()
            server.wait()
            log.close()
    return outcome


def _wait(ready: Path, server: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not ready.exists():
        assert server.poll() is None, (ready.parent / "ray.log").read_text()[-2000:]
        assert time.monotonic() < deadline, (ready.parent / "ray.log").read_text()[-2000:]
        time.sleep(0.1)


def _has_rank(node: Node) -> bool:
    for pid in node.host.processes():
        try:
            if b"aphro_core.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return True
        except OSError:
            continue
    return False


CASES = [
    Case("P-50", "joining without a token, with a wrong one, with hostile bytes", p50),
    Case("P-52", "joining with another version of Ray, of aphro", p52),
    Case("P-58", "a model served in a Ray cluster, every port tried by a stranger", p58),
]
