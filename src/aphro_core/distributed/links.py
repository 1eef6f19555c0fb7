"""All that ties a rank to others, and how they meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from aphro_core.distributed.stage_links import StageLink, TokenLink
from aphro_core.distributed.tensor_group import TensorParallelGroup
from aphro_core.parallel.shard import RankShard, ShardingPlan


@dataclass(frozen=True)
class Links:
    """All that ties a rank to others. ``tokens`` only on the first and last of several stages of GPUs."""

    tensor: TensorParallelGroup
    stage: StageLink
    tokens: TokenLink | None = None
    store: Store | None = None  # the groups go on asking it, and torch alone does not keep one made in Python

    def begin_step(self) -> None:
        """Count its collectives from here on."""
        self.tensor.begin_step()
        self.stage.begin_step()
        if self.tokens is not None:
            self.tokens.begin_step()

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
    """Meet the other ranks in a store. Returns when all have come; raises after ``timeout_seconds``."""
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
    tokens = _token_link(plan, rank) if device.type == "cuda" and plan.pp_size > 1 else None
    links = Links(TensorParallelGroup(shard.tp_rank, plan.tp_size, group), stage, tokens, store)
    if device.type == "cuda" and plan.pp_size > 1:
        _open_lines(links, shard, device)
    return links


def _open_lines(links: Links, shard: RankShard, device: torch.device) -> None:
    """NCCL makes the buffers of a line of messages with the first one: here, before the KV cache is sized."""
    token = torch.zeros(1, dtype=torch.int64, device=device)
    if not shard.has_embedding:
        links.stage.receive((1,), token.dtype, device)
    if not shard.has_head:
        links.stage.send(token)
    if links.tokens is not None and shard.has_embedding:
        links.tokens.receive(1, device)
    elif links.tokens is not None:
        links.tokens.send(token)
    torch.cuda.synchronize(device)


def _stage_group(plan: ShardingPlan, rank: int) -> dist.ProcessGroup | None:
    """Of the ranks of one stage; None where that is one."""
    group = None
    for pp_rank in range(plan.pp_size if plan.tp_size > 1 else 0):  # every rank makes every group, in one order
        made = dist.new_group([pp_rank * plan.tp_size + tp_rank for tp_rank in range(plan.tp_size)])
        if pp_rank == plan.ranks[rank].pp_rank:
            group = made
    return group


def _token_link(plan: ShardingPlan, rank: int) -> TokenLink | None:
    """Between the ranks of the first and the last stage that have the same tp rank."""
    link = None
    last = (plan.pp_size - 1) * plan.tp_size
    for tp_rank in range(plan.tp_size):  # every rank takes part in the making of every group, in one order
        ends = [tp_rank, last + tp_rank]
        made = dist.new_group(ends)
        if rank in ends:
            link = TokenLink(ends[0] if rank == ends[1] else ends[1], made)
    return link
