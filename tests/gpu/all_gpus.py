"""A process a GPU, all in one NCCL group: for tests of what GPUs of a host do together."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

NUM_GPUS = torch.cuda.device_count()
needs_two = pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")


def run_over_all_gpus(work: Callable[[int, str], None]) -> None:
    """``work`` (rank, store) in each process; it begins with :func:`join`."""
    with tempfile.NamedTemporaryFile() as store:
        multiprocessing.spawn(work, args=(store.name,), nprocs=NUM_GPUS)


def join(rank: int, store: str) -> torch.device:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl", store=dist.FileStore(store, NUM_GPUS), rank=rank, world_size=NUM_GPUS, device_id=device
    )
    return device


def everybodys(x: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(x) for _ in range(NUM_GPUS)]
    dist.all_gather(parts, x)
    return parts
