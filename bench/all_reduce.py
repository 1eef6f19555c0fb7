"""Times the all-reduce by peer memory beside NCCL's on the GPUs of this host, in a CUDA graph of many calls.

First the sums of few rows, by one shot and by two, then those of many behind the product that makes them: NCCL's,
and by two shots, where rows are sent to the rank that adds them up behind the product or beside its other rows'.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
from aphro_kernels.peer_all_reduce import build_peer_memory, peer_all_reduce
from aphro_kernels.peer_rows import PeerRows, build_peer_rows, send, send_all, shares
from aphro_kernels.peer_two_shot import peer_two_shot
from aphro_kernels.rms_norm import add_rms_norm_
from torch import Tensor, multiprocessing

CALLS = 16
FEW = (1, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512)
MANY = (512, 1024, 2048, 4096, 8192)


def microseconds(call: Callable[[], object]) -> float:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    times = []
    for _ in range(12):
        dist.barrier()
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / CALLS)
    return statistics.median(times[2:])


def measure(rank: int, store: str, size: int, width: int) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", store=dist.FileStore(store, size), rank=rank, world_size=size, device_id=device)  # type: ignore[attr-defined]
    memory = build_peer_memory(dist.group.WORLD, 512, width, torch.bfloat16, device)
    gain = torch.ones(width, device=device, dtype=torch.bfloat16)
    peers = build_peer_rows(dist.group.WORLD, MANY[-1], width, torch.bfloat16, device)
    dist.barrier()
    if rank == 0:
        print(f"{size} x {torch.cuda.get_device_name()}, width {width}, bfloat16; us a call")
        print(f"{'rows':>6} {'KiB':>7} {'NCCL':>8} {'peer':>8} {'NCCL, add, norm':>17} {'fused':>8} {'two-shot':>8}")
    for rows in FEW:
        x = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
        residual, out = torch.zeros_like(x), torch.empty_like(x)

        def with_nccl(x: Tensor = x, residual: Tensor = residual) -> None:
            dist.all_reduce(x)
            add_rms_norm_(residual, x, gain, 1e-5)

        times = [
            microseconds(lambda x=x: dist.all_reduce(x)),
            microseconds(lambda x=x, out=out: peer_all_reduce(x, memory, out=out)),
            microseconds(with_nccl),
            microseconds(
                lambda x=x, residual=residual, out=out: peer_all_reduce(
                    x, memory, residual=residual, gain=gain, eps=1e-5, out=out
                )
            ),
            microseconds(
                lambda x=x, residual=residual: peer_two_shot(
                    x, peers, residual=residual, gain=gain, eps=1e-5, is_shared_out=True
                )
            ),
        ]
        x.zero_()
        if rank == 0:
            cells = f"{times[0]:8.1f} {times[1]:8.1f} {times[2]:17.1f} {times[3]:8.1f} {times[4]:8.1f}"
            print(f"{rows:6} {rows * width // 512:7} {cells}", flush=True)
    if rank == 0:
        print(f"\n{'inputs':>6} {'rows':>6} {'alone':>8} {'NCCL, add, norm':>17} {'sent behind':>11} {'beside':>8}")
    for inputs in (width // size, 14_336 // size):  # of the output and the down product of an 8B model
        for rows in MANY:
            times = with_products(rows, inputs, peers, gain)
            if rank == 0:
                cells = f"{times[0]:8.1f} {times[1]:17.1f} {times[2]:11.1f} {times[3]:8.1f}"
                print(f"{inputs:6} {rows:6} {cells}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def with_products(rows: int, inputs: int, peers: PeerRows, gain: Tensor) -> list[float]:
    """Of a product of ``rows`` rows, and with the sum, residual add and norm behind it."""
    x = torch.randn(rows, inputs, device=gain.device, dtype=gain.dtype)
    weight = torch.randn(peers.width, inputs, device=gain.device, dtype=gain.dtype) / inputs
    residual = torch.zeros(rows, peers.width, device=gain.device, dtype=gain.dtype)
    y = torch.empty_like(residual)
    owned, copies = shares(rows, peers.size), torch.cuda.Stream(gain.device)

    def multiply(part: range) -> None:
        torch.mm(x[part.start : part.stop], weight.t(), out=y[part.start : part.stop])

    def with_nccl() -> None:
        multiply(range(rows))
        dist.all_reduce(y)
        add_rms_norm_(residual, y, gain, 1e-5)

    def sent_behind() -> None:
        multiply(range(rows))
        send_all(y, peers)
        peer_two_shot(y, peers, residual=residual, gain=gain, eps=1e-5, is_shared_out=True)

    def sent_beside() -> None:
        for owner in (*range(peers.rank + 1, peers.size), *range(peers.rank)):
            multiply(owned[owner])
            copies.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(copies):
                send(y, owner, peers)
        multiply(owned[peers.rank])
        torch.cuda.current_stream().wait_stream(copies)
        peer_two_shot(y, peers, residual=residual, gain=gain, eps=1e-5, is_shared_out=True)

    calls = (lambda: multiply(range(rows)), with_nccl, sent_behind, sent_beside)
    return [microseconds(call) for call in calls]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    args = parser.parse_args()
    if args.gpus < 2:
        print("bench/all_reduce.py needs two GPUs", file=sys.stderr)
        return 1
    with tempfile.NamedTemporaryFile() as store:
        multiprocessing.spawn(measure, args=(store.name, args.gpus, args.width), nprocs=args.gpus)  # type: ignore[attr-defined]
    return 0


if __name__ == "__main__":
    sys.exit(main())
