"""Vocabulary-parallel embedding and head: each tensor-parallel rank has its rows of the padded vocabulary."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import embedding

from aphro_core.distributed import TensorParallelGroup
from aphro_core.layers.linear import Linear


class VocabEmbedding:
    def __init__(self, weight: Tensor, rows: range, group: TensorParallelGroup) -> None:
        self._weight = weight
        self._rows = rows
        self._group = group

    def __call__(self, token_ids: Tensor) -> Tensor:
        """``[num_tokens]`` int64 to ``[num_tokens, hidden_size]``."""
        if self._group.size == 1:
            return embedding(token_ids, self._weight)
        local = token_ids - self._rows.start
        foreign = (local < 0) | (local >= len(self._rows))
        x = embedding(local.masked_fill(foreign, 0), self._weight)
        return self._group.all_reduce_(x.masked_fill_(foreign[:, None], 0.0))


class VocabHead:
    def __init__(self, linear: Linear, vocab_size: int, group: TensorParallelGroup) -> None:
        self._linear = linear
        self._vocab_size = vocab_size
        self._group = group

    def __call__(self, x: Tensor) -> Tensor | None:
        """``[rows, hidden_size]`` to logits ``[rows, vocab_size]`` float32 on tp rank 0, None on the others."""
        logits = self._group.gather_columns(self._linear(x))
        return None if logits is None else logits[:, : self._vocab_size].float()
