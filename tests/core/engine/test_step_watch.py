"""How long a step may take."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aphro_core.engine.step_watch import StepWatch


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def measured(clock: Clock, *steps: tuple[int, float], floor: float = 10.0) -> StepWatch:
    watch = StepWatch(floor, 300.0, clock)
    for num_tokens, seconds in steps:
        watch.submitted(num_tokens)
        clock.now += seconds
        watch.answered()
    return watch


def test_nothing_measured_has_the_first_limit() -> None:
    assert StepWatch(10.0, 300.0, Clock()).allowed_seconds(1) == 300.0


def test_a_fast_step_has_the_floor_and_a_slow_one_a_multiple() -> None:
    watch = measured(Clock(), (1, 0.01), (2000, 5.0))
    assert watch.allowed_seconds(1) == 10.0
    assert watch.allowed_seconds(2000) == 40.0
    assert watch.allowed_seconds(1500) == 40.0, "of the same size"


def test_a_size_never_seen_is_in_proportion_to_a_smaller_one() -> None:
    watch = measured(Clock(), (1, 2.0))
    assert watch.allowed_seconds(1024) == 8 * 2.0 * 1024
    assert measured(Clock(), (1024, 4.0)).allowed_seconds(1) == 32.0


@given(st.lists(st.tuples(st.integers(1, 5000), st.floats(0.001, 60)), min_size=1), st.integers(1, 5000))
def test_no_step_as_slow_as_one_before_it_is_a_hang(steps: list[tuple[int, float]], num_tokens: int) -> None:
    clock = Clock()
    watch = measured(clock, *steps)
    slowest = max((s for n, s in steps if n.bit_length() == num_tokens.bit_length()), default=0.0)
    watch.submitted(num_tokens)
    clock.now += slowest
    assert watch.overdue_seconds() < 0
    clock.now += watch.allowed_seconds(num_tokens) - slowest + 0.001
    assert watch.overdue_seconds() > 0


def test_behind_another_in_a_pipeline_the_time_begins_with_its_answer() -> None:
    clock = Clock()
    watch = measured(clock, (1, 0.1))
    watch.submitted(1)
    watch.submitted(1)
    clock.now += 9.0
    watch.answered()
    clock.now += 9.0
    assert watch.overdue_seconds() < 0
    watch.answered()
    assert watch.num_in_flight == 0
    assert watch.overdue_seconds() < 0
