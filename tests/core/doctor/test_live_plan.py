"""The live check's plan: every pair once, never a rank twice at a time, and the arithmetic of what it costs."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aphro_core.doctor.live.plan import (
    ModelSizes,
    bus_bytes_per_second,
    ms_per_token,
    render_bytes,
    render_timings,
    rounds_of_pairs,
)
from aphro_core.doctor.live.protocol import Timing


@given(st.integers(1, 40))
def test_every_pair_meets_once_and_no_rank_twice_at_a_time(num_ranks: int) -> None:
    rounds = rounds_of_pairs(num_ranks)
    assert sorted(pair for pairs in rounds for pair in pairs) == list(combinations(range(num_ranks), 2))
    for pairs in rounds:
        ranks = [rank for pair in pairs for rank in pair]
        assert len(ranks) == len(set(ranks))
    assert len(rounds) == (0 if num_ranks == 1 else num_ranks - 1 + num_ranks % 2)


def test_a_token_pays_for_two_sums_a_layer_and_one_for_the_embedding() -> None:
    model = ModelSizes("m", hidden_size=4096, num_layers=32)
    assert ms_per_token(model, Timing("all_reduce", 8192, 20e-6, 10, True)) == pytest.approx(1.3)
    assert model.hidden_bytes(2048) == 16 << 20


def test_bus_bandwidth_is_that_of_nccl_tests() -> None:
    timing = Timing("all_reduce", 1_000_000, 0.001, 1, True)
    assert bus_bytes_per_second(timing, 2) == pytest.approx(1e9)
    assert bus_bytes_per_second(timing, 8) == pytest.approx(1.75e9)


def test_timings_say_what_was_wrong_and_what_was_left_out() -> None:
    text = render_timings(
        [
            Timing("all_reduce", 8, 5e-5, 50, True),
            Timing("all_reduce", 1 << 20, 0.002, 5, False),
            Timing("hand_over", 16 << 20, 12.0, 0, True),
        ],
        2,
    )
    assert text == "all-reduce 8 B 0.05 ms, 1 MiB 2 ms (0.524 GB/s) WRONG; hand-over 16 MiB left out (about 12 s)"
    assert [render_bytes(size) for size in (8, 1152, 8192, 3 << 20)] == ["8 B", "1.1 KiB", "8 KiB", "3 MiB"]
