"""The product behind which the ranks of a layer sum: of many rows some travel while the others are multiplied."""

from __future__ import annotations

from torch import Tensor

from aphro_core.distributed.tensor_group import TensorParallelGroup
from aphro_core.layers.linear import AnyLinear, Linear
from aphro_core.peer_sums import Scattered, Summand


class RowParallel:
    """A linear layer with a rank's columns of the weight, called as :class:`Linear`."""

    __slots__ = ("_group", "_linear")

    def __init__(self, linear: AnyLinear, group: TensorParallelGroup) -> None:
        self._linear, self._group = linear, group

    def __call__(self, x: Tensor) -> Summand:
        """``[rows, in_features]`` to this rank's summand. A product for each rank that adds up some of the rows,
        the own ones last: what the others get has arrived by then."""
        parts, linear = self._group.parts(len(x)), self._linear
        if not parts or not isinstance(linear, Linear):
            return linear(x)
        y = x.new_empty(len(x), linear.num_outputs)
        if not linear.makes(y):
            return linear(x)
        for owner, rows in parts:
            linear(x[rows.start : rows.stop], out=y[rows.start : rows.stop])
            self._group.send(y, owner)
        return Scattered(y)
