"""The keeper and a child that ends in every way: what is passed on, what is replaced, and what ends both."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aphro_core.errors import ExitCode

# what the child does is a line of Python; ``runs`` counts the children so far, this one included
SCRIPT = """
import os, signal, socket, sys, time
from pathlib import Path
from aphro_core.errors import AphroError
from aphro_core.frontend.recovery_budget import RecoveryBudget
from aphro_core.held_engine import HeldEngine
from aphro_core.keeper.keeper import keep
from aphro_core.reporter import SilentReporter
from aphro_core.spawn import Child, Spawner

counter = Path(sys.argv[1])

class NoForkServer:
    def take_link(self):
        return Spawner(socket.socketpair()[0])
    def inherited(self, link):
        return self

def run_api(kept):
    runs = len(counter.read_text()) + 1
    counter.write_text("x" * runs)
    is_first = runs == 1
    assert kept.is_replacement == (not is_first)
    {child}
    return 0

try:
    code = keep(run_api, NoForkServer(), RecoveryBudget(2, time.monotonic), SilentReporter())
except AphroError as error:
    print(error.message, file=sys.stderr)
    code = error.exit_code
sys.exit(code)
"""


class Kept:
    def __init__(self, folder: Path, child: str) -> None:
        self.counter = folder / "runs"
        self.counter.write_text("")
        script = SCRIPT.replace("{child}", child)
        self.words = folder / "stderr"
        with self.words.open("wb") as words:
            self.process = subprocess.Popen([sys.executable, "-c", script, str(self.counter)], stderr=words)

    @property
    def num_runs(self) -> int:
        return len(self.counter.read_text())

    def wait_runs(self, num: int) -> None:
        deadline = time.monotonic() + 20
        while self.num_runs < num:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def kept(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Kept]:
    kept = Kept(tmp_path, request.param)
    yield kept
    kept.process.kill()
    kept.process.wait(5)


READY = "kept.mark_ready();"


@pytest.mark.parametrize(
    ("kept", "code", "num_runs"),
    [
        ("return 5", 5, 1),
        (READY + "return 7", 7, 1),
        ("os.kill(os.getpid(), 9)", ExitCode.INTERNAL, 1),  # before it was up there is nothing to go on with
        (READY + "os.kill(os.getpid(), 9) if is_first else None; return 3", 3, 2),
        (READY + "return 0 if is_first else 3", 3, 2),  # an end that nobody asked for is a death
        (READY + "os.kill(os.getpid(), 11)", ExitCode.RECOVERY, 3),
        # the second one dies before it serves: the next one has its chance all the same
        (f"if is_first: {READY}\n    if runs < 3: os.kill(os.getpid(), 9)\n    return 3", 3, 3),
    ],
    indirect=["kept"],
)
def test_how_a_child_ends(kept: Kept, code: int, num_runs: int) -> None:
    assert kept.process.wait(20) == code
    assert kept.num_runs == num_runs


@pytest.mark.parametrize("kept", ["os.kill(os.getpid(), 9)"], indirect=True)
def test_one_that_was_killed_while_it_started_is_spoken_for(kept: Kept) -> None:
    assert kept.process.wait(20) == ExitCode.INTERNAL
    assert "was killed by signal 9 (SIGKILL) before it served" in kept.words.read_text()


DRAIN = "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), os._exit(0))); time.sleep(60)"
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"


SPEAKS = "signal.signal(signal.SIGTERM, lambda *_: os._exit(143)); time.sleep(60)"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("kept", "code", "has_line"),
    [(READY + DRAIN, 0, False), (SPEAKS, 143, False), (DRAIN, 143, True), ("time.sleep(60)", 143, True)],
    indirect=["kept"],
)
def test_a_signal_is_passed_on_and_its_end_is_ours(
    kept: Kept, code: int, has_line: bool, number: signal.Signals
) -> None:
    kept.wait_runs(1)
    time.sleep(0.2)
    kept.process.send_signal(number)
    assert kept.process.wait(5) == code
    assert kept.num_runs == 1
    assert ("SIGTERM before the server was up" in kept.words.read_text()) == has_line


@pytest.mark.parametrize(
    ("kept", "num_signals", "code", "has_line"),
    [
        (DEAF, 1, ExitCode.TERMINATED, True),
        ("kept.leave();" + DEAF, 1, ExitCode.TERMINATED, False),  # it has said so, and a thread of it goes on
        (READY + DEAF, 2, 0, False),
    ],
    indirect=["kept"],
)
def test_one_that_does_not_listen_is_ended(kept: Kept, num_signals: int, code: int, has_line: bool) -> None:
    kept.wait_runs(1)
    time.sleep(0.2)
    began = time.monotonic()
    for _ in range(num_signals):
        kept.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert kept.process.wait(10) == code
    assert 1.0 < time.monotonic() - began < 3.0
    assert kept.num_runs == 1
    assert ("SIGTERM before the server was up" in kept.words.read_text()) == has_line


@pytest.mark.parametrize("kept", [READY + "signal.signal(signal.SIGTERM, lambda *_: os._exit(0)); time.sleep(60)"],
                         indirect=True)  # fmt: skip
def test_a_storm_of_signals_ends_as_one_does(kept: Kept) -> None:
    kept.wait_runs(1)
    time.sleep(0.2)
    while kept.process.poll() is None:
        kept.process.send_signal(signal.SIGTERM)
    assert kept.process.returncode == 0


@pytest.mark.parametrize("kept", [DEAF], indirect=True)
def test_a_storm_of_signals_gives_no_further_time(kept: Kept) -> None:
    kept.wait_runs(1)
    time.sleep(0.2)
    began = time.monotonic()
    while kept.process.poll() is None and time.monotonic() - began < 5:
        kept.process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert kept.process.returncode == ExitCode.TERMINATED
    assert time.monotonic() - began < 3.0


STOPPED = "os.kill(os.getpid(), 19)"  # SIGSTOP
ASLEEP = "time.sleep(30)"
BEATING = "[(kept.beat(), time.sleep(0.1)) for _ in range(30)]"


HANGS = [f"{READY}{hang} if is_first else None; return 3" for hang in (STOPPED, ASLEEP)]


@pytest.mark.parametrize("kept", HANGS, indirect=True)
def test_one_that_hangs_is_replaced_within_the_bound_of_health(kept: Kept) -> None:
    kept.wait_runs(1)
    began = time.monotonic()
    kept.wait_runs(2)
    assert 1.0 < time.monotonic() - began < 3.5  # 1.5 s, and what a busy host adds
    assert kept.process.wait(5) == 3


LIVES = [f"{READY}{BEATING}; return 3", f"{READY}kept.leave(); time.sleep(3); return 3"]


@pytest.mark.parametrize("kept", LIVES, indirect=True)
def test_one_that_beats_or_leaves_is_let_alone(kept: Kept) -> None:
    assert kept.process.wait(10) == 3
    assert kept.num_runs == 1


HAND_ON = """
    if is_first:
        ours, theirs = socket.socketpair()
        theirs.send(b"held")
        pidfd = os.pidfd_open(os.getppid())
        kept.hand_on(HeldEngine(7, Child(1234, pidfd, os.dup(pidfd)), Spawner(socket.socketpair()[0]), ours))
        kept.mark_ready()
    if runs < 3:
        os.kill(os.getpid(), 9)
    engine = kept.engine
    return 3 if (engine.epoch, engine.child.pid, engine.door.recv(9)) == (7, 1234, b"held") else 4
"""


@pytest.mark.parametrize("kept", [HAND_ON.strip()], indirect=True)
def test_an_engine_goes_from_one_to_the_next(kept: Kept) -> None:
    assert kept.process.wait(20) == 3
    assert kept.num_runs == 3
