"""What only the head answers: who may join, who is in, which models run; and telling all to end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final, TypeVar

from aphro_core.channel import ChannelClosedError
from aphro_core.cluster.answers import memory_now
from aphro_core.cluster.messages import (
    Announce,
    Answer,
    AskMemory,
    Beat,
    Done,
    Down,
    Greeting,
    Hello,
    Leaving,
    Memory,
    MemoryNow,
    Model,
    Node,
    Refused,
    Status,
)
from aphro_core.cluster.registry import Registry
from aphro_core.cluster.wire import Serving, ask
from aphro_core.errors import ClusterError

_ASK_SECONDS: Final = 3.0
_DOWN_SECONDS: Final = 20.0
_MAX_ASKED: Final = 32  # nodes at once
Result = TypeVar("Result")


class Headquarters:
    """One lock guards what threads share; nobody is asked anything while it is held."""

    def __init__(self, head: Node, token: str, control_port: int, environment: dict[str, str]) -> None:
        self._head = head
        self._token = token
        self._port = control_port
        self._environment = environment
        self._registry = Registry(head)
        self._models: list[Model] = []
        self._lock = threading.Lock()

    def greet(self, hello: Hello) -> Answer:
        with self._lock:
            other = self._registry.same_address(hello.node, time.monotonic())
        if other is None:
            return Greeting(self._head, self._environment)
        if other.id != self._head.id and self._id_at(other.address) == hello.node.id:
            self.hear(Leaving(other.id, "its member was killed"))  # the same host, anew
            return Greeting(self._head, self._environment)
        return Refused(
            f"{other.name} ({other.role}) is in the cluster with the address {other.address} already",
            "end that one first, or give this host an address of its own: --advertise ADDRESS",
        )

    def hear(self, message: Beat | Leaving) -> Answer:
        with self._lock:
            if isinstance(message, Beat):
                self._registry.beat(message.node, time.monotonic())
            else:
                self._registry.leave(message.id, message.reason, time.monotonic())
        return Done()

    def status(self) -> Status:
        """Every node is asked now; one that does not answer is shown with the age of its last heartbeat."""
        answers = self._of_members(self._memory_of)
        memories = {id: memory for id, memory in answers.items() if isinstance(memory, Memory)}
        memories[self._head.id] = memory_now()
        with self._lock:
            now = time.monotonic()
            return Status(self._registry.rows(memories, now), self._registry.departed(now), list(self._models))

    def hold(self, announce: Announce, channel: Serving) -> None:
        """The model is listed until its connection ends."""
        with self._lock:
            self._models.append(announce.model)
        try:
            with suppress(ChannelClosedError):
                channel.send(Done())
                channel.set_timeout(None)
                channel.receive()
        finally:
            with self._lock:
                self._models.remove(announce.model)

    def end_members(self, reason: str) -> dict[str, str]:
        """Node name -> why it could not be told, or what it could not end."""
        answers = self._of_members(lambda node: self._end(node, reason))
        with self._lock:
            names = {node.id: node.name for node in self._registry.members()}
        return {names.get(id, id): problem for id, problem in answers.items() if problem}

    def _memory_of(self, node: Node) -> Memory | None:
        answer = self._ask_memory(node.address)
        return answer.memory if answer is not None and answer.id == node.id else None

    def _id_at(self, address: str) -> str:
        """Whoever has the door there now; "" where nobody answers."""
        answer = self._ask_memory(address)
        return "" if answer is None else answer.id

    def _ask_memory(self, address: str) -> MemoryNow | None:
        with suppress(ClusterError):
            answer = ask(address, self._port, self._token, AskMemory(), timeout=_ASK_SECONDS)
            return answer if isinstance(answer, MemoryNow) else None
        return None

    def _end(self, node: Node, reason: str) -> str:
        try:
            answer = ask(node.address, self._port, self._token, Down(reason), timeout=_DOWN_SECONDS)
        except ClusterError as error:
            return error.message
        return "; ".join(answer.problems.values()) if isinstance(answer, Done) else str(answer)

    def _of_members(self, what: Callable[[Node], Result]) -> dict[str, Result]:
        with self._lock:
            members = self._registry.members()
        if not members:
            return {}
        with ThreadPoolExecutor(min(len(members), _MAX_ASKED)) as pool:
            return dict(zip((node.id for node in members), pool.map(what, members), strict=True))
