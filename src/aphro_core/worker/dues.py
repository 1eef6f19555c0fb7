"""What a rank whose step failed still owes its peers: the collectives that they wait in, filled with NaN.

So a failed step ends on every rank, and no process has to. NaN makes sure that no token of it counts: whatever adds one
of these sums is NaN to the end, where nothing can be drawn from it, and the step is answered as failed. A step that
draws nothing says nothing, and one may fail when all its sums are made: so the rank pays in the same way for every step
that follows, until all are told to forget. What it lacks in its cache is never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aphro_core.distributed.links import Links
from aphro_core.messages.steps import StepPlan
from aphro_core.parallel.shard import RankShard
from aphro_core.worker.prompt_logprobs import PROMPT_ROWS, asking_entries
from aphro_core.worker.sequences import SequenceState


@dataclass(frozen=True)
class Dues:
    """All collectives of one step of a rank, in order."""

    num_tokens: int  # rows of hidden states, padding included
    gathers: Sequence[int]  # rows of logits of each, those that are drawn from last
    num_handed_out: int = 0  # tokens that tp rank 0 tells the others, and the last stage the first
    num_kept: int | None = None  # rows that the last layer goes on with; None: all


def prompt_gathers(plan: StepPlan, sequences: dict[int, SequenceState]) -> list[int]:
    """Rows of the logits that prompt log-probabilities take, as worker/prompt_logprobs.py cuts them."""
    rows = []
    for entry in asking_entries(plan, sequences):
        stop = min(entry.start + entry.num_tokens, sequences[entry.seq_id].row.num_prompt_tokens - 1)
        rows += [min(PROMPT_ROWS, stop - start) for start in range(entry.start, stop, PROMPT_ROWS)]
    return rows


@torch.inference_mode()
def pay(dues: Dues, links: Links, shard: RankShard, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Take part in what is left of the step. Raises RuntimeError when a peer is gone."""
    tensor, stage = links.tensor, links.stage
    ruin = torch.full((dues.num_tokens, hidden_size), torch.nan, dtype=dtype, device=device)
    if not shard.has_embedding and not stage.has_received:
        stage.receive((dues.num_tokens, hidden_size), dtype, device)
    num_sums = 2 * len(shard.layers) + shard.has_embedding  # of attention and MLP of each layer, and the embedding's
    while tensor.size > 1 and tensor.num_sums < num_sums:
        tensor.all_reduce_(ruin if tensor.num_sums < num_sums - 2 else ruin[: dues.num_kept])
    if not shard.has_head:
        if not stage.has_sent:
            stage.send(ruin)
        return
    for index in range(tensor.num_gathers, len(dues.gathers)):
        rows = dues.gathers[index]
        is_drawn_from = dues.num_handed_out > 0 and index == len(dues.gathers) - 1
        ruin = torch.full((rows, len(shard.vocab)), torch.nan, dtype=dtype, device=device)
        place = tensor.logits if is_drawn_from else None
        tensor.gather_columns(ruin, None if place is None else place.rows[:rows])
    if not dues.num_handed_out:
        return
    tokens = torch.zeros(dues.num_handed_out, dtype=torch.int64, device=device)
    if not tensor.num_broadcasts:
        tensor.broadcast_(tokens)
    if links.tokens is not None and not links.tokens.has_passed:
        links.tokens.send(tokens)
