"""Padded steps as CUDA graphs, one for each shape, all in one pool of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from aphro_core.worker.step_shapes import StepShape


class CudaGraphs:
    """Captured when built, the largest first: the smaller ones then find the pool large enough."""

    def __init__(
        self,
        rehearse: Callable[[StepShape], None],
        run: Callable[[StepShape], None],
        shapes: Sequence[StepShape],
        device: torch.device,
        on_progress: Callable[[int, int], None],
    ) -> None:
        """``run`` must touch fixed memory only, and may not wait for the device. ``rehearse`` launches the same kernels
        without a graph, for each shape first: nothing can be compiled, loaded or made lazily while one is captured."""
        self._graphs: dict[StepShape, torch.cuda.CUDAGraph] = {}
        pool = None
        for done, shape in enumerate(sorted(shapes, key=lambda shape: -shape.num_tokens)):
            rehearse(shape)
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize(device)
            # thread_local: the watchdog of a communicator may ask for events meanwhile
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                run(shape)
            pool = pool or graph.pool()
            self._graphs[shape] = graph
            on_progress(done + 1, len(shapes))

    def __call__(self, shape: StepShape) -> None:
        self._graphs[shape].replay()
