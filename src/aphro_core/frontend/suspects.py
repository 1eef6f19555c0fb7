"""Which request a death is blamed on: what was in the step, who caused it, and who was alone. Pure."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Final

import msgspec

from aphro_core.frontend.recovery_budget import WINDOW_SECONDS
from aphro_core.frontend.request_table import Row
from aphro_core.request import Request

_MAX_REFUSED: Final = 256  # fingerprints; the oldest is forgotten


class Suspects:
    """Strikes of requests, and the fingerprints of those that are not taken again.

    A request that was alone has a strike for every death under it; two within a minute, and it is refused. Of several
    requests nobody knows which one it was: unless the process was killed from outside, each is tried alone first in
    the next engine, and a request that is tried when that engine dies was the reason.
    """

    def __init__(self) -> None:
        self._strikes: dict[int, list[float]] = {}  # by the id of the row's first choice: seconds
        self._refused: OrderedDict[bytes, None] = OrderedDict()

    def take_death(
        self, rows: Sequence[Row], *, tried: Row | None, is_external: bool, now: float
    ) -> tuple[list[Row], list[Row]]:
        """(rows to refuse, rows to try alone) after an engine died with ``rows`` in its steps, ``tried`` alone."""
        if tried is not None and not is_external:
            return self._refuse(tried), []
        if len(rows) == 1:
            return self._strike(rows[0], now), []
        return [], [] if is_external else list(rows)

    def is_refused(self, request: Request) -> bool:
        return bool(self._refused) and fingerprint(request) in self._refused

    def forget(self, row: Row) -> None:
        """Its request has ended."""
        self._strikes.pop(row.choices[0].seq_id, None)

    def _strike(self, row: Row, now: float) -> list[Row]:
        recent = [then for then in self._strikes.get(row.choices[0].seq_id, []) if now - then < WINDOW_SECONDS]
        self._strikes[row.choices[0].seq_id] = [*recent, now]
        return self._refuse(row) if recent else []

    def _refuse(self, row: Row) -> list[Row]:
        self._refused[fingerprint(row.request)] = None
        if len(self._refused) > _MAX_REFUSED:
            self._refused.popitem(last=False)
        return [row]


def fingerprint(request: Request) -> bytes:
    """The same for requests that ask the engine for the same: prompt and sampling, whoever sends them."""
    asked = msgspec.msgpack.encode((list(request.prompt_token_ids), request.sampling))
    return hashlib.sha256(asked).digest()


def rows_of(rows: Collection[Row], seq_ids: Collection[int]) -> list[Row]:
    """Those that have a choice among ``seq_ids``."""
    wanted = set(seq_ids)
    return [row for row in rows if any(choice.seq_id in wanted for choice in row.choices)]
