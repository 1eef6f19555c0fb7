"""Ranks whose GPUs are to share memory: one without any left keeps nobody waiting, and all may try again. It fills the
last GPU for a moment: nothing else may run there."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from aphro_core.distributed.tensor_group import TensorParallelGroup
from aphro_core.peer_sums import Scattered
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


def _pay(rank: int, store: str) -> None:
    """As in a step with prompts that fails on the last rank between what it sent and its sum (worker/dues.py)."""
    device = join(rank, store)
    group = TensorParallelGroup(rank, NUM_GPUS, dist.group.WORLD)
    num_rows = 512 * NUM_GPUS
    group.connect(*SHAPE, device, num_rows)
    assert group._peers is not None
    gain = torch.ones(SHAPE[0], dtype=SHAPE[1], device=device)
    for is_failing in (False, True, False):
        x = torch.full((num_rows, SHAPE[0]), rank + 1.0, dtype=SHAPE[1], device=device)
        residual = torch.zeros_like(x)
        parts = group.parts(num_rows)
        assert len(parts) == NUM_GPUS
        if is_failing and rank == NUM_GPUS - 1:
            group.send(x, parts[0][0])
            del x
            ruin = torch.full((num_rows, SHAPE[0]), torch.nan, dtype=SHAPE[1], device=device)
            assert bool(group.all_reduce_(ruin).isnan().all())
            assert bool(group.all_reduce_(ruin).isnan().all())
            continue
        for owner, _ in parts:
            group.send(x, owner)
        normed = group.add_rms_norm_(residual, Scattered(x), gain, 1e-5, shares_out=True)
        assert normed is not None
        assert bool(normed.isnan().all() if is_failing else (normed == 1).all())
        again = group.all_reduce_(normed.clone())
        assert bool(again.isnan().all() if is_failing else (again == NUM_GPUS).all())
    torch.cuda.synchronize()
    dist.barrier()


def test_what_a_failed_rank_pays_ends_the_sums_of_the_others_in_nan_and_the_next_are_right() -> None:
    run_over_all_gpus(_pay)


def test_a_rank_without_memory_keeps_nobody_waiting() -> None:
    run_over_all_gpus(_connect)
