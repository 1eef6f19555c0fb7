"""Every rank has a seat of its own on a node that answers; messages name what is there."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aphro_core.errors import PlacementError
from aphro_core.executor.ray.protocol import Offer, RayNode, Resource
from aphro_core.executor.ray.seats import choose_resource, describe, names, seat_ranks, too_few

SLOT: Resource = "aphro_slot"


def node(number: int, *free: int, total: int | None = None, reachable: bool = True, host: str | None = None) -> RayNode:
    offers = [
        Offer({SLOT: count if total is None else total}, {SLOT: count}, bundle)
        for bundle, count in zip([-1] if len(free) == 1 else range(len(free)), free, strict=True)
    ]
    return RayNode(f"id{number}", host or f"node{number}", f"10.0.0.{number}", reachable, offers)


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=4),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_seats(offers: list[list[int]], tp_size: int, pp_size: int) -> None:
    nodes = [node(number, *free) for number, free in enumerate(offers)]
    if tp_size * pp_size > sum(map(sum, offers)):
        with pytest.raises(PlacementError):
            seat_ranks(nodes, SLOT, tp_size, pp_size)
        return
    agents, seats = seat_ranks(nodes, SLOT, tp_size, pp_size)
    assert len(seats) == tp_size * pp_size == sum(agent.num_ranks for agent in agents)
    for index, agent in enumerate(agents):
        own = [seat for seat in seats if seat.agent == index]
        assert sorted(seat.device for seat in own) == list(range(agent.num_ranks))
        assert {seat.node.id for seat in own} == {agent.node}
        offer = next(
            offer for each in nodes if each.id == agent.node for offer in each.offers if offer.bundle == agent.bundle
        )
        assert agent.num_ranks <= offer.free[SLOT]
    assert max(Counter((agent.node, agent.bundle) for agent in agents).values()) == 1


def test_nodes_that_do_not_answer_take_none() -> None:
    agents, _ = seat_ranks([node(0, 2, reachable=False), node(1, 2)], SLOT, 2, 1)
    assert [agent.node for agent in agents] == ["id1"]


def test_what_a_rank_takes() -> None:
    plain = RayNode("id", "a", "10.0.0.1", True, [Offer({"CPU": 8, "GPU": 1}, {})])
    assert choose_resource("cuda", [plain]) == "GPU"
    assert choose_resource("cpu", [plain]) == "CPU"
    assert choose_resource("cpu", [plain, node(1, 0, total=1)]) == SLOT


def test_words() -> None:
    nodes = [node(0, 1, total=2), node(1, 1, reachable=False), node(2, 1, host="node1")]
    assert names(nodes) == {"id0": "node0", "id1": "10.0.0.1", "id2": "10.0.0.2"}
    said = describe(nodes, SLOT)
    assert (
        said == "node0 (10.0.0.0): 1 of 2 free, 10.0.0.1 (10.0.0.1): does not answer, 10.0.0.2 (10.0.0.2): 1 of 1 free"
    )
    error = too_few(nodes, SLOT, 4)
    assert "World size (4) is larger" in error.message
    assert "(2, 1 more are in use)" in error.message
    assert said in error.message
    assert describe([], SLOT) == "no node"
