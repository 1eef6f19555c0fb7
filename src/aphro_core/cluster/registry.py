"""The head's list of nodes, by their heartbeats: who is in, who is silent, who left and why. Time is an argument."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from aphro_core.cluster.messages import Departed, Memory, Node, NodeRow

BEAT_SECONDS: Final = 2.0
SILENT_SECONDS: Final = 6.0  # three beats
LOST_SECONDS: Final = 30.0
_MAX_DEPARTED: Final = 16


@dataclass(frozen=True, slots=True)
class _Left:
    node: Node
    reason: str
    at: float


class Registry:
    """Seconds are of one monotonic clock, the head's; nothing that a node says about time is believed."""

    def __init__(self, head: Node) -> None:
        self._head = head
        self._nodes: dict[str, tuple[Node, float]] = {}
        self._left: list[_Left] = []

    def beat(self, node: Node, now: float) -> None:
        """A node is there: for the first time, or still. One that has left has another id when it comes back: a beat
        with the old one was on its way when it left."""
        if any(left.node.id == node.id for left in self._left):
            return
        self._nodes[node.id] = (node, now)
        self._left = [left for left in self._left if left.node.address != node.address]

    def leave(self, id: str, reason: str, now: float) -> None:
        if known := self._nodes.pop(id, None):
            self._left = [*self._left, _Left(known[0], reason, now)][-_MAX_DEPARTED:]

    def same_address(self, node: Node, now: float) -> Node | None:
        """Another node that is in with this one's address. A lost node's place is free."""
        for other in [self._head, *(known for known, at in self._nodes.values() if now - at < LOST_SECONDS)]:
            if other.id != node.id and other.address == node.address:
                return other
        return None

    def members(self) -> list[Node]:
        """All nodes but the head, heard or not, in the order in which they joined."""
        return [node for node, _ in self._nodes.values()]

    def rows(self, memories: dict[str, Memory], now: float) -> list[NodeRow]:
        """The head first. ``memories``: node id -> what it just answered, which counts as heard."""
        rows = [self._row(self._head, 0.0, memories)]
        for node, at in self._nodes.values():
            rows.append(self._row(node, 0.0 if node.id in memories else now - at, memories))
        return rows

    def departed(self, now: float) -> list[Departed]:
        return [Departed(left.node.name, left.node.address, left.reason, now - left.at) for left in self._left]

    def _row(self, node: Node, age: float, memories: dict[str, Memory]) -> NodeRow:
        return NodeRow(node=node, state=state_at(age), age_seconds=age, memory=memories.get(node.id))


def state_at(age_seconds: float) -> str:
    """``in``, ``silent`` (perhaps a slow moment), ``lost``."""
    return "in" if age_seconds <= SILENT_SECONDS else "silent" if age_seconds <= LOST_SECONDS else "lost"


def num_in(rows: Iterable[NodeRow]) -> int:
    return sum(row.state == "in" for row in rows)
