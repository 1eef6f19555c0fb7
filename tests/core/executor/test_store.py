"""What ranks tell each other while they meet."""

from __future__ import annotations

from aphro_core.executor.store import GroupStore
from aphro_core.messages.steps import StoreCall, StoreReply


def test_the_operations_of_a_store() -> None:
    store = GroupStore()
    assert store.answer(StoreCall("check", ["a"])) == StoreReply(number=0)
    assert store.answer(StoreCall("get", ["a"])) == StoreReply()
    store.answer(StoreCall("set", ["a"], b"\x00\xff"))
    assert store.answer(StoreCall("get", ["a"])).value == b"\x00\xff"
    assert [store.answer(StoreCall("add", ["n"], amount=amount)).number for amount in (2, 3, -1)] == [2, 5, 4]
    assert store.answer(StoreCall("get", ["n"])).value == b"4"
    assert store.answer(StoreCall("check", ["a", "n"])).number == 1
    assert store.answer(StoreCall("check", ["a", "b"])).number == 0
    assert [store.answer(StoreCall("delete", ["a"])).number for _ in range(2)] == [1, 0]
