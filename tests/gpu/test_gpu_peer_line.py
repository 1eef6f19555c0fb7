"""Messages from GPU to GPU: in order and whole in replays of a graph, one end late in its turn, an end that is gone."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from aphro_kernels.peer_line import PeerLine, join_peer_line, peer_line_bytes, put, take_
from aphro_kernels.peer_rows import allocate_shared
from torch.distributed import _symmetric_memory as symmetric

from aphro_core.distributed import links as links_of
from aphro_core.distributed.stage_lines import Messages, open_lines
from aphro_core.parallel.shard import build_plan
from tests.core.worker.test_batch import SPEC
from tests.gpu.all_gpus import NUM_GPUS, join, needs_two, run_over_all_gpus

pytestmark = needs_two
MAX_ROWS = 2048


def _open(rank: int, device: torch.device, row_bytes: int, programs: int, num_slots: int) -> list[PeerLine]:
    """From each rank to the one behind it, the first behind the last: its ends of what comes and goes."""
    shape = {"num_slots": num_slots, "max_rows": MAX_ROWS, "row_bytes": row_bytes}
    memory = allocate_shared(peer_line_bytes(**shape), device)
    handle = symmetric.rendezvous(memory, dist.group.WORLD)
    memory.zero_()
    torch.cuda.synchronize(device)
    dist.barrier()
    others = [(rank - 1) % NUM_GPUS, (rank + 1) % NUM_GPUS]
    return [join_peer_line(memory, handle.buffer_ptrs[other], programs=programs, **shape) for other in others]


def _one_slot(rank: int, store: str) -> None:
    _exchange(join(rank, store), rank, 1)


def _four_slots(rank: int, store: str) -> None:
    _exchange(join(rank, store), rank, 4)


def _exchange(device: torch.device, rank: int, num_slots: int) -> None:
    """Each sends to the next one, and takes what the one before sends."""
    for width, dtype, programs in ((4096, torch.bfloat16, 128), (1, torch.int64, 1), (34, torch.float32, 3)):
        before, behind = _open(rank, device, width * dtype.itemsize, programs, num_slots)
        xs = [torch.zeros(rows, width, device=device, dtype=dtype) for rows in (128, 1, MAX_ROWS, 77)]
        found = [torch.zeros_like(x) for x in xs]

        def run() -> None:
            for x, out in zip(xs, found, strict=True):  # noqa: B023
                put(x, behind)  # noqa: B023
                x.add_(1)  # at once: it has been read
                take_(out, before)  # noqa: B023

        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        for replay in range(40):
            for x in xs:
                x.fill_(replay + 50 * (rank % 2))
            if replay % (2 * NUM_GPUS) == rank:
                torch.cuda._sleep(3_000_000)
            graph.replay()
            expected = replay + 50 * ((rank - 1) % NUM_GPUS % 2)
            assert all(bool((out == expected).all()) for out in found), (replay, width)
        assert not int(before.status)
        assert not int(behind.status)
        dist.barrier()
    dist.destroy_process_group()


def _alone(rank: int, store: str) -> None:
    """A reader that nobody writes to ends, with nothing done; so does a writer whose reader is gone."""
    device = join(rank, store)
    before, behind = _open(rank, device, 64, 2, 1)
    x = torch.full((4, 16), 7, dtype=torch.int32, device=device)
    if rank == 0:
        started = time.monotonic()
        take_(x, before, max_polls=100_000)
        put(x, behind, max_polls=100_000)
        torch.cuda.synchronize()
        assert (int(before.status), int(behind.status)) == (1, 0)
        put(x, behind, max_polls=100_000)
        torch.cuda.synchronize()
        assert int(behind.status) == 1
        assert bool((x == 7).all())
        assert time.monotonic() - started < 20
    dist.barrier()
    dist.destroy_process_group()


def _stages(rank: int, store: str) -> None:
    """Hidden states and tokens of as many stages as there are GPUs go by peer memory, and more of them than slots."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    plan = build_plan(SPEC, 1, NUM_GPUS)
    links = links_of.join(plan, rank, lambda: dist.FileStore(store, NUM_GPUS), device, 60.0)
    links = open_lines(links, plan, rank, Messages(64, 256, 8), device, nullcontext())
    is_first, is_last = rank == 0, rank == NUM_GPUS - 1
    assert (links.stage._line is None, links.stage._line_behind is None) == (is_first, is_last)
    assert (links.tokens is not None) == (is_first or is_last)
    for step in range(20):
        x = torch.full((1 + step * 3, 64), step, dtype=torch.float32, device=device)
        tokens = torch.full((1 + step % 8,), step, device=device)
        if not is_first:
            links.stage.receive_(x.zero_())
            assert bool((x == step + rank - 1).all())
            x += 1
        if not is_last:
            links.stage.send(x)
        elif links.tokens is not None:
            links.tokens.send(tokens)
        if is_first and links.tokens is not None:
            assert torch.equal(links.tokens.receive(len(tokens), device), tokens)
    torch.cuda.synchronize()
    dist.barrier()
    links.close()


@pytest.mark.parametrize("work", [_one_slot, _four_slots, _alone, _stages])
def test_over_all_gpus(work: Callable[[int, str], None]) -> None:
    run_over_all_gpus(work)
