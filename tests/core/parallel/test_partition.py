"""partition: the shards tile the dimension, on whole units, as near to the weights as can be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aphro_core.errors import PlacementError
from aphro_core.parallel.partition import partition


@given(st.integers(64, 4096), st.lists(st.integers(1, 3), min_size=1, max_size=8), st.sampled_from([1, 16, 128]))
def test_shards_tile_the_dimension(num_units: int, weights: list[int], unit: int) -> None:
    shards = partition(num_units * unit, weights, unit=unit)
    assert [i for shard in shards for i in shard] == list(range(num_units * unit))
    assert all(shard.start % unit == 0 for shard in shards)
    for shard, weight in zip(shards, weights, strict=True):
        assert abs(len(shard) / unit - num_units * weight / sum(weights)) < 1


@given(st.integers(1, 300), st.integers(1, 40))
def test_equal_shares_differ_by_one_unit_and_the_bigger_come_first(num_units: int, ways: int) -> None:
    if num_units < ways:
        with pytest.raises(PlacementError):
            partition(num_units, [1] * ways)
        return
    sizes = [len(shard) for shard in partition(num_units, [1] * ways)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


def test_what_does_not_split_is_refused_with_its_numbers() -> None:
    with pytest.raises(PlacementError, match=r"100 does not split \[1, 1\] ways in units of 32"):
        partition(100, [1, 1], unit=32)
    with pytest.raises(PlacementError, match=r"3 does not split \[1, 20\] ways in units of 1"):
        partition(3, [1, 20])
