"""Faults of hosts and of the network between them: ranks over ssh on hosts made of namespaces, traffic from a third."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.e2e.server_process import is_running
from tests.faults.case import Case, Outcome
from tests.faults.cases_recovery import judge_load
from tests.faults.lab import HOOKS, FaultyServer, Lab, Probe, complete
from tests.faults.load import Load, bodies, prompt_of, run_load
from tests.netns.hosts import NetnsHost, driver_link_down, hosts

_LEASE_SECONDS = 15.0


@contextmanager
def serving(lab: Lab, num_hosts: int, *arguments: str) -> Iterator[tuple[FaultyServer, list[NetnsHost]]]:
    """Two ranks on the first two of ``num_hosts`` hosts; the others are to spare."""
    with hosts(num_hosts) as nodes:
        where = ",".join(f"{node.name}:1" for node in nodes)
        with lab.server("--hosts", where, *(arguments or ("-tp", "2"))) as server:
            yield server, nodes


def ranks_on(node: NetnsHost) -> list[int]:
    return [pid for pid in node.processes() if b"aphro_core" in _command_line(pid)]


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def seconds_until_gone(pids: list[int], since: float, limit: float) -> float:
    while any(map(is_running, pids)) and time.monotonic() - since < limit:
        time.sleep(0.02)
    return time.monotonic() - since


def on_a_spare(lab: Lab, what: str) -> Outcome:
    """The second of three hosts goes while requests stream; the third takes its rank."""
    outcome = Outcome()
    with serving(lab, 3) as (server, nodes):
        asked = bodies(8, 120)
        expected = run_load(server.url, asked)
        stale = ranks_on(nodes[1])
        outcome.check("a rank on the second host, none on the third", len(stale) == 1 and not ranks_on(nodes[2]))
        with Load(server.url, asked) as load:
            load.wait_tokens(20)
            hit = time.monotonic()
            nodes[1].link_down() if what == "cut" else nodes[1].kill()
        judge_load(load, expected, outcome, pause=20.0)
        outcome.check("the third host has it", len(ranks_on(nodes[2])) == 1)
        if what == "cut":
            nodes[1].link_up()  # it comes back into a group that has gone on without it
        outcome.at_most("stale rank gone", seconds_until_gone(stale, hit, 30.0), _LEASE_SECONDS + 2.0)
        again = run_load(server.url, asked)
        outcome.check("equal afterwards", again == expected)
        outcome.figures["restarts"] = f"{server.metric('engine_recoveries_total'):g}"
        outcome.check("one restart", server.metric("engine_recoveries_total") == 1)
    return outcome


def without_a_spare(lab: Lab, what: str) -> Outcome:
    outcome = Outcome()
    with serving(lab, 2) as (server, nodes):
        with Load(server.url, bodies(4, 900)) as load:
            load.wait_tokens(5)
            ranks = [pid for node in nodes for pid in ranks_on(node)]
            hit = time.monotonic()
            nodes[1].link_down() if what == "cut" else nodes[1].kill()
        outcome.at_most("error after", time.monotonic() - hit, 30.0)
        outcome.check("all have an error", all(answer.error is not None for answer in load.answers))
        outcome.check("exit code 8", server.process.wait(10) == 8)
        log = server.log.read_text().splitlines()
        outcome.check("the host is named", "node1" in next(line for line in log[::-1] if line.startswith("error:")))
        outcome.check("the last line says what to try", log[-1].startswith("try:"))
        outcome.at_most("ranks gone", seconds_until_gone(ranks, hit, 40.0), 30.0)
        server.wait_all_gone(3)
    return outcome


def head_lost(lab: Lab) -> Outcome:
    """Its processes killed; then its cable cut, so that nothing tells the ranks but the end of their lease."""
    outcome = Outcome()
    with serving(lab, 2) as (server, nodes):
        ranks = [pid for node in nodes for pid in ranks_on(node)]
        hit = time.monotonic()
        for pid in server.all_processes():
            os.kill(pid, signal.SIGKILL)
        outcome.at_most("ranks gone after SIGKILL of all", seconds_until_gone(ranks, hit, 10.0), 3.0)
    with serving(lab, 2) as (server, nodes), Load(server.url, bodies(2, 900)) as load:
        load.wait_tokens(5)
        ranks = [pid for node in nodes for pid in ranks_on(node)]
        driver_link_down(nodes[0])
        hit = time.monotonic()
        outcome.at_most("ranks gone after a cut cable", seconds_until_gone(ranks, hit, 30.0), _LEASE_SECONDS + 2.0)
        outcome.check("there were two", len(ranks) == 2)
    return outcome


def flapping(lab: Lab) -> Outcome:
    outcome = Outcome()
    with serving(lab, 3, "-pp", "2") as (server, nodes):
        asked = bodies(4, 900)
        expected = run_load(server.url, asked)
        with Load(server.url, asked) as load:
            load.wait_tokens(5)
            for _ in range(4):
                nodes[1].link_down()
                time.sleep(2.0)
                nodes[1].link_up()
                time.sleep(1.5)
        equal = sum(answer.token_ids == tokens for answer, tokens in zip(load.answers, expected, strict=True))
        outcome.figures["token-equal"] = f"{equal}/{len(asked)}"
        outcome.check("all token-equal", equal == len(asked))
        outcome.figures["longest pause"] = f"{max(answer.longest_pause for answer in load.answers):.2f} s"
        outcome.figures["restarts"] = f"{server.metric('engine_recoveries_total'):g}"
        outcome.check("no restart", server.metric("engine_recoveries_total") == 0)
    return outcome


def killed_rank(lab: Lab) -> Outcome:
    """A rank, not a host: it is started again where it was, spare or not."""
    outcome = Outcome()
    with serving(lab, 3) as (server, nodes):
        asked = bodies(8, 120)
        expected = run_load(server.url, asked)
        with Load(server.url, asked) as load:
            load.wait_tokens(20)
            os.kill(ranks_on(nodes[1])[0], signal.SIGKILL)
        judge_load(load, expected, outcome, pause=8.0)
        outcome.check("on the same host", len(ranks_on(nodes[1])) == 1 and not ranks_on(nodes[2]))
        outcome.check("served", complete(server.url, prompt_of(1)).status_code == 200)
    return outcome


@contextmanager
def stepping_clock(folder: Path) -> Iterator[Path]:
    """What starts in the block has a wall clock that steps by the seconds in the file that this yields."""
    library, offset = folder / "clock.so", folder / "offset"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, HOOKS / "clock.c", "-ldl"], check=True)
    offset.write_text("0")
    added = {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(offset)}
    os.environ.update(added)
    try:
        yield offset
    finally:
        for name in added:
            del os.environ[name]


def clock_steps(lab: Lab) -> Outcome:
    outcome = Outcome()
    with stepping_clock(lab.folder) as offset, lab.server("-tp", "2") as server, Probe(server.url) as probe:
        seen = ["python3", "-c", "import time; print(time.time())"]
        asked = bodies(8, 300)
        expected = run_load(server.url, asked)
        with Load(server.url, asked) as load:
            load.wait_tokens(10)
            for seconds in (86_400, -86_400, 0):
                offset.write_text(str(seconds))
                found = float(subprocess.run(seen, capture_output=True, text=True, check=True).stdout)
                outcome.check("the clock stepped", abs(found - time.time() - seconds) < 60)
                time.sleep(1.0)
        judge_load(load, expected, outcome, pause=2.0)
        outcome.check("no restart", server.metric("engine_recoveries_total") == 0)
        outcome.check("ready all the time", {status for _, status, _ in probe.history} == {200})
    return outcome


CASES = [
    Case("P-01h", "SIGKILL of a rank on another host (ssh)", killed_rank),
    Case("P-53", "a host cut off, a spare in `--hosts` (ssh)", lambda lab: on_a_spare(lab, "cut"), is_fast=True),
    Case("P-53b", "a host cut off, no spare (ssh)", lambda lab: without_a_spare(lab, "cut")),
    Case("P-54", "a host dead, a spare in `--hosts` (ssh)", lambda lab: on_a_spare(lab, "dead")),
    Case("P-54b", "a host dead, no spare (ssh)", lambda lab: without_a_spare(lab, "dead")),
    Case("P-55", "the head lost: killed; cut off (ssh)", head_lost),
    Case("P-57", "the wall clock steps by a day, forth and back", clock_steps),
    Case("P-56", "a link down for 2 s, four times (ssh)", flapping),
]
