"""What counts as a hang of the API process: silence, and what the kernel says of it, on a clock of our own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aphro_core.host import ProcessState
from aphro_core.keeper.heartbeat import BEAT_SECONDS, BUSY_SECONDS, STILL_SECONDS, Heartbeat


class Watched:
    def __init__(self) -> None:
        self.now = 100.0
        self.heartbeat = Heartbeat(lambda: self.now)

    def pass_time(self, seconds: float, state: str, *, beats: bool = False, works: bool = False) -> str:
        """Until it counts as hanging, or ``seconds`` are over."""
        end = self.now + seconds
        while self.now < end:
            self.now += BEAT_SECONDS
            cpu_seconds = self.now / 10 if works else 1.0
            if hang := self.heartbeat.look(int(beats), ProcessState(state, cpu_seconds)):
                return hang
        return ""


def test_one_that_is_stopped_is_found_within_two_seconds() -> None:
    watched = Watched()
    assert not watched.pass_time(5, "S", beats=True)
    began = watched.now
    assert "is stopped (SIGSTOP)" in watched.pass_time(5, "T")
    assert watched.now - began < 2.0


@pytest.mark.parametrize(("state", "works", "limit"), [("S", False, STILL_SECONDS), ("S", True, BUSY_SECONDS)])
def test_a_silent_loop_is_a_hang_sooner_if_nothing_is_computed(state: str, works: bool, limit: float) -> None:
    watched = Watched()
    watched.pass_time(3, "S", beats=True)
    began = watched.now
    assert "hangs" in watched.pass_time(60, state, works=works)
    assert limit < watched.now - began < limit + 1.0


@pytest.mark.parametrize("state", ["R", "D", "t"])
def test_one_that_wants_a_core_or_a_disk_or_is_debugged_has_longer(state: str) -> None:
    assert not Watched().pass_time(BUSY_SECONDS - 1, state)


@given(st.lists(st.floats(0.01, 0.5), min_size=1, max_size=40), st.sampled_from("STRDt"))
def test_one_that_beats_never_hangs(pauses: list[float], state: str) -> None:
    watched = Watched()
    for pause in pauses:
        watched.now += pause
        assert not watched.heartbeat.look(1, ProcessState(state, 0.0))


def test_who_was_away_itself_looks_anew() -> None:
    watched = Watched()
    watched.pass_time(1, "S", beats=True)
    watched.now += 3600  # the keeper was stopped, or the host slept
    assert not watched.heartbeat.look(0, ProcessState("S", 0.0))
    assert not watched.pass_time(1, "S")
    assert watched.pass_time(2, "S")
