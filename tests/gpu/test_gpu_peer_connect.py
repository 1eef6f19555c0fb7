"""Ranks whose GPUs are to share memory: one without any left keeps nobody waiting, and all may try again. It fills the
last GPU for a moment: nothing else may run there."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from aphro_core.distributed.tensor_group import TensorParallelGroup
from tests.gpu.all_gpus import NUM_GPUS, join, needs_two, run_over_all_gpus

pytestmark = needs_two
SHAPE = (4096, torch.bfloat16)
ROWS = 32_768
_LEFT_BYTES = 64 * 2**20  # less than the buffers, and enough for a vote


def _connect(rank: int, store: str) -> None:
    device = join(rank, store)
    group = TensorParallelGroup(rank, NUM_GPUS, dist.group.WORLD)
    x = torch.ones(4, 4096, dtype=torch.bfloat16, device=device)
    group.all_reduce_(x)  # the communicator has what it needs
    free = torch.cuda.mem_get_info(device)[0]
    kept = torch.empty(free - _LEFT_BYTES if rank == NUM_GPUS - 1 else 0, dtype=torch.uint8, device=device)
    began = time.monotonic()
    group.connect(*SHAPE, device, ROWS)
    assert group._peers is None
    assert time.monotonic() - began < 20
    del kept
    torch.cuda.empty_cache()
    assert group.all_reduce_(x).unique().tolist() == [NUM_GPUS**2]
    group.connect(*SHAPE, device, ROWS)
    assert group._peers is not None
    assert group.all_reduce_(x).unique().tolist() == [NUM_GPUS**3]
    torch.cuda.synchronize()
    dist.barrier()


def test_a_rank_without_memory_keeps_nobody_waiting() -> None:
    run_over_all_gpus(_connect)
