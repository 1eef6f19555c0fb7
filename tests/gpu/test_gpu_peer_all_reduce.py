"""The all-reduce by peer memory over the GPUs of this host: sums, equal bits, replays of a graph, a missing rank."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from aphro_kernels.peer_all_reduce import build_peer_memory, peer_all_reduce, peer_all_reduce_reference

from tests.gpu.all_gpus import NUM_GPUS, everybodys, join, needs_two, run_over_all_gpus

pytestmark = needs_two
WIDTH = 4096


def _compare(rank: int, store: str) -> None:
    device = join(rank, store)
    for dtype, programs in ((torch.bfloat16, 64), (torch.float32, 64), (torch.bfloat16, 256)):
        memory = build_peer_memory(dist.group.WORLD, 100, WIDTH, dtype, device, programs)
        dist.barrier()
        gain = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        for num_rows in (1, 7, 64, 100, 1, 65):  # 100 rows: programs with two each
            torch.manual_seed(num_rows + rank)
            x = torch.randn(num_rows, WIDTH, device=device).to(dtype)
            torch.manual_seed(num_rows)
            residual = torch.randn(num_rows, WIDTH, device=device).to(dtype)
            out = torch.full_like(x, math.nan)
            expected = peer_all_reduce_reference(everybodys(x))
            y = peer_all_reduce(x, memory, out=out)
            torch.testing.assert_close(y, expected, atol=tolerance, rtol=tolerance)
            mine, theirs = residual.clone(), residual.clone()
            expected = peer_all_reduce_reference(everybodys(x), theirs, gain, 1e-5)
            y = peer_all_reduce(x, memory, residual=mine, gain=gain, eps=1e-5, out=out.fill_(math.nan))
            torch.testing.assert_close(y, expected, atol=tolerance, rtol=tolerance)
            torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)
            for other in everybodys(y):
                assert torch.equal(other, y)
        _replay(rank, memory, dtype, device)
        assert int(memory.status) == 0
    dist.destroy_process_group()


def _replay(rank: int, memory: object, dtype: torch.dtype, device: torch.device) -> None:
    """A graph of many calls of changing sizes, many times, each rank delayed in its turn."""
    xs = [torch.full((rows, WIDTH), float(rank + 1), device=device, dtype=dtype) for rows in (1, 32, 3, 64, 1, 1, 100)]
    outs = [torch.empty_like(x) for x in xs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x, out in zip(xs, outs, strict=True):
            peer_all_reduce(x, memory, out=out)  # type: ignore[arg-type]
    for replay in range(30):
        for x in xs:
            x.fill_(float(rank + replay))
        if replay % NUM_GPUS == rank:
            torch.cuda._sleep(2_000_000)
        graph.replay()
        total = float(sum(range(NUM_GPUS)) + NUM_GPUS * replay)
        for out in outs:
            assert bool((out == total).all())


def _alone(rank: int, store: str) -> None:
    device = join(rank, store)
    memory = build_peer_memory(dist.group.WORLD, 4, WIDTH, torch.bfloat16, device)
    dist.barrier()
    x = torch.ones(2, WIDTH, device=device, dtype=torch.bfloat16)
    if rank == 0:
        started = time.monotonic()
        peer_all_reduce(x, memory, max_polls=100_000)
        torch.cuda.synchronize()
        assert int(memory.status) == 1
        assert time.monotonic() - started < 20
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("work", [_compare, _alone])
def test_over_all_gpus(work: Callable[[int, str], None]) -> None:
    run_over_all_gpus(work)
