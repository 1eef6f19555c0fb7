"""Ranks to hosts: every rank has a device of its own, and a group stays on one host wherever one has room."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aphro_core.errors import PlacementError
from aphro_core.parallel.placement import Place, place_ranks, splits_a_group


@given(st.lists(st.integers(1, 8), min_size=1, max_size=5), st.integers(1, 8), st.integers(1, 4))
def test_each_rank_has_a_device_of_its_own(num_slots: list[int], tp_size: int, pp_size: int) -> None:
    if tp_size * pp_size > sum(num_slots):
        with pytest.raises(PlacementError, match=rf"World size \({tp_size * pp_size}\)"):
            place_ranks(num_slots, tp_size, pp_size)
        return
    places = place_ranks(num_slots, tp_size, pp_size)
    assert len(set(places)) == tp_size * pp_size
    for host, used in Counter(place.host for place in places).items():
        assert sorted(place.device for place in places if place.host == host) == list(range(used))
        assert used <= num_slots[host]


@pytest.mark.parametrize(
    ("num_slots", "tp_size", "pp_size", "hosts"),
    [
        ([8, 8], 8, 2, [0] * 8 + [1] * 8),
        ([2, 1], 1, 3, [0, 0, 1]),
        ([1, 2], 2, 1, [1, 1]),  # the first host that has room for the group
        ([2, 1], 3, 1, [0, 0, 1]),
    ],
)
def test_groups_share_a_host_where_they_can(num_slots: list[int], tp_size: int, pp_size: int, hosts: list[int]) -> None:
    places = place_ranks(num_slots, tp_size, pp_size)
    assert [place.host for place in places] == hosts
    assert splits_a_group([place.host for place in places], tp_size) == (tp_size == 3)


def test_a_device_is_counted_on_its_host() -> None:
    assert place_ranks([1, 2], 1, 3) == [Place(0, 0), Place(1, 0), Place(1, 1)]
