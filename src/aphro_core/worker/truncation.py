"""Draws from what min_p, top_k and top_p leave of a row, in that order (vLLM's), with ties at a border all kept.

The drawn token is the survivor with the largest score + noise, so nothing need be sorted or renormalised. Two ways
lead there with the same answer: :func:`draw_from_top` looks at a row's most likely tokens, which settles nearly every
real row; :func:`draw_from_all` looks at the whole row. Scores are (logit - largest logit) / temperature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from aphro_core.request import SamplingParams
from aphro_core.worker.gumbel import GumbelNoise
from aphro_core.worker.reductions import argmax, row_sum

NUM_CANDIDATES: Final = 128  # the most likely tokens that draw_from_top looks at
_ROWS_AT_ONCE: Final = 4  # on a CPU: their tensors fit its cache, and the allocator keeps their memory
_OUT_OF_REACH: Final = 1e30  # no score is as low: logits / 1e-5


@dataclass(frozen=True, slots=True)
class Truncation:
    """The dials of some rows, ``[rows, 1]`` each. Off is -inf for ``log_min_p``, the vocabulary for ``top_k``, inf
    for ``top_p`` (not 1: a sum of rounded probabilities may exceed it)."""

    log_min_p: Tensor
    top_k: Tensor
    top_p: Tensor

    def __getitem__(self, rows: Tensor) -> Truncation:
        return Truncation(self.log_min_p[rows], self.top_k[rows], self.top_p[rows])


def is_truncated(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def build_truncation(params: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> Truncation:
    log_min_p = [math.log(p.min_p) if p.min_p > 0.0 else -math.inf for p in params]
    top_k = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params]
    top_p = [p.top_p if p.top_p < 1.0 else math.inf for p in params]
    return Truncation(
        torch.tensor(log_min_p, dtype=torch.float32, device=device).unsqueeze(1),
        torch.tensor(top_k, dtype=torch.int64, device=device).unsqueeze(1),
        torch.tensor(top_p, dtype=torch.float32, device=device).unsqueeze(1),
    )


def draw_truncated(scores: Tensor, cut: Truncation, keys: Tensor, noise: GumbelNoise) -> Tensor:
    """``scores`` [rows, vocab] float32, at most 0 and 0 in each row -> token ids ``[rows]`` int64."""
    tokens, is_settled = draw_from_top(scores, cut, keys, noise)
    rest = (~is_settled).nonzero().squeeze(1)
    at_once = max(len(rest), 1) if scores.is_cuda else _ROWS_AT_ONCE
    for start in range(0, len(rest), at_once):
        rows = rest[start : start + at_once]
        tokens[rows] = draw_from_all(scores[rows], cut[rows], keys[rows], noise)
    return tokens


def draw_from_top(scores: Tensor, cut: Truncation, keys: Tensor, noise: GumbelNoise) -> tuple[Tensor, Tensor]:
    """Token ids ``[rows]`` and whether they are right ``[rows]``: whether no survivor lies outside the candidates."""
    vocab_size = scores.shape[1]
    width = min(NUM_CANDIDATES, vocab_size)
    values, ids = scores.topk(width, dim=-1)
    kth = values.gather(1, cut.top_k.clamp(max=width) - 1)
    floor = torch.maximum(cut.log_min_p, torch.where(cut.top_k < vocab_size, kth, -math.inf))
    weights = values.exp() * (values >= floor)
    total = row_sum(weights)
    is_open = floor == -math.inf  # neither min_p nor top_k: top_p is a share of the whole row
    if bool((is_open & (cut.top_p < 1.0)).any()):
        total = torch.where(is_open, 1.0 / scores.softmax(dim=-1).amax(dim=-1, keepdim=True), total)
    above = pad(weights.cumsum(dim=-1)[:, :-1], (1, 0))
    num_kept = ((above < cut.top_p * total) & (values >= floor)).sum(dim=-1, keepdim=True)
    last_kept = values.gather(1, num_kept - 1)
    kept = torch.where(values >= last_kept, values, -math.inf)
    best = noise.add_at_(kept, keys, ids).argmax(dim=-1, keepdim=True)
    is_settled = values[:, -1:] < torch.where(is_open, last_kept, floor)
    return ids.gather(1, best).squeeze(1), is_settled.squeeze(1) | (width == vocab_size)


def draw_from_all(scores: Tensor, cut: Truncation, keys: Tensor, noise: GumbelNoise) -> Tensor:
    """Token ids ``[rows]``: draw from everything, and draw again where the token lies outside top_p.

    A token is outside if the probability strictly above it reaches top_p. All that is not more likely is outside too
    and leaves with it, so a few draws narrow even a flat row, as quickselect does. Overwrites ``scores``.
    """
    floor = _floor(scores, cut)
    if bool((floor > -math.inf).any()):
        _drop_(scores, torch.lt(scores, floor, out=torch.empty_like(scores)))
    noisy = noise.add_(scores.clone(), keys)
    tokens = argmax(noisy)
    rows = (cut.top_p < 1.0).squeeze(1).nonzero().squeeze(1)
    probabilities = scores.softmax(dim=-1) if len(rows) else scores
    while len(rows):
        drawn = scores[rows, tokens[rows]].unsqueeze(1)
        among = _take(scores, rows)
        mass = torch.gt(among, drawn, out=torch.empty_like(among)).mul_(_take(probabilities, rows))
        is_outside = (row_sum(mass) >= cut.top_p[rows]).squeeze(1)
        rows, drawn = rows[is_outside], drawn[is_outside]
        among = _take(scores, rows)
        rest = _drop_(_take(noisy, rows).clone(), torch.le(among, drawn, out=torch.empty_like(among)))
        noisy[rows] = rest
        tokens[rows] = argmax(rest)
    return tokens


def _drop_(x: Tensor, is_dropped: Tensor) -> Tensor:
    """Put ``x`` out of reach where the float mask is 1. On a CPU 10 times as fast as ``masked_fill_``."""
    return x.add_(is_dropped, alpha=-_OUT_OF_REACH)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    return x if len(rows) == len(x) else x[rows]


def _floor(scores: Tensor, cut: Truncation) -> Tensor:
    """The least score ``[rows, 1]`` that min_p and top_k leave."""
    floor = cut.log_min_p.clone()
    for row, top_k in enumerate(cut.top_k.squeeze(1).tolist()):
        if top_k < scores.shape[1]:
            kth = scores[row].topk(top_k, sorted=False).values.amin()
            floor[row] = torch.maximum(floor[row], kth)
    return floor
