"""Columns of all ranks in rank 0's memory over the GPUs of this host: right, in replays of a graph, a missing rank."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from aphro_kernels.peer_all_reduce import PeerMemory, build_peer_memory, peer_all_reduce
from aphro_kernels.peer_columns import PeerColumns, build_peer_columns, peer_columns, peer_columns_bytes
from aphro_kernels.peer_rows import allocate_shared
from aphro_kernels.sample import SamplingDials, build_sample_workspace, sample
from torch import Tensor

from tests.gpu.all_gpus import NUM_GPUS, everybodys, join, needs_two, run_over_all_gpus

pytestmark = needs_two


def _compare(rank: int, store: str) -> None:
    device = join(rank, store)
    sums = build_peer_memory(dist.group.WORLD, 1, 64, torch.float32, device)
    dist.barrier()
    for columns, dtype in ((10_000, torch.bfloat16), (4099, torch.float32), (100, torch.float32)):
        width = -(-columns // (128 * NUM_GPUS)) * 128  # the last ranks have padding, perhaps nothing else
        peers = _build(70, columns, dtype, device)
        for num_rows in (1, 7, 70, 33, 1):
            torch.manual_seed(100 * num_rows + rank)
            x = torch.randn(num_rows, width, device=device).to(dtype)
            expected = torch.cat(everybodys(x), dim=-1)[:, :columns]
            _meet(sums)
            found = peer_columns(x, peers)
            if rank == 0:
                assert torch.equal(found, expected)
            _compare_greedy(rank, x, expected, sums, peers)
        _replay(rank, sums, peers, width)
        assert int(peers.status) == 0
    dist.destroy_process_group()


def _compare_greedy(rank: int, x: Tensor, logits: Tensor, sums: PeerMemory, peers: PeerColumns) -> None:
    """Of rows that need not be whole the largest can be drawn; every third row is whole all the same."""
    num_rows, columns = logits.shape
    is_whole = torch.arange(num_rows, device=x.device) % 3 == 0
    peers.is_whole[:num_rows].copy_(is_whole)
    peers.rows.fill_(torch.nan)
    torch.cuda.synchronize()
    dist.barrier()
    _meet(sums)
    found = peer_columns(x, peers)
    if rank == 0:
        assert torch.equal(found[is_whole], logits[is_whole])
        zeros = torch.zeros(num_rows, device=x.device)
        dials = SamplingDials(zeros, zeros, zeros.int(), zeros, zeros.long())
        workspace = build_sample_workspace(num_rows, columns, x.device)
        tokens, is_bad = sample(found, zeros.long(), dials, workspace=workspace, peaks=peers.peaks)
        assert torch.equal(tokens, logits.argmax(dim=-1))
        assert not bool(is_bad.any())
    peers.is_whole.fill_(1)


def _build(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> PeerColumns:
    memory = allocate_shared(peer_columns_bytes(rows, columns, dtype), device)
    peers = build_peer_columns(dist.group.WORLD, memory, rows, columns, dtype)
    dist.barrier()
    return peers


def _meet(sums: PeerMemory) -> None:
    """Something that all ranks take part in stands between two calls."""
    peer_all_reduce(torch.ones(1, sums.width, device=sums.memory.device, dtype=sums.dtype), sums)


def _replay(rank: int, sums: PeerMemory, peers: PeerColumns, width: int) -> None:
    """A graph of calls of changing sizes, many times, each rank delayed in its turn, read behind each."""
    xs = [torch.zeros(rows, width, device=sums.memory.device, dtype=peers.rows.dtype) for rows in (3, 70, 1, 64)]
    kept: list[Tensor] = []

    def run() -> None:
        kept.clear()
        for x in xs:
            _meet(sums)
            kept.append(peer_columns(x, peers).clone())

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    owner = torch.arange(peers.rows.shape[1], device=sums.memory.device) // width
    for replay in range(30):
        for x in xs:
            x.fill_(float(rank + replay))
        if replay % NUM_GPUS == rank:
            torch.cuda._sleep(2_000_000)
        graph.replay()
        if rank == 0:
            for rows in kept:
                assert bool((rows == owner + replay).all())


def _alone(rank: int, store: str) -> None:
    device = join(rank, store)
    peers = _build(4, 256, torch.bfloat16, device)
    if rank == 0:
        started = time.monotonic()
        peer_columns(torch.ones(2, 128, device=device, dtype=torch.bfloat16), peers, max_polls=100_000)
        torch.cuda.synchronize()
        assert int(peers.status) == 1
        assert time.monotonic() - started < 20
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("work", [_compare, _alone])
def test_over_all_gpus(work: Callable[[int, str], None]) -> None:
    run_over_all_gpus(work)
