"""The head's own answers: one node an address, unless the host that has it came back; memory; the end of all."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from aphro_core.cluster.headquarters import Headquarters
from aphro_core.cluster.messages import (
    Answer,
    Beat,
    Done,
    Down,
    Greeting,
    Hello,
    Memory,
    MemoryNow,
    Node,
    Refused,
    Request,
)
from aphro_core.cluster.service import Service, open_door
from aphro_core.cluster.wire import Serving

TOKEN = "t" * 64
HERE = "127.0.0.1"


def node(id: str, address: str = HERE) -> Node:
    return Node(id=id, name=f"node-{id}", role="member", address=address, interface="lo", devices=1,
                resource="aphro_slot", device_names=[], versions={}, started_at=0.0)  # fmt: skip


class Door:
    """A member's, that answers with ``id``."""

    def __init__(self) -> None:
        self.id = "old"
        self.ended: list[str] = []
        self.socket = open_door(HERE, 0)
        Service(self.socket, TOKEN, self._respond).start()

    def _respond(self, request: Request, channel: Serving) -> Answer:
        if isinstance(request, Down):
            self.ended.append(request.reason)
            return Done({"node": "process 7 does not end"})
        return MemoryNow(self.id, Memory(5, [], []))


@pytest.fixture
def door() -> Iterator[Door]:
    made = Door()
    yield made
    made.socket.shutdown(socket.SHUT_RDWR)
    made.socket.close()


@pytest.fixture
def headquarters(door: Door) -> Headquarters:
    found = Headquarters(node("head", "198.18.0.1"), TOKEN, door.socket.getsockname()[1], {"A": "1"})
    assert found.hear(Beat(node("old"))) == Done()
    return found


def names(headquarters: Headquarters) -> list[tuple[str, str]]:
    return [(row.node.id, row.state) for row in headquarters.status().rows]


def test_an_address_that_another_node_answers_at_is_taken(headquarters: Headquarters) -> None:
    answer = headquarters.greet(Hello(node("new")))
    assert isinstance(answer, Refused)
    assert answer.message == "node-old (member) is in the cluster with the address 127.0.0.1 already"
    assert isinstance(headquarters.greet(Hello(node("new", "198.18.0.1"))), Refused)  # the head's
    assert isinstance(headquarters.greet(Hello(node("new", "198.18.0.2"))), Greeting)


def test_a_host_that_comes_back_takes_its_own_place(headquarters: Headquarters, door: Door) -> None:
    door.id = "new"
    assert headquarters.greet(Hello(node("new"))) == Greeting(node("head", "198.18.0.1"), {"A": "1"})
    assert names(headquarters) == [("head", "in")]
    assert [left.reason for left in headquarters.status().departed] == ["its member was killed"]


def test_memory_is_of_the_node_itself(headquarters: Headquarters, door: Door) -> None:
    assert [row.memory for row in headquarters.status().rows[1:]] == [Memory(5, [], [])]
    door.id = "somebody else"
    assert [row.memory for row in headquarters.status().rows[1:]] == [None]


def test_all_are_told_to_end_and_what_they_could_not(headquarters: Headquarters, door: Door) -> None:
    headquarters.hear(Beat(node("gone", "127.0.0.9")))
    problems = headquarters.end_members("the end")
    assert door.ended == ["the end"]
    assert problems["node-old"] == "process 7 does not end"
    assert "Connection refused" in problems["node-gone"]
