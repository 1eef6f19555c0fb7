"""Who is in: heartbeats on one clock, departures with their reasons, no two nodes at one address."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aphro_core.cluster.messages import Memory, Node
from aphro_core.cluster.registry import LOST_SECONDS, SILENT_SECONDS, Registry, num_in, state_at

MEMORY = Memory(1, [], [])


def node(number: int, address: str = "") -> Node:
    return Node(id=str(number), name=f"node{number}", role="member" if number else "head",
                address=address or f"10.0.0.{number}", interface="eth0", devices=1, resource="aphro_slot",
                device_names=[], versions={}, started_at=0.0)  # fmt: skip


def test_silence_has_an_age_and_an_answer_ends_it() -> None:
    registry = Registry(node(0))
    registry.beat(node(1), 100.0)
    registry.beat(node(2), 130.0)
    rows = registry.rows({}, 131.0)
    assert [(row.node.name, row.state, row.age_seconds) for row in rows] == [
        ("node0", "in", 0.0), ("node1", "lost", 31.0), ("node2", "in", 1.0)
    ]  # fmt: skip
    assert num_in(rows) == 2
    assert num_in(registry.rows({"1": MEMORY}, 131.0)) == 3
    registry.beat(node(1), 131.0)
    assert num_in(registry.rows({}, 131.0)) == 3


def test_who_left_is_remembered_until_it_is_back() -> None:
    registry = Registry(node(0))
    registry.beat(node(1), 1.0)
    registry.leave("1", "raylet ended: SIGKILL", 5.0)
    registry.leave("7", "never seen", 5.0)
    assert [(left.name, left.reason, left.age_seconds) for left in registry.departed(9.0)] == [
        ("node1", "raylet ended: SIGKILL", 4.0)
    ]
    registry.beat(node(8, "10.0.0.1"), 10.0)
    assert registry.departed(10.0) == []


def test_one_address_is_one_node() -> None:
    registry = Registry(node(0, "10.0.0.9"))
    registry.beat(node(1), 0.0)
    assert registry.same_address(node(1), 1.0) is None
    assert registry.same_address(node(5, "10.0.0.1"), 1.0) == node(1)
    assert registry.same_address(node(5, "10.0.0.9"), 1.0) == node(0, "10.0.0.9")
    assert registry.same_address(node(5, "10.0.0.1"), LOST_SECONDS) is None  # it died and comes back


@given(st.lists(st.tuples(st.sampled_from(["beat", "leave"]), st.integers(1, 4)), max_size=40))
def test_the_list_is_who_beat_last_and_did_not_leave(events: list[tuple[str, int]]) -> None:
    registry, expected, gone = Registry(node(0)), dict[int, float](), set[int]()
    for now, (what, number) in enumerate(events):
        if what == "beat":
            registry.beat(node(number), float(now))
            if number not in gone:  # it was on its way when the node left
                expected[number] = float(now)
        else:
            registry.leave(str(number), "bye", float(now))
            if expected.pop(number, None) is not None:
                gone.add(number)
    end = float(len(events))
    rows = registry.rows({}, end)[1:]
    assert {int(row.node.id): end - row.age_seconds for row in rows} == expected
    assert {row.state for row in rows} <= {"in", "silent", "lost"}
    assert not {left.address for left in registry.departed(end)} & {row.node.address for row in rows}


def test_states() -> None:
    assert [state_at(age) for age in (0, SILENT_SECONDS, SILENT_SECONDS + 1, LOST_SECONDS + 1)] == [
        "in", "in", "silent", "lost"
    ]  # fmt: skip
