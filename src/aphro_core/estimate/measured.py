"""An estimate beside what the workers of a start found: the rows that ``run`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from aphro_core.estimate.balance import RankBalance
from aphro_core.messages.steps import WorkerLoaded

COLUMNS: Final = ("rank", "weights", "KV memory", "blocks", "difference")


def compare_memory(expected: Sequence[RankBalance], measured: Sequence[WorkerLoaded]) -> list[tuple[str, ...]]:
    """A row a rank for ``COLUMNS``: estimated / measured, and the measured blocks against the estimated ones."""
    rows: list[tuple[str, ...]] = []
    for balance, loaded in zip(expected, measured, strict=True):
        before, now = balance.num_blocks, loaded.num_blocks
        rows.append(
            (
                str(loaded.rank),
                _pair(balance.weights_bytes, loaded.weights_bytes),
                _pair(max(balance.left_bytes, 0), loaded.kv_bytes),
                f"{before} / {now}",
                f"{now / before - 1:+.1%}" if before else "-",
            )
        )
    return rows


def _pair(before: int, now: int) -> str:
    return f"{before / 2**30:.2f} / {now / 2**30:.2f} GiB"
