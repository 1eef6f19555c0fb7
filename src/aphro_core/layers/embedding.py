"""Embeddings and head. The vocabulary is parallel: each tensor-parallel rank has its rows of the padded vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding

from aphro_core.distributed.tensor_group import TensorParallelGroup
from aphro_core.layers.linear import AnyLinear, Linear
from aphro_core.quantization.matrix import PackedMatrix


class VocabEmbedding:
    def __init__(
        self, weight: Tensor | PackedMatrix, rows: range, group: TensorParallelGroup, dtype: torch.dtype
    ) -> None:
        self._weight, self._dtype = weight, dtype
        self._rows = rows
        self._group = group

    @property
    def plain(self) -> Tensor | None:
        """``[vocab_size, hidden_size]``, if a row of it is all that a token needs."""
        return self._weight if self._group.size == 1 and isinstance(self._weight, Tensor) else None

    def __call__(self, token_ids: Tensor) -> Tensor:
        """``[num_tokens]`` int64 to ``[num_tokens, hidden_size]``."""
        if self._group.size == 1:
            return self._look_up(token_ids)
        local = token_ids - self._rows.start
        foreign = (local < 0) | (local >= len(self._rows))
        x = self._look_up(local.masked_fill(foreign, 0))
        return self._group.all_reduce_(x.masked_fill_(foreign[:, None], 0.0))

    def _look_up(self, rows: Tensor) -> Tensor:
        if isinstance(self._weight, Tensor):
            return embedding(rows, self._weight)
        return self._weight.rows_at(rows).dequantise(self._dtype)


class VocabHead:
    """``softcap`` c makes logits x, scaled, c * tanh(x / c)."""

    def __init__(
        self,
        linear: AnyLinear,
        vocab_size: int,
        group: TensorParallelGroup,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        self._linear = linear
        self._vocab_size = vocab_size
        self._group = group
        self._scale, self._softcap = scale, softcap

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor | None:
        """``[rows, hidden_size]`` to logits ``[rows, vocab_size]`` float32 on tp rank 0, None on the others.

        They are written into ``out`` if it is given.
        """
        if out is not None and self._writes_into(out):
            assert isinstance(self._linear, Linear)
            return self._linear(x, out)
        logits = self._group.gather_columns(self._linear(x), out)
        if logits is None:
            return None
        if out is None:
            logits = logits[:, : self._vocab_size].float()
        if self._scale != 1.0:
            logits.mul_(self._scale)
        return logits if self._softcap is None else logits.div_(self._softcap).tanh_().mul_(self._softcap)

    @property
    def plain(self) -> Linear | None:
        """The product whose answers are the logits, where they are, on one GPU."""
        linear = self._linear
        if not isinstance(linear, Linear) or self._scale != 1.0 or self._softcap is not None or self._group.size > 1:
            return None
        return linear if linear.plain is not None and linear.plain[1] is None else None

    def _writes_into(self, out: Tensor) -> bool:
        """Whether the product's answers are the logits, so that nobody need copy them."""
        is_plain = self._scale == 1.0 and self._softcap is None
        return isinstance(self._linear, Linear) and self._linear.makes(out) and self._group.size == 1 and is_plain


class PositionEmbedding:
    """Learned positions: position p is row p + ``offset`` of a table that every rank has whole."""

    def __init__(self, weight: Tensor, offset: int) -> None:
        self._weight, self._offset = weight, offset

    def add_(self, x: Tensor, positions: Tensor) -> Tensor:
        """To ``x`` [num_tokens, hidden_size] in place; ``positions`` [num_tokens] int64."""
        return x.add_(embedding(positions + self._offset, self._weight))
