"""What a sum over a tensor-parallel group costs, measured: small ones for their time, big ones for bytes a second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Final

import torch

from aphro_core.distributed.tensor_group import TensorParallelGroup
from aphro_core.messages.steps import LinkCost

_SMALL_SUMS: Final = 16
_BIG_BYTES: Final = 4 << 20
_BIG_SUMS: Final = 3
_MOST_SECONDS: Final = 5.0  # for all of it: a slow link has said enough by then


def measure_link(group: TensorParallelGroup, hidden_size: int, dtype: torch.dtype, device: torch.device) -> LinkCost:
    """Called by all ranks of the group together. Bytes/s are those that a rank sends, 2 (n - 1) / n of what it sums."""
    one_token = torch.zeros(1, hidden_size, dtype=dtype, device=device)
    many = torch.zeros(_BIG_BYTES // (hidden_size * dtype.itemsize) + 1, hidden_size, dtype=dtype, device=device)
    wait = torch.cuda.synchronize if device.type == "cuda" else _nothing
    _time(lambda: group.all_reduce_(one_token), wait)  # whatever is set up at a first one
    seconds = statistics.median(_time(lambda: group.all_reduce_(one_token), wait) for _ in range(_SMALL_SUMS))
    first = _time(lambda: group.all_reduce_(many), wait)
    # all ranks must agree on how many follow: the slowest decides
    slowest = torch.tensor([first], dtype=torch.float32, device=device)
    group.all_reduce_(slowest)
    repeats = _BIG_SUMS if float(slowest) / group.size * _BIG_SUMS < _MOST_SECONDS else 0
    big = min([first, *(_time(lambda: group.all_reduce_(many), wait) for _ in range(repeats))])
    return LinkCost(seconds, many.nbytes * 2 * (group.size - 1) / group.size / big)


def _time(work: Callable[[], object], wait: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def _nothing() -> None:
    pass
