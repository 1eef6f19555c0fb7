"""One layer: attention and MLP around the residual stream, and what is still to be added to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from aphro_core.distributed.tensor_group import TensorParallelGroup
from aphro_core.layers.attention import Attention
from aphro_core.layers.batch import GatheredRows, PagedRows
from aphro_core.layers.chained import LayerParts
from aphro_core.layers.norm import Norm, RMSNorm
from aphro_core.layers.rotary import Rotation
from aphro_core.peer_sums import Summand


@dataclass(frozen=True, slots=True)
class Delta:
    """What is to be added to the residual stream: this rank's summand, and what the sum passes through (a norm, a
    factor) where the model has something there."""

    summand: Summand
    group: TensorParallelGroup
    out: Callable[[Tensor], Tensor] | None

    def whole(self) -> Tensor:
        total = self.group.all_reduce_(self.summand)
        return total if self.out is None else self.out(total)

    def add_to_(self, x: Tensor, norm: Norm, *, shares_out: bool = False) -> Tensor:
        """To ``x`` in place; the norm of that. On GPUs sum, addition and norm are one kernel where they can be. With
        ``shares_out`` only this rank's share of the rows of ``x`` is kept up."""
        if self.out is None:
            return norm.add_sum_(x, self.summand, self.group, shares_out=shares_out)
        return norm.add_(x, self.whole())


class Block:
    """Pre-norm: ``x += attention(norm(x))``, then ``x += mlp(norm(x))``, each passed through ``attention_out`` and
    ``mlp_out`` where the model has something there (a norm, a factor).

    What a block adds last is handed to the next one, whose first norm adds it.
    """

    def __init__(
        self,
        input_norm: Norm,
        attention: Attention,
        post_norm: Norm,
        mlp: Callable[[Tensor], Summand],
        group: TensorParallelGroup,
        attention_out: Callable[[Tensor], Tensor] | None = None,
        mlp_out: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._input_norm, self._attention, self._post_norm, self._mlp = input_norm, attention, post_norm, mlp
        self._attention_out, self._mlp_out, self._group = attention_out, mlp_out, group

    @property
    def parts(self) -> LayerParts | None:
        """None where something stands between its parts: a norm, a factor, a sum over ranks."""
        if self._attention_out is not None or self._mlp_out is not None or self._group.size > 1:
            return None
        return LayerParts(self._input_norm, self._attention, self._post_norm, self._mlp)

    @property
    def can_share_out(self) -> bool:
        """Whether both its sums can leave each rank with some rows of the residual stream."""
        has_outs = self._attention_out is not None or self._mlp_out is not None
        return not has_outs and all(isinstance(norm, RMSNorm) for norm in (self._input_norm, self._post_norm))

    def __call__(
        self,
        x: Tensor,
        delta: Delta | None,
        rotation: Rotation,
        rows: GatheredRows | PagedRows,
        cache: Tensor,
        kept: Tensor | None = None,
        *,
        shares_out: bool = False,
    ) -> Delta:
        """``x`` [num_tokens, hidden_size] in place, ``delta`` what is still to be added; returns the next delta.

        With ``kept`` [any] int64, both are those rows' alone, in ``x`` the first ones: of the others K and V are
        written, and nothing else. ``shares_out``: of ``x`` only this rank's share is right behind it.
        """
        normed = self._input_norm(x) if delta is None else delta.add_to_(x, self._input_norm, shares_out=shares_out)
        attended = self._attention(normed, rotation, rows, cache, kept)
        if kept is not None:
            x = x[: len(kept)].copy_(x.index_select(0, kept))
        normed = Delta(attended, self._group, self._attention_out).add_to_(x, self._post_norm, shares_out=shares_out)
        return Delta(self._mlp(normed), self._group, self._mlp_out)
