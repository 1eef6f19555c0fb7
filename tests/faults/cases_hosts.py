"""Faults of hosts and of the network between them: ranks over ssh on hosts made of namespaces, traffic from a third."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.e2e.server_process import is_running
from tests.faults.case import Case, Outcome
from tests.faults.cases_recovery import judge_load
from tests.faults.lab import HOOKS, SMALL, FaultyServer, Lab, Probe, complete
from tests.faults.load import Load, bodies, prompt_of, run_load
from tests.netns.hosts import NetnsHost, driver_link_down, hosts

_LEASE_SECONDS = 15.0
_BACK_SECONDS = 10.0  # later than it is given up, earlier than its lease ends


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


class GoneWatch:
    """When the last of these processes has ended, seen while other things go on."""

    def __init__(self, pids: list[int], limit: float = 40.0) -> None:
        self._pids, self._deadline, self._gone_at = pids, time.monotonic() + limit, float("inf")
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while any(map(is_running, self._pids)):
            if time.monotonic() > self._deadline:
                return
            time.sleep(0.02)
        self._gone_at = time.monotonic()

    def seconds_after(self, moment: float) -> float:
        self._thread.join()
        return self._gone_at - moment


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
            hit, watch = time.monotonic(), GoneWatch(stale)
            if what == "cut":
                nodes[1].link_down()
                back = threading.Timer(_BACK_SECONDS, nodes[1].link_up)  # into a group that goes on without it
                back.start()
            else:
                nodes[1].kill()
        judge_load(load, expected, outcome, pause=20.0)
        outcome.check("the third host has it", len(ranks_on(nodes[2])) == 1)
        if what == "cut":
            back.join()
        outcome.at_most("stale rank gone", watch.seconds_after(hit), _LEASE_SECONDS + 2.0)
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
            hit, watch = time.monotonic(), GoneWatch(ranks)
            nodes[1].link_down() if what == "cut" else nodes[1].kill()
        outcome.at_most("error after", time.monotonic() - hit, 30.0)
        outcome.check("all have an error", all(answer.error is not None for answer in load.answers))
        outcome.check("exit code 8", server.process.wait(10) == 8)
        log = server.log.read_text().splitlines()
        outcome.check("the host is named", "node1" in next(line for line in log[::-1] if line.startswith("error:")))
        outcome.check("the last line says what to try", log[-1].startswith("try:"))
        outcome.at_most("ranks gone", watch.seconds_after(hit), 30.0)
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
        outcome.at_most("ranks gone after SIGKILL of all", GoneWatch(ranks).seconds_after(hit), 3.0)
    with serving(lab, 2) as (server, nodes), Load(server.url, bodies(2, 900)) as load:
        load.wait_tokens(5)
        ranks = [pid for node in nodes for pid in ranks_on(node)]
        driver_link_down(nodes[0])
        hit = time.monotonic()
        outcome.at_most("ranks gone after a cut cable", GoneWatch(ranks).seconds_after(hit), _LEASE_SECONDS + 2.0)
        outcome.check("there were two", len(ranks) == 2)
    return outcome


def flapping(lab: Lab) -> Outcome:
    outcome = Outcome()
    with serving(lab, 3, "-pp", "2") as (server, nodes):
        asked = bodies(4, 600)
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
        judge_load(load, expected, outcome, pause=15.0)
        outcome.check("on the same host", len(ranks_on(nodes[1])) == 1 and not ranks_on(nodes[2]))
        outcome.check("served", complete(server.url, prompt_of(1)).status_code == 200)
    return outcome


def failing_start(lab: Lab, arrange: Callable[[list[NetnsHost]], None], words: str, limit: float) -> Outcome:
    """A start on two hosts that cannot succeed, once ``arrange`` has been there: how it ends, and with which words."""
    outcome = Outcome()
    with hosts(2) as nodes:
        log = lab.folder / "failing.log"
        process = lab.start([*SMALL, "-tp", "2", "--hosts", "node0:1,node1:1"], log, lab.folder / "never.json")
        arrange(nodes)
        arranged = time.monotonic()
        code = process.wait(90)
        outcome.at_most("exit", time.monotonic() - arranged, limit)
        error, hint = log.read_text().splitlines()[-2:]
        outcome.check("exit code 4 or 7", code in (4, 7))
        outcome.check(
            "host, rank and cause are in the line before the last", re.match(f"error: {words}", error) is not None
        )
        outcome.check("the last line says what to try", hint.startswith("try: "))
        ranks = [pid for node in nodes for pid in ranks_on(node)]
        for pid in ranks:
            os.kill(pid, signal.SIGCONT)
        outcome.at_most("ranks gone", GoneWatch(ranks).seconds_after(time.monotonic()), _LEASE_SECONDS + 2.0)
    return outcome


def stop_the_second(nodes: list[NetnsHost]) -> None:
    while not (ranks := [pid for pid in ranks_on(nodes[1]) if b"remote_entry" in _command_line(pid)]):
        time.sleep(0.01)
    os.kill(ranks[0], signal.SIGSTOP)


def never_comes(lab: Lab) -> Outcome:
    return failing_start(
        lab, stop_the_second, r"rank 1 did not come to meet the others within \d+ s \(on node1\)", 45.0
    )


def blocked_ports(lab: Lab) -> Outcome:
    words = r"rank \d on node\d \(pid \d+\): node\d does not reach node\d at [\d.]+ port \d+ \(eth0\)"
    return failing_start(lab, lambda nodes: nodes[1].drop("tcp dport != 22"), words, 25.0)


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
    Case("P-18h", "ports between two hosts blocked at a start (ssh)", blocked_ports),
    Case("P-19h", "a rank stopped while it starts on another host (ssh)", never_comes),
    Case("P-53", "a host cut off for 10 s, a spare in `--hosts` (ssh)", lambda lab: on_a_spare(lab, "cut")),
    Case("P-53b", "a host cut off, no spare (ssh)", lambda lab: without_a_spare(lab, "cut")),
    Case("P-54", "a host dead, a spare in `--hosts` (ssh)", lambda lab: on_a_spare(lab, "dead")),
    Case("P-54b", "a host dead, no spare (ssh)", lambda lab: without_a_spare(lab, "dead")),
    Case("P-55", "the head lost: killed; cut off (ssh)", head_lost),
    Case("P-57", "the wall clock steps by a day, forth and back", clock_steps),
    Case("P-56", "a link down for 2 s, four times (ssh)", flapping),
]
