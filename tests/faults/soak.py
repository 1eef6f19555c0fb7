"""``python -m tests.faults.soak [MINUTES] [SEED]``: load and random faults together, then one table.

Every answer is compared with that of an undisturbed run; faults are kills and stops of any process but the client's.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import sys
import threading
import time
from dataclasses import dataclass, field

from tests.e2e.server_process import is_running
from tests.faults.case import Case, Outcome
from tests.faults.lab import FaultyServer, Lab, open_lab
from tests.faults.load import Answer, prompt_of, run_load, stream

_NUM_CLIENTS = 6
_NUM_PROMPTS = 24
_FAULTS = ("aphro-rank-0", "aphro-rank-1", "aphro-engine", "aphro-forks", "stop aphro-rank-1", "stop aphro-engine")


@dataclass
class Soak:
    """What was seen."""

    faults: list[str] = field(default_factory=list)
    num_requests: int = 0
    num_wrong: int = 0
    num_errors: int = 0
    num_hangs: int = 0
    pauses: list[float] = field(default_factory=list)
    leftovers: int = 0
    memory_mib: list[float] = field(default_factory=list)

    def outcome(self) -> Outcome:
        outcome = Outcome()
        pauses = sorted(self.pauses) or [0.0]
        p99 = pauses[min(len(pauses) - 1, int(len(pauses) * 0.99))]
        outcome.figures = {
            "faults": str(len(self.faults)),
            "requests": str(self.num_requests),
            "wrong tokens": str(self.num_wrong),
            "errors": str(self.num_errors),
            "hangs": str(self.num_hangs),
            "leftovers": str(self.leftovers),
            "pause p50 / p99": f"{statistics.median(pauses):.2f} / {p99:.2f} s",
            "memory of the API process": f"{self.memory_mib[0]:.0f} to {self.memory_mib[-1]:.0f} MiB",
        }
        outcome.check("no wrong token", self.num_wrong == 0)
        outcome.check("no hang", self.num_hangs == 0)
        outcome.check("no error", self.num_errors == 0)
        outcome.check("nothing left", self.leftovers == 0)
        outcome.check("memory is flat", self.memory_mib[-1] - self.memory_mib[len(self.memory_mib) // 4] < 32)
        return outcome


def soak(lab: Lab, minutes: float, seed: int = 0, every: float = 6.0) -> Outcome:
    rng, seen = random.Random(seed), Soak()
    asked = [{"prompt": prompt_of(n), "max_tokens": 40 + n * 5} for n in range(_NUM_PROMPTS)]
    with lab.server("-tp", "2", "--step-timeout", "2", "--max-recoveries", "100000") as server:
        expected = run_load(server.url, asked)
        deadline, stopping = time.monotonic() + minutes * 60, threading.Event()

        def client(number: int) -> None:
            own = random.Random(seed * 100 + number)
            while not stopping.is_set():
                index = own.randrange(_NUM_PROMPTS)
                answer = Answer()
                stream(server.url, asked[index], answer, timeout=60)
                seen.num_requests += 1
                seen.pauses.append(answer.longest_pause)
                seen.num_errors += answer.error is not None
                seen.num_hangs += answer.error is not None and answer.error["code"] == "connection"
                seen.num_wrong += answer.token_ids != expected[index][: len(answer.token_ids)] or (
                    answer.error is None and answer.token_ids != expected[index]
                )

        threads = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(_NUM_CLIENTS)]
        for thread in threads:
            thread.start()
        while time.monotonic() < deadline:
            time.sleep(every * rng.uniform(0.5, 1.5))
            _fault(server, rng, seen)
            seen.memory_mib.append(server.rss_bytes() / 2**20)
        time.sleep(5.0)
        stopping.set()
        for thread in threads:
            thread.join(70)
            seen.num_hangs += thread.is_alive()
        started = server.all_processes()
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(20)
        time.sleep(3.0)
        seen.leftovers = sum(is_running(pid) for pid in started)
    return seen.outcome()


def _fault(server: FaultyServer, rng: random.Random, seen: Soak) -> None:
    """One fault. A stopped process is woken after a second, or found out after two."""
    fault = rng.choice(_FAULTS)
    try:
        if fault.startswith("stop "):
            pid = server.pid_of(fault.removeprefix("stop "))
            os.kill(pid, signal.SIGSTOP)
            if rng.random() < 0.5:
                time.sleep(1.0)
                os.kill(pid, signal.SIGCONT)
        else:
            server.kill(fault)
    except (ProcessLookupError, AssertionError):
        return  # it was being replaced just then
    seen.faults.append(fault)


def short(lab: Lab) -> Outcome:
    return soak(lab, minutes=2.0)


CASES = [Case("P-62", "a soak of two minutes with random faults, six clients", short)]


def main(words: list[str]) -> int:
    minutes = float(words[0]) if words else 30.0
    with open_lab() as lab:
        outcome = soak(lab, minutes, int(words[1]) if len(words) > 1 else 0)
    for name, value in outcome.figures.items():
        print(f"{name:28} {value}")
    for failure in outcome.failures:
        print(f"not so: {failure}")
    return 0 if outcome.passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
