"""``python -m tests.faults.on_gpus tp|pp``: deaths, hangs and failed steps of ranks on GPUs, over NCCL; prints rows.

``tp`` and ``pp`` need two GPUs, ``one`` needs one. Few servers are started: a rank on a GPU takes its seconds.
``--cpu`` tries the cases where there is no GPU, with the loop of one.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx

from tests.e2e.server_process import is_running
from tests.faults.case import Outcome
from tests.faults.lab import (
    FAULTS,
    MEMORY,
    MEMORY_OF_ONE,
    NAN,
    RAISE,
    FaultyServer,
    Lab,
    Probe,
    complete,
    write_model,
)
from tests.faults.load import Load, bodies, prompt_of, run_load

_SMALL: Final = ("--max-num-seqs", "17", "--max-recoveries", "99", "--step-timeout", "3")
_PACE_SECONDS: Final = 0.006  # of a step, else a tiny model is done before anything can be done to it
_LEAST_MIB: Final = 100  # of a GPU's memory that the driver may keep
_NUM_TOKENS: Final = 300
_FAULTS: Final = f"{FAULTS},pace={_PACE_SECONDS}"
_LIKE_A_GPU: Final = ",gpu-loop=cpu"  # the same loop without one: what is a step ahead, tokens that stay where they are
_PAUSE_SECONDS: Final = 30.0  # reported; the bar of 5 s is for a rank that starts in 2 s


@contextmanager
def gpu_lab(device: str = "cuda") -> Iterator[Lab]:
    with tempfile.TemporaryDirectory(prefix="aphro-faults-") as name:
        model = write_model(Path(name), vocab_size=600)  # large enough for stages to share the head
        yield Lab(model, Path(name), device=device)


def row(case: str, fault: str, work: Callable[[Outcome], None]) -> bool:
    """Make it and print its row at once: whatever comes later may not come. Whether it held."""
    outcome, began = Outcome(), time.monotonic()
    try:
        work(outcome)
    except Exception as error:
        outcome.check(f"{type(error).__name__}: {str(error)[-300:]}", holds=False)
    figures = ", ".join(f"{name} {value}" for name, value in outcome.figures.items())
    holds = "yes" if outcome.passed else "NO: " + "; ".join(outcome.failures)
    print(f"| {case} | {fault} | {figures} | {holds} | {time.monotonic() - began:.1f} s", flush=True)
    return outcome.passed


class Served:
    """One server, and what it answers undisturbed."""

    def __init__(self, server: FaultyServer, num_requests: int = 16) -> None:
        self.server = server
        self.asked = bodies(num_requests, _NUM_TOKENS)
        run_load(server.url, self.asked)  # the first steps of each shape may compile
        self.expected = run_load(server.url, self.asked)

    def hit(self, load: Load, outcome: Outcome, work: Callable[[], None]) -> float:
        """When it was, in the middle of all of them."""
        load.wait_tokens(20)
        num_running = self.server.metric("num_requests_running")
        work()
        outcome.figures["open then"] = f"{num_running:g}"
        outcome.check("all are open when it happens", num_running == len(self.asked))
        return time.monotonic()

    def signal(self, victim: str, number: signal.Signals, outcome: Outcome) -> None:
        before = self.server.metric("engine_recoveries_total")
        pid = self.server.pid_of(victim)
        with Probe(self.server.url) as probe, Load(self.server.url, self.asked) as load:
            hit = self.hit(load, outcome, lambda: os.kill(pid, number))
            self._wait_ready(before + 1)
        self._judge(load, outcome)
        outcome.at_most("pause", max(answer.longest_pause for answer in load.answers), _PAUSE_SECONDS)
        outcome.at_most("silence", max(answer.longest_silence for answer in load.answers), 2.5)
        outcome.at_most("`/readyz` 503 after", probe.first(503, hit), 4.0)

    def _wait_ready(self, num_recoveries: float) -> None:
        deadline = time.monotonic() + _PAUSE_SECONDS
        while self.server.metric("engine_recoveries_total") < num_recoveries or not self._is_ready():
            assert time.monotonic() < deadline, "it does not come back"
            time.sleep(0.05)

    def _is_ready(self) -> bool:
        return httpx.get(f"{self.server.url}/readyz").status_code == 200

    def _judge(self, load: Load, outcome: Outcome) -> None:
        wrong = [n for n, answer in enumerate(load.answers) if answer.token_ids != self.expected[n]]
        outcome.figures["token-equal"] = f"{len(self.expected) - len(wrong)}/{len(self.expected)}"
        for n in wrong:
            outcome.check(self._explain(n, load.answers[n].token_ids), holds=False)
        outcome.check("all 200", {answer.status for answer in load.answers} == {200})

    def _explain(self, n: int, found: list[int]) -> str:
        """Where an answer leaves the expected one, and how close the two tokens are there."""
        expected = self.expected[n]
        at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(found))
        if at >= min(len(found), len(expected)):
            return f"request {n} has {len(found)} of {len(expected)} tokens"
        prompt = [*self.asked[n]["prompt"], *expected[:at]]
        answer = complete(self.server.url, prompt, 1, logprobs=5, return_tokens_as_token_ids=True).json()
        top = answer["choices"][0]["logprobs"]["top_logprobs"][0]
        return f"request {n} has token {found[at]} instead of {expected[at]} at {at}; there the likeliest are {top}"

    def culprit(self, token: int, outcome: Outcome) -> None:
        """One request that meets a fault in every step of it, among others; no restart."""
        before = self.server.metric("engine_recoveries_total")
        answers: list[Any] = []
        ask = threading.Thread(target=lambda: answers.append(complete(self.server.url, [*prompt_of(9), token])))
        with Load(self.server.url, self.asked) as load:
            self.hit(load, outcome, ask.start)
        ask.join(60)
        self._judge(load, outcome)
        (answer,) = answers
        outcome.figures["culprit"] = f"{answer.status_code} {answer.json().get('error', {}).get('code')}"
        outcome.check("the culprit gets 500 step_failed", answer.json()["error"]["code"] == "step_failed")
        restarts = self.server.metric("engine_recoveries_total") - before
        outcome.figures["restarts"] = f"{restarts:g}"
        outcome.check("no restart", restarts == 0)
        outcome.at_most("pause", max(answer.longest_pause for answer in load.answers), 5.0)

    def lose_api(self, outcome: Outcome) -> None:
        engine = self.server.pid_of("aphro-engine")
        with Load(self.server.url, self.asked) as load:
            hit = self.hit(load, outcome, lambda: self._kill("aphro-api"))
            answer = complete(self.server.url, prompt_of(1))
            outcome.at_most("served again", time.monotonic() - hit, 2.0)
            while self.server.metric("num_requests_running") and time.monotonic() - hit < 8:
                time.sleep(0.01)
            outcome.at_most("orphans cancelled", time.monotonic() - hit, 3.0)
        outcome.check("200", answer.status_code == 200)
        outcome.check("by the same engine", self.server.pid_of("aphro-engine") == engine)

    def _kill(self, name: str) -> None:
        self.server.kill(name)

    def lose_keeper(self, outcome: Outcome) -> None:
        started = self.server.all_processes()
        with Load(self.server.url, self.asked) as load:
            began = self.hit(load, outcome, self.server.process.kill)
            while any(is_running(pid) for pid in started) and time.monotonic() - began < 8:
                self.server.process.poll()
                time.sleep(0.01)
        outcome.at_most("all gone", time.monotonic() - began, 3.0)
        if shutil.which("nvidia-smi") is not None:
            while max(_used_mib()) > _LEAST_MIB and time.monotonic() - began < 8:
                time.sleep(0.1)
            outcome.at_most("GPU memory free", time.monotonic() - began, 3.0)


def _used_mib() -> list[int]:
    """Of the GPUs that are seen here: those of others are not ours to judge."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    if seen := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command += ["-i", seen]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
    return [int(line) for line in done.stdout.split()]


def kills(served: Served, outcome: Outcome) -> None:
    for rank in range(2):
        served.signal(f"aphro-rank-{rank}", signal.SIGKILL, outcome)


def faults_on(lab: Lab) -> str:
    return _FAULTS + (_LIKE_A_GPU if lab.device == "cpu" else "")


def over_two(lab: Lab, *layout: str) -> bool:
    began = time.monotonic()
    with lab.server(*layout, *_SMALL, faults=faults_on(lab), seconds=90) as server:
        served = Served(server)
        print(f"served after {time.monotonic() - began:.1f} s ({' '.join(layout)})", flush=True)
        told = [line for line in server.log.read_text().splitlines() if "by NCCL" in line or " after " in line]
        print("\n".join(told), flush=True)
        where, is_tp = " ".join(layout), layout[0] == "-tp"
        held = [
            row("P-08", f"an exception in forward, {where}", lambda o: served.culprit(RAISE, o)),
            row("P-01" if is_tp else "P-02", f"SIGKILL of each worker, {where}", lambda o: kills(served, o)),
            row("P-09", f"an allocation failure in prefill, {where}", lambda o: served.culprit(MEMORY, o)),
        ]
        if is_tp:
            held.append(
                row("P-09b", f"the same on one rank of two, {where}", lambda o: served.culprit(MEMORY_OF_ONE, o))
            )
        held += [
            row("P-06", f"SIGSTOP of a worker, {where}", lambda o: served.signal("aphro-rank-1", signal.SIGSTOP, o)),
            row("P-11", f"NaN logits, {where}", lambda o: served.culprit(NAN, o)),
            row("P-04", f"SIGKILL of the API process, {where}", served.lose_api),
            row("P-05", f"SIGKILL of the supervising process, {where}", served.lose_keeper),
        ]
        return all(held)


def over_one(lab: Lab) -> bool:
    with lab.server(*_SMALL, faults=faults_on(lab), seconds=90) as server:
        served = Served(server)
        held = [
            row("P-08", "an exception in forward, one GPU", lambda o: served.culprit(RAISE, o)),
            row("P-09", "an allocation failure in prefill, one GPU", lambda o: served.culprit(MEMORY, o)),
            row("P-11", "NaN logits, one GPU", lambda o: served.culprit(NAN, o)),
            row("P-03", "SIGKILL of the engine, one GPU", lambda o: served.signal("aphro-engine", signal.SIGKILL, o)),
            row("P-06", "SIGSTOP of the engine, one GPU", lambda o: served.signal("aphro-engine", signal.SIGSTOP, o)),
            row("P-04", "SIGKILL of the API process, one GPU", served.lose_api),
            row("P-05", "SIGKILL of the supervising process, one GPU", served.lose_keeper),
        ]
        return all(held)


def main(words: list[str]) -> int:
    """1 where a row did not hold."""
    device, held = "cpu" if "--cpu" in words else "cuda", True
    with gpu_lab(device) as lab:
        for word in (word for word in words if word != "--cpu"):
            held &= over_one(lab) if word == "one" else over_two(lab, f"-{word}", "2")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
