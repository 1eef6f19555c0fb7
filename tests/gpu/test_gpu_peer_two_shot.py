"""The two-shot sum by peer memory over the GPUs of this host: sums, equal bits, replays of a graph, a missing rank."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from aphro_kernels.peer_all_reduce import peer_all_reduce_reference
from aphro_kernels.peer_rows import PeerRows, build_peer_rows, send, send_all, shares
from aphro_kernels.peer_two_shot import peer_two_shot

from tests.gpu.all_gpus import NUM_GPUS, everybodys, join, needs_two, run_over_all_gpus

pytestmark = needs_two
WIDTH = 4096


def _compare(rank: int, store: str) -> None:
    device = join(rank, store)
    for dtype in (torch.bfloat16, torch.float32):
        peers = build_peer_rows(dist.group.WORLD, 1500, WIDTH, dtype, device)
        dist.barrier()
        gain = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        for num_rows in (1, 65, 512, 1500, 1, 1024, 1111):
            torch.manual_seed(num_rows + rank)
            x = torch.randn(num_rows, WIDTH, device=device).to(dtype)
            torch.manual_seed(num_rows)
            residual = torch.randn(num_rows, WIDTH, device=device).to(dtype)
            expected = peer_all_reduce_reference(everybodys(x))
            send_all(x, peers)
            y = peer_two_shot(x, peers, out=torch.full_like(x, math.nan))
            torch.testing.assert_close(y, expected, atol=tolerance, rtol=tolerance)
            theirs = residual.clone()
            expected = peer_all_reduce_reference(everybodys(x), theirs, gain, 1e-5)
            own = shares(num_rows, NUM_GPUS)[rank]
            for is_shared_out in (False, True):
                mine = residual.clone()
                send_all(x, peers)
                options = {"residual": mine, "gain": gain, "eps": 1e-5}
                y = peer_two_shot(x, peers, **options, is_shared_out=is_shared_out).clone()  # type: ignore[arg-type]
                torch.testing.assert_close(y, expected, atol=tolerance, rtol=tolerance)
                told = slice(own.start, own.stop) if is_shared_out else slice(None)
                torch.testing.assert_close(mine[told], theirs[told], atol=tolerance, rtol=tolerance)
                for other in everybodys(y):
                    assert torch.equal(other, y)
        _replay(rank, peers, dtype, device)
        assert int(peers.status) == 0
    dist.destroy_process_group()


def _replay(rank: int, peers: PeerRows, dtype: torch.dtype, device: torch.device) -> None:
    """A graph of products, whose rows travel beside them, and sums, many times, each rank delayed in its turn."""
    sizes = (600, 512, 1500, 1024)
    xs = [torch.empty(rows, 64, device=device, dtype=dtype) for rows in sizes]
    weight = torch.full((64, WIDTH), 1 / 64, device=device, dtype=dtype)
    outs = [torch.empty(rows, WIDTH, device=device, dtype=dtype) for rows in sizes]

    copies = torch.cuda.Stream(device)

    def run() -> None:
        for x, out in zip(xs, outs, strict=True):
            owned = shares(len(x), NUM_GPUS)
            for owner in (*range(rank + 1, NUM_GPUS), *range(rank + 1)):
                rows = slice(owned[owner].start, owned[owner].stop)
                torch.mm(x[rows], weight, out=out[rows])
                if owner != rank:
                    copies.wait_stream(torch.cuda.current_stream())
                    with torch.cuda.stream(copies):
                        send(out, owner, peers)
            torch.cuda.current_stream().wait_stream(copies)
            peer_two_shot(out, peers, out=out)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
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
    peers = build_peer_rows(dist.group.WORLD, 4, WIDTH, torch.bfloat16, device)
    dist.barrier()
    if rank == 0:
        started = time.monotonic()
        peer_two_shot(torch.ones(2, WIDTH, device=device, dtype=torch.bfloat16), peers, max_polls=100_000)
        torch.cuda.synchronize()
        assert int(peers.status) == 1
        assert time.monotonic() - started < 20
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("work", [_compare, _alone])
def test_over_all_gpus(work: Callable[[int, str], None]) -> None:
    run_over_all_gpus(work)
