"""Log-probabilities of tokens from the model's raw logits, for sampled and for prompt tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aphro_core.messages.steps import TokenLogprobs
from aphro_core.worker.reductions import row_sum


def token_logprobs(logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
    """One entry a row of ``logits`` [rows, vocab] float32: the row's chosen token, then its ``num_top`` most likely.

    The chosen token may come again among the top ones. Its rank is 1 + the number of strictly larger logits.
    """
    log_normalizer = torch.logsumexp(logits, dim=-1, keepdim=True)
    ids = torch.tensor(token_ids, dtype=torch.int64, device=logits.device).unsqueeze(1)
    chosen = logits.gather(1, ids)
    # a float mask: comparing into bool and counting is 5 times as slow on a CPU; counts are exact to 2**24
    is_larger = torch.gt(logits, chosen, out=torch.empty_like(logits))
    ranks = [1 + int(count) for count in row_sum(is_larger).squeeze(1).tolist()]
    top = logits.topk(min(max(num_top), logits.shape[1]), dim=-1)
    all_ids = torch.cat([ids, top.indices], dim=1).tolist()
    all_logprobs = (torch.cat([chosen, top.values], dim=1) - log_normalizer).tolist()
    return [
        TokenLogprobs(all_ids[row][: 1 + count], all_logprobs[row][: 1 + count], ranks[row])
        for row, count in enumerate(num_top)
    ]
