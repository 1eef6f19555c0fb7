"""What goes between stages on GPUs, opened before the KV cache is sized: by peer memory, or else by NCCL."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import torch.distributed as dist
from aphro_kernels.peer_columns import join_peer_columns, peer_columns_bytes
from aphro_kernels.peer_line import PeerLine, join_peer_line, peer_line_bytes
from torch import Tensor

from aphro_core.distributed.links import HeadLine, Links
from aphro_core.distributed.peer_meeting import PeerMeeting
from aphro_core.distributed.stage_links import MOST_DUE, TokenLink
from aphro_core.parallel.shard import RankShard, ShardingPlan

_HIDDEN_SLOTS: Final = 2  # a stage may be so many steps ahead of the next one, which copies what it begins with
_HIDDEN_PROGRAMS: Final = 128  # a row of 8 KiB each where 128 decode


@dataclass(frozen=True)
class Messages:
    """At most, of one step."""

    num_tokens: int
    row_bytes: int  # of hidden states
    num_draws: int
    vocab_size: int = 0  # of a head that the last stage shares with the first one; 0: it does not
    dtype: torch.dtype = torch.bfloat16  # of logits


def open_lines(
    links: Links,
    plan: ShardingPlan,
    rank: int,
    messages: Messages,
    device: torch.device,
    hurry: AbstractContextManager[None],
) -> Links:
    """With a way for hidden states, and for tokens. All ranks of all stages call it together, once. Ranks meet on the
    way to each other's memory within ``hurry``; NCCL has its usual time, over hosts it needs more."""
    with hurry:
        opened = _open_peer_lines(links, plan, rank, messages, device)
    if opened is not None:
        return opened
    links = replace(links, tokens=token_link(plan, rank))
    _begin(links, plan, rank, device)
    return links


def _open_peer_lines(
    links: Links, plan: ShardingPlan, rank: int, messages: Messages, device: torch.device
) -> Links | None:
    meeting = PeerMeeting(rank, len(plan.ranks), dist.group.WORLD, device, "stages hand on all by NCCL")
    if plan.tp_size > 1 or not meeting.is_possible():  # tp gains nothing: no layer is chained
        return None
    shared = meeting.share(num_bytes(plan, messages))
    return None if shared is None else by_peer_memory(links, plan, rank, messages, *shared)


def _hidden_shape(messages: Messages) -> dict[str, int]:
    return {"num_slots": _HIDDEN_SLOTS, "max_rows": messages.num_tokens, "row_bytes": messages.row_bytes}


def _normed_shape(messages: Messages) -> dict[str, int]:
    return _hidden_shape(messages) | {"max_rows": messages.num_draws}


def _token_shape(plan: ShardingPlan, messages: Messages) -> dict[str, int]:
    # so that the last stage never waits with its tokens, nor with those of steps in flight when one has failed
    num_slots = 1 << (max(MOST_DUE, plan.pp_size) + plan.pp_size).bit_length()
    return {"num_slots": num_slots, "max_rows": messages.num_draws, "row_bytes": 8}


def num_bytes(plan: ShardingPlan, messages: Messages) -> int:
    """Of the memory of each rank."""
    lines = peer_line_bytes(**_hidden_shape(messages)) + peer_line_bytes(**_token_shape(plan, messages))
    if not messages.vocab_size:
        return lines
    columns = peer_columns_bytes(messages.num_draws, messages.vocab_size, messages.dtype)
    return lines + peer_line_bytes(**_normed_shape(messages)) + columns


def by_peer_memory(
    links: Links, plan: ShardingPlan, rank: int, messages: Messages, memory: Tensor, handle: Any
) -> Links:
    """A stage reads hidden states where the one before writes them, and is told by the one behind what it has read, in
    the same part of its memory; so do the first and the last one with tokens in the other part."""
    shard, cut = plan.ranks[rank], peer_line_bytes(**_hidden_shape(messages))

    def hidden(other: int) -> PeerLine:
        shape = _hidden_shape(messages)
        return join_peer_line(memory[:cut], handle.buffer_ptrs[other], programs=_HIDDEN_PROGRAMS, **shape)

    links.stage.go_by(
        None if shard.has_embedding else hidden(rank - plan.tp_size),
        None if shard.has_head else hidden(rank + plan.tp_size),
    )
    peer = _other_end(plan, rank)
    if peer is None:
        return replace(links, shared=handle)
    other = handle.buffer_ptrs[peer] + cut
    size = peer_line_bytes(**_token_shape(plan, messages))
    line = join_peer_line(memory[cut : cut + size], other, programs=1, **_token_shape(plan, messages))
    links = replace(links, tokens=TokenLink(peer, None, line), shared=handle)
    if not messages.vocab_size:
        return links
    return replace(links, head=_head_line(shard, messages, memory[cut + size :], other + size))


def _head_line(shard: RankShard, messages: Messages, memory: Tensor, other: int) -> HeadLine:
    """``memory`` of this rank, and the address of the ``other`` end's."""
    size = peer_line_bytes(**_normed_shape(messages))
    line = join_peer_line(memory[:size], other, programs=_HIDDEN_PROGRAMS, **_normed_shape(messages))
    first = memory.data_ptr() if shard.has_head else other
    shape = (messages.num_draws, messages.vocab_size, messages.dtype)
    columns = join_peer_columns(0 if shard.has_head else 1, 2, memory[size:], first + size, *shape, None)
    return HeadLine(line, columns)


def _other_end(plan: ShardingPlan, rank: int) -> int | None:
    """Of the way of tokens: the rank of the first or the last stage that has the same tp rank. None of a middle one."""
    shard, last = plan.ranks[rank], (plan.pp_size - 1) * plan.tp_size
    if shard.has_embedding:
        return last + shard.tp_rank
    return shard.tp_rank if shard.has_head else None


def token_link(plan: ShardingPlan, rank: int) -> TokenLink | None:
    """By a communicator of the ranks of the first and the last stage that have the same tp rank."""
    link = None
    last = (plan.pp_size - 1) * plan.tp_size
    for tp_rank in range(plan.tp_size):  # every rank takes part in the making of every group, in one order
        made = dist.new_group([tp_rank, last + tp_rank])
        if (peer := _other_end(plan, rank)) is not None and tp_rank == plan.ranks[rank].tp_rank:
            link = TokenLink(peer, made)
    return link


def _begin(links: Links, plan: ShardingPlan, rank: int, device: torch.device) -> None:
    """NCCL makes the buffers of a line of messages with the first one."""
    shard, token = plan.ranks[rank], torch.zeros(1, dtype=torch.int64, device=device)
    if not shard.has_embedding:
        links.stage.receive_(token)
    if not shard.has_head:
        links.stage.send(token)
    if links.tokens is not None and shard.has_embedding:
        links.tokens.receive(1, device)
    elif links.tokens is not None:
        links.tokens.send(token)
    torch.cuda.synchronize(device)
