"""All that ties a rank to others, and how they meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from aphro_kernels.peer_columns import PeerColumns
from aphro_kernels.peer_line import PeerLine
from torch.distributed import Store  # type: ignore[attr-defined]

from aphro_core.distributed.stage_links import StageLink, TokenLink
from aphro_core.distributed.tensor_group import TensorParallelGroup
from aphro_core.parallel.shard import ShardingPlan


@dataclass(frozen=True)
class HeadLine:
    """An end of what the last stage and the first one share the head by (worker/shared_head.py)."""

    line: PeerLine  # from the last stage to the first: normed rows
    columns: PeerColumns  # of the last stage, which has rank 0 in them


@dataclass(frozen=True)
class Links:
    """All that ties a rank to others. ``tokens`` only on the first and last of several stages of GPUs, ``head`` if
    these have memory of each other's, too."""

    tensor: TensorParallelGroup
    stage: StageLink
    tokens: TokenLink | None = None
    head: HeadLine | None = None
    store: Store | None = None  # the groups go on asking it, and torch alone does not keep one made in Python
    shared: Any = None  # keeps the stages' mapping of each other's memory alive

    def begin_step(self) -> None:
        """Count its collectives from here on."""
        self.tensor.begin_step()
        self.stage.begin_step()
        if self.tokens is not None:
            self.tokens.begin_step()

    def meet(self, device: torch.device) -> None:
        """Return when all ranks have come, however late: what goes by peer memory is waited for a minute and a half,
        and then fails for good."""
        if dist.is_initialized():
            came = torch.zeros(1, device=device)
            dist.all_reduce(came)
            came.item()

    @contextmanager
    def hurried(self, seconds: float, usual_seconds: float) -> Iterator[None]:
        """Inside the block nobody waits longer for what another rank is to put into the store."""
        if self.store is None:
            yield
            return
        self.store.set_timeout(timedelta(seconds=min(seconds, usual_seconds)))
        try:
            yield
        finally:
            self.store.set_timeout(timedelta(seconds=usual_seconds))

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def join(
    plan: ShardingPlan, rank: int, open_store: Callable[[], Store], device: torch.device, timeout_seconds: float
) -> Links:
    """Meet the other ranks in a store. Returns when all have come; raises after ``timeout_seconds``.

    Stages on GPUs have no way to each other yet (stage_lines.py)."""
    shard = plan.ranks[rank]
    previous = rank - plan.tp_size if shard.pp_rank > 0 else None
    following = rank + plan.tp_size if shard.pp_rank < plan.pp_size - 1 else None
    world_size = plan.tp_size * plan.pp_size
    if world_size == 1:
        return Links(TensorParallelGroup(0, 1), StageLink(None, None))
    store = open_store()
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_seconds),
        device_id=device if device.type == "cuda" else None,
    )
    # of a single stage the group of all: another communicator would hold memory of its own
    group = dist.group.WORLD if plan.pp_size == 1 else _stage_group(plan, rank)
    stage = StageLink(previous, following, max_sends=plan.pp_size)
    return Links(TensorParallelGroup(shard.tp_rank, plan.tp_size, group), stage, store=store)


def _stage_group(plan: ShardingPlan, rank: int) -> dist.ProcessGroup | None:
    """Of the ranks of one stage; None where that is one."""
    group = None
    for pp_rank in range(plan.pp_size if plan.tp_size > 1 else 0):  # every rank makes every group, in one order
        made = dist.new_group([pp_rank * plan.tp_size + tp_rank for tp_rank in range(plan.tp_size)])
        if pp_rank == plan.ranks[rank].pp_rank:
            group = made
    return group
