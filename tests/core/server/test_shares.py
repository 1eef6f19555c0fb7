"""Shares of keys: a flood of one leaves places for the others, in the queue and in the engine."""

from __future__ import annotations

import anyio
import pytest

from aphro_core.errors import OverloadedError
from aphro_core.server.gate import Gate
from aphro_core.server.shares import Shares, share_of

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize(("whole", "num_keys", "share"), [(32, 0, 32), (32, 1, 32), (32, 2, 24), (1, 5, 1)])
def test_a_share_is_the_whole_for_a_single_key(whole: int, num_keys: int, share: int) -> None:
    assert share_of(whole, num_keys) == share


async def test_a_key_that_floods_the_queue_is_refused_and_others_are_not() -> None:
    gate = Gate(4, num_keys=2)
    flood = [gate.admit("a") for _ in range(3)]
    for admitted in flood:
        admitted.__enter__()
    with pytest.raises(OverloadedError, match="its share"), gate.admit("a"):
        pass
    with gate.admit("b"):
        assert gate.num_open == 4
        with pytest.raises(OverloadedError, match="4 requests are open"), gate.admit("b"):
            pass
    flood[0].__exit__(None, None, None)
    with gate.admit("a"):
        pass


async def test_turns_are_in_order_and_by_key() -> None:
    shares = Shares(2)
    began: list[str] = []
    may_end = anyio.Event()

    async def run(name: str, key: str, places: int = 1) -> None:
        async with shares.turn(key, places):
            began.append(name)
            await may_end.wait()

    async with anyio.create_task_group() as tasks:
        for name in ("a1", "a2", "a3"):
            tasks.start_soon(run, name, "a")
        tasks.start_soon(run, "a4", "a", 100)
        tasks.start_soon(run, "b1", "b")
        await anyio.wait_all_tasks_blocked()
        assert began == ["a1", "a2", "b1"]
        may_end.set()
    assert began == ["a1", "a2", "b1", "a3", "a4"], "one larger than its share has it alone, in its turn"


async def test_one_that_leaves_while_it_waits_holds_up_nobody() -> None:
    shares = Shares(1)
    began: list[str] = []
    async with anyio.create_task_group() as tasks, shares.turn("a", 1):
        with anyio.move_on_after(0.01):
            async with shares.turn("a", 1):
                began.append("left")

        async def run() -> None:
            async with shares.turn("a", 1):
                began.append("next")

        tasks.start_soon(run)
        await anyio.wait_all_tasks_blocked()
        assert began == []
    assert began == ["next"]
