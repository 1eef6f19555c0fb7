"""The product behind which the ranks of a layer sum: of many rows it goes straight to the ranks that add them up."""

from __future__ import annotations

from torch import Tensor

from aphro_core.distributed import Scattered, Summand, TensorParallelGroup
from aphro_core.layers.linear import AnyLinear, Linear


class RowParallel:
    """A linear layer with a rank's columns of the weight, called as :class:`Linear`."""

    __slots__ = ("_group", "_linear")

    def __init__(self, linear: AnyLinear, group: TensorParallelGroup) -> None:
        self._linear, self._group = linear, group

    def __call__(self, x: Tensor) -> Summand:
        """``[rows, in_features]`` to this rank's summand. A product for each rank that adds up some of the rows,
        the own ones last: what was written into the others' memory has arrived by then."""
        places = self._group.places(len(x))
        linear = self._linear
        if not places or not isinstance(linear, Linear) or not all(linear.makes(place) for _, place in places):
            return linear(x)
        for rows, place in places:
            linear(x[rows.start : rows.stop], out=place)
        return Scattered(len(x))
