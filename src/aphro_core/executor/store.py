"""What the ranks of one group tell each other while they meet: a table that lives and dies with the group."""

from __future__ import annotations

from typing import Final

from aphro_core.messages.steps import StoreCall, StoreReply

_MAX_KEYS: Final = 100_000  # far more than groups use: a rank gone wild must not fill this process


class GroupStore:
    """Answers StoreCalls one at a time; never waits, the ranks ask again."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def answer(self, call: StoreCall) -> StoreReply:
        key = call.keys[0] if call.keys else ""
        match call.op:
            case "set":
                self._put(key, call.value)
                return StoreReply()
            case "get":
                return StoreReply(value=self._values.get(key))
            case "add":
                number = int(self._values.get(key, b"0")) + call.amount
                self._put(key, b"%d" % number)
                return StoreReply(number=number)
            case "check":
                return StoreReply(number=int(all(key in self._values for key in call.keys)))
            case "delete":
                return StoreReply(number=int(self._values.pop(key, None) is not None))

    def _put(self, key: str, value: bytes) -> None:
        if key not in self._values and len(self._values) >= _MAX_KEYS:
            raise ValueError(f"ranks have set {_MAX_KEYS} keys while meeting")
        self._values[key] = value
