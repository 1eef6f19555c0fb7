"""Where the ranks of a group on several hosts meet: a store that the engine keeps, asked through the rank's channel.

No port listens for it, so nobody else can read or write what ranks tell each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Final

from torch.distributed import Store  # type: ignore[attr-defined]

from aphro_core.messages.steps import StoreCall, StoreReply

_LOOK_SECONDS: Final = 0.005  # between looks for a key that another rank is about to set


class RelayedStore(Store):
    """Process groups call it from threads of their own, so ``ask`` must allow that."""

    def __init__(self, ask: Callable[[StoreCall], StoreReply], timeout_seconds: float) -> None:
        super().__init__()
        self._ask = ask
        self._timeout = timedelta(seconds=timeout_seconds)

    def set(self, key: str, value: str | bytes) -> None:
        self._ask(StoreCall("set", [key], value.encode() if isinstance(value, str) else bytes(value)))

    def get(self, key: str) -> bytes:
        """Waits for the key. Raises RuntimeError when it does not come."""
        self.wait([key])
        value = self._ask(StoreCall("get", [key])).value
        assert value is not None
        return value

    def add(self, key: str, amount: int) -> int:
        return self._ask(StoreCall("add", [key], amount=amount)).number

    def check(self, keys: list[str]) -> bool:
        return bool(self._ask(StoreCall("check", list(keys))).number)

    def delete_key(self, key: str) -> bool:
        return bool(self._ask(StoreCall("delete", [key])).number)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        allowed = self._timeout if timeout is None else timeout
        deadline = time.monotonic() + allowed.total_seconds()
        while not self.check(keys):
            if time.monotonic() > deadline:
                raise RuntimeError(f"Timed out waiting for {', '.join(keys)} of other ranks after {allowed}")
            time.sleep(_LOOK_SECONDS)

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout = timeout

    def has_extended_api(self) -> bool:
        return False
