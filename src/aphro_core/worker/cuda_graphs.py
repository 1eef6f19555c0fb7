"""A decode step as CUDA graphs, one for each number of rows that steps are padded to, all in one pool of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


def row_buckets(max_rows: int) -> tuple[int, ...]:
    """Rows that steps are padded to: 1, 2, 4, 8, 16, 24, 32, every 16 to 256, every 32 to ``max_rows``, and that."""
    sizes = [1, 2, 4, 8, 16, 24, *range(32, 257, 16), *range(288, max_rows, 32)]
    return (*(size for size in sizes if size < max_rows), max_rows)


class DecodeSteps(Protocol):
    """Runs the decode step of a padded number of rows, whose inputs and outputs stand in fixed memory."""

    def __call__(self, num_rows: int) -> None: ...


class CudaGraphs:
    """Captured when built, the largest first: the smaller ones then find the pool large enough."""

    def __init__(
        self,
        decode: Callable[[int], None],
        sizes: tuple[int, ...],
        device: torch.device,
        on_progress: Callable[[int, int], None],
    ) -> None:
        """``decode`` must touch fixed memory only, and may not wait for the device. It runs once without a graph for
        each size first: whatever is compiled or made lazily cannot be while a graph is captured."""
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        pool = None
        for done, size in enumerate(reversed(sizes)):
            decode(size)
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize(device)
            # thread_local: the watchdog of a communicator may ask for events meanwhile
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                decode(size)
            pool = pool or graph.pool()
            self._graphs[size] = graph
            on_progress(done + 1, len(sizes))

    def __call__(self, num_rows: int) -> None:
        self._graphs[num_rows].replay()
