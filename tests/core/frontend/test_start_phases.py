"""What a start took is told by phases that add up to the whole, whichever rank is the last."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from aphro_core.frontend.start_phases import StartPhases


def test_a_phase_lasts_until_the_last_rank_is_through() -> None:
    phases = StartPhases(98.0, 100.0)
    for phase, now in [("rendezvous", 103.0), ("rendezvous", 104.0), ("weights", 104.5), ("weights", 109.0)]:
        phases.take(phase, now)
    phases.take("kernels", 110.0)  # of one rank
    phases.take("weights", 112.0)  # of another, which is late
    phases.take("kernels", 115.0)
    phases.take("graphs", 115.01)
    phases.take_ready(115.5)
    text = "command 2.0, processes 3.0, rendezvous 1.0, weights 8.0, kernels 3.0, first steps 0.5"
    assert phases.describe(115.51) == text
    assert phases.describe(117.0) == f"{text}, serving 1.5"


def test_ranks_are_there_when_one_has_spoken() -> None:
    phases = StartPhases(0.0, 1.0)
    assert not phases.has_ranks
    assert phases.describe(4.0) == "command 1.0, serving 3.0"
    phases.take("rendezvous", 2.0)
    assert phases.has_ranks


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.floats(0, 50)), max_size=20), st.floats(0.1, 10))
def test_figures_add_up(steps: list[tuple[str, float]], last: float) -> None:
    now, phases = 7.0, StartPhases(4.0, 7.0)
    for phase, seconds in steps:
        now += seconds
        phases.take(phase, now)
    text = phases.describe(now + last)
    figures = [float(figure) for figure in re.findall(r" (\d+\.\d)(?:,|$)", text)]
    assert abs(sum(figures) - (now + last - 4.0)) <= 0.06 * len(figures)
    assert all(figures)
