"""What changes logits before the temperature: biases, masked tokens, and penalties on tokens that were seen.

Meanings are vLLM's. Repetition penalty: a logit of any token of prompt or output is divided by it if positive, else
multiplied. Frequency and presence penalty count the output only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from aphro_core.request import SamplingParams


class TokenCounts:
    """The distinct tokens of one sequence and how often each stands in its output; grows with the sequence."""

    __slots__ = ("_counts", "_ids", "_num_counted", "_slots")

    def __init__(self) -> None:
        self._slots: dict[int, int] = {}  # token id -> its place in the two tensors
        self._ids = torch.empty(0, dtype=torch.int64)
        self._counts = torch.empty(0)
        self._num_counted = 0  # tokens of the sequence

    def catch_up(self, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """Count what ``token_ids`` gained since the last call; they only ever grow at their end."""
        if self._num_counted < num_prompt_tokens:
            assert self._num_counted == 0
            self._add_prompt(token_ids[:num_prompt_tokens])
        for token_id in token_ids[self._num_counted :]:
            slot = self._slots.setdefault(token_id, len(self._slots))
            if len(self._slots) > len(self._ids):
                self._reserve(2 * len(self._slots))
            self._ids[slot] = token_id
            self._counts[slot] += 1
        self._num_counted = len(token_ids)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Views ``[distinct]`` on the CPU: token ids int64, counts in the output float32 (0 = in the prompt only)."""
        return self._ids[: len(self._slots)], self._counts[: len(self._slots)]

    def _add_prompt(self, token_ids: Sequence[int]) -> None:
        self._slots = {token_id: slot for slot, token_id in enumerate(dict.fromkeys(token_ids))}
        self._reserve(len(self._slots) + 64)
        self._ids[: len(self._slots)] = torch.tensor(list(self._slots), dtype=torch.int64)
        self._num_counted = len(token_ids)

    def _reserve(self, size: int) -> None:
        ids, counts = torch.zeros(size, dtype=torch.int64), torch.zeros(size)
        ids[: len(self._ids)], counts[: len(self._counts)] = self._ids, self._counts
        self._ids, self._counts = ids, counts


def add_biases_(logits: Tensor, biases: Mapping[int, Mapping[int, float]]) -> None:
    """``logits`` [rows, vocab] += ``biases``: row -> token id -> bias. Ids must lie inside the vocabulary."""
    rows = [row for row, bias in biases.items() for _ in bias]
    ids = [token_id for bias in biases.values() for token_id in bias]
    values = [value for bias in biases.values() for value in bias.values()]
    device = logits.device
    at = (torch.tensor(rows, device=device), torch.tensor(ids, device=device))
    logits.index_put_(at, torch.tensor(values, dtype=logits.dtype, device=device), accumulate=True)


def mask_tokens_(logits: Tensor, masked: Mapping[int, Sequence[int]]) -> None:
    """Forbid tokens: row -> token ids whose logit becomes -inf. Ids must lie inside the vocabulary."""
    rows = torch.tensor([row for row, ids in masked.items() for _ in ids], dtype=torch.int64)
    ids = torch.tensor([token_id for ids in masked.values() for token_id in ids], dtype=torch.int64)
    logits.index_put_((rows.to(logits.device), ids.to(logits.device)), logits.new_tensor(float("-inf")))


def apply_penalties_(logits: Tensor, rows: Sequence[tuple[int, SamplingParams, TokenCounts]]) -> None:
    """Repetition, frequency and presence penalties of ``rows`` (row of ``logits``, parameters, counts), in place."""
    tensors = [counts.tensors() for _, _, counts in rows]
    sizes = torch.tensor([len(ids) for ids, _ in tensors])
    dials = torch.tensor(
        [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for _, p, _ in rows], dtype=logits.dtype
    )
    row_of = torch.tensor([row for row, _, _ in rows]).repeat_interleave(sizes).to(logits.device)
    repetition, frequency, presence = dials.repeat_interleave(sizes, dim=0).to(logits.device).unbind(dim=1)
    ids = torch.cat([ids for ids, _ in tensors]).to(logits.device)
    counts = torch.cat([counts for _, counts in tensors]).to(logits.device)
    seen = logits[row_of, ids]
    seen = torch.where(seen > 0, seen / repetition, seen * repetition)
    seen -= frequency * counts
    seen -= presence * (counts > 0)
    logits.index_put_((row_of, ids), seen)
