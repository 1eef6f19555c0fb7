"""Starts, stops and deaths of whole servers: nothing is left, and health tells the truth meanwhile."""

from __future__ import annotations

import os
import signal
import socket
import statistics
import time

import httpx

from tests.e2e.server_process import descendants_of, is_running
from tests.faults.case import Case, Outcome
from tests.faults.lab import SMALL, FaultyServer, Lab, Probe, complete
from tests.faults.load import Load, bodies, prompt_of, run_load


def lose_api(lab: Lab, number: signal.Signals, seconds: float) -> Outcome:
    """The API process is killed or stopped: its requests are cancelled, its engine serves the next one."""
    outcome = Outcome()
    with lab.server("-tp", "2") as server:
        expected = complete(server.url, prompt_of(1), return_token_ids=True).json()["choices"][0]["token_ids"]
        with Load(server.url, bodies(4, 900)) as load:
            load.wait_tokens(5)
            engine = server.pid_of("aphro-engine")
            hit = server.kill("aphro-api", number)
            answer = complete(server.url, prompt_of(1), return_token_ids=True)
            outcome.at_most("served again", time.monotonic() - hit, seconds)
            while server.metric("num_requests_running") or server.metric("kv_cache_usage_perc"):
                time.sleep(0.005)
            outcome.at_most("orphans cancelled", time.monotonic() - hit, seconds)
        outcome.check("the same tokens", answer.json()["choices"][0]["token_ids"] == expected)
        outcome.check("by the same engine", server.pid_of("aphro-engine") == engine)
        outcome.check("its clients know", all(answer.error is not None for answer in load.answers))
    return outcome


def p04(lab: Lab) -> Outcome:
    return lose_api(lab, signal.SIGKILL, 1.0)


def api_and_engine(lab: Lab) -> Outcome:
    """The API process is killed when its engine, or a rank, is stopped or dead: the next one does not wait for it."""
    outcome = Outcome()
    victims = [("aphro-engine", signal.SIGSTOP), ("aphro-rank-1", signal.SIGSTOP), ("aphro-rank-0", signal.SIGKILL)]
    with lab.server("-tp", "2", "--step-timeout", "3", "--max-recoveries", "9") as server:
        for name, number in victims:
            with Load(server.url, bodies(4, 900)) as load:
                load.wait_tokens(5)
                server.kill(name, number)
                hit = server.kill("aphro-api")
                outcome.check("200", complete(server.url, prompt_of(1)).status_code == 200)
                outcome.at_most("served again", time.monotonic() - hit, 3.0 + 8.0)
    return outcome


def hung_api(lab: Lab) -> Outcome:
    return lose_api(lab, signal.SIGSTOP, 3.0)


def p05(lab: Lab) -> Outcome:
    outcome = Outcome()
    with lab.server("-tp", "2") as server, Load(server.url, bodies(4, 900)) as load:
        load.wait_tokens(5)
        started = server.all_processes()
        os.kill(server.process.pid, signal.SIGKILL)
        outcome.at_most("all gone", _wait_gone(server, started, 6.0), 3.0)
        outcome.check("the port is free", server.port_is_free())
        port = server.url.rsplit(":", 1)[1]
        with lab.server("-tp", "2", "--port", port) as again:
            outcome.check("the same command serves again", complete(again.url, prompt_of(1)).status_code == 200)
    return outcome


def _wait_gone(server: FaultyServer, pids: list[int], seconds: float) -> float:
    began = time.monotonic()
    while any(is_running(pid) for pid in pids) and time.monotonic() - began < seconds:
        server.process.poll()
        time.sleep(0.005)
    return time.monotonic() - began


def p13(lab: Lab) -> Outcome:
    outcome = Outcome()
    with lab.server("-tp", "2") as server:
        asked = bodies(8, 150)
        expected = run_load(server.url, asked)
        with Load(server.url, asked) as load:
            load.wait_tokens(10)
            server.process.send_signal(signal.SIGTERM)
        outcome.check("all token-equal", [answer.token_ids for answer in load.answers] == expected)
        outcome.check("exit code 0", server.process.wait(10) == 0)
        server.wait_all_gone(3)
    return outcome


def p14(lab: Lab) -> Outcome:
    """The drain deadline is 1 s; one client never reads, the other sees its error."""
    outcome = Outcome()
    with lab.server("--drain-seconds", "1") as server:
        silent = open_stream_without_reading(server)
        with Load(server.url, bodies(1, 1000)) as load:
            load.wait_tokens(5)
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(20)
            outcome.at_most("exit", time.monotonic() - began, 3.0)
        silent.close()
        (answer,) = load.answers
        outcome.check("an error event, or the whole answer", answer.error is not None or answer.is_done)
        server.wait_all_gone(3)
    return outcome


def open_stream_without_reading(server: FaultyServer, num_choices: int = 16) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.connect(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
    body = b'{"prompt":[5,6,7],"max_tokens":1000,"n":%d,"stream":true,"ignore_eos":true,"logprobs":5}' % num_choices
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    sock.sendall(head % len(body) + body)
    return sock


def p15(lab: Lab) -> Outcome:
    outcome = Outcome()
    with lab.server("-tp", "2") as server, Load(server.url, bodies(4, 1000)) as load:
        load.wait_tokens(5)
        started = server.all_processes()
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        outcome.at_most("all gone after the second signal", _wait_gone(server, started, 6.0), 2.0)
    return outcome


def p16(lab: Lab) -> Outcome:
    """SIGTERM at many moments of a start, and while an engine is replaced."""
    outcome = Outcome()
    for delay in (0.3, 0.8, 1.4, 1.8, 2.2):
        log = lab.folder / "term.log"
        process = lab.start([*SMALL, "-tp", "2"], log, lab.folder / f"never{delay}.json")
        time.sleep(delay)
        started = [process.pid, *descendants_of(process.pid)]
        process.terminate()
        began = time.monotonic()
        while any(is_running(pid) for pid in started) and time.monotonic() - began < 10:
            process.poll()
            time.sleep(0.005)
        outcome.at_most("gone during a start", time.monotonic() - began, 3.0)
    with lab.server("-tp", "2") as server:
        server.kill("aphro-engine")
        started = server.all_processes()
        server.process.terminate()
        outcome.at_most("gone during a recovery", _wait_gone(server, started, 8.0), 3.0)
    return outcome


def p17(lab: Lab) -> Outcome:
    outcome = Outcome()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    num_served, times = 0, []
    shared_before = len(os.listdir("/dev/shm"))
    for index in range(50):
        began = time.monotonic()
        with lab.server("--port", port) as server:
            times.append(time.monotonic() - began)
            num_served += complete(server.url, prompt_of(index), 2).status_code == 200
            server.process.send_signal(signal.SIGKILL if index % 2 else signal.SIGTERM)
            server.wait_all_gone(3)
    outcome.figures["served"] = f"{num_served}/50"
    outcome.figures["start"] = f"{statistics.median(times):.2f} s (median), {max(times):.2f} s (longest)"
    outcome.check("all 50 served", num_served == 50)
    outcome.check("nothing grows in /dev/shm", len(os.listdir("/dev/shm")) <= shared_before)
    return outcome


def _failing_start(lab: Lab, fault: str, *arguments: str) -> tuple[float, int, str]:
    """(seconds to the end, exit code, log)."""
    log = lab.folder / "failing.log"
    began = time.monotonic()
    process = lab.start([*SMALL, "-tp", "2", *arguments], log, lab.folder / "failing.json", faults=f"load={fault}")
    code = process.wait(60)
    return time.monotonic() - began, code, log.read_text()


def p18(lab: Lab) -> Outcome:
    outcome = Outcome()
    seconds, code, log = _failing_start(lab, "1:memory")
    outcome.at_most("exit", seconds, 10.0)
    outcome.check("exit code 7", code == 7)
    outcome.check("rank, host and cause are named", f"rank 1 on {socket.gethostname()}" in log and "allocator" in log)
    return outcome


def p19(lab: Lab) -> Outcome:
    outcome = Outcome()
    began = time.monotonic()
    with lab.server("-tp", "2"):
        ordinary = time.monotonic() - began  # most of it before the first worker: Python, torch
    seconds, code, log = _failing_start(lab, "1:hang", "--start-timeout", "4")
    outcome.at_most("exit, less an ordinary start", seconds - ordinary, 4.0 + 2.0)
    outcome.check("exit code 7", code == 7)
    outcome.check("the rank is named", "rank 0, 1 did not load" in log or "rank 1 did not load" in log)
    return outcome


def p20(lab: Lab) -> Outcome:
    outcome = Outcome()
    for victim, number in (("aphro-engine", signal.SIGKILL), ("aphro-engine", signal.SIGSTOP)):
        with lab.server("--step-timeout", "3", "--max-recoveries", "9") as server, Probe(server.url) as probe:
            time.sleep(0.5)
            hit = server.kill(victim, number)
            time.sleep(5.5)
            outcome.at_most(f"503 after {number.name}", probe.first(503, hit), 2.0)
            outcome.check("ready again", probe.history[-1][1] == 200)
            outcome.at_most("slowest answer", probe.slowest(), 0.2)
            outcome.check("/livez stays", httpx.get(f"{server.url}/livez").status_code == 200)
    return outcome


def p21(lab: Lab) -> Outcome:
    outcome = Outcome()
    with lab.server("-tp", "2", "--max-num-seqs", "32") as server, Probe(server.url) as probe:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with Load(server.url, [{"prompt": prompt_of(n, 400), "max_tokens": 300} for n in range(24)]):
                pass
        statuses = [status for _, status, _ in probe.history]
        outcome.figures["probes in a busy minute"] = str(len(statuses))
        outcome.figures["false 503"] = str(statuses.count(503))
        outcome.check("no false 503", set(statuses) == {200})
    return outcome


CASES = [
    Case("P-04", "SIGKILL of the API process under load", p04),
    Case("P-04b", "SIGSTOP of the API process under load", hung_api),
    Case("P-04c", "SIGKILL of the API process beside a stopped engine or rank; step deadline 3 s", api_and_engine),
    Case("P-05", "SIGKILL of the supervising process under load", p05),
    Case("P-13", "SIGTERM under load", p13),
    Case("P-14", "the drain deadline passes, with a client that never reads", p14),
    Case("P-15", "a second signal", p15),
    Case("P-16", "SIGTERM at five moments of a start, and during a recovery", p16),
    Case("P-17", "50 restarts on one port, by SIGTERM and SIGKILL", p17),
    Case("P-18", "a rank fails at start", p18),
    Case("P-19", "a rank never joins; start deadline 4 s", p19),
    Case("P-20", "health while the engine is dead, and while it is stopped", p20),
    Case("P-21", "health in a busy minute", p21),
]
