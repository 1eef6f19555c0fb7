"""A scheduled sequence's share of a step: consecutive positions, and the block table that they stand in."""

from __future__ import annotations

from array import array
from typing import NamedTuple


class Span(NamedTuple):
    start: int
    stop: int
    blocks: array[int]  # int64; place i holds the positions from i * block_size on

    def slots(self, block_size: int, block_stride: int) -> list[int]:
        """Where its positions stand in a cache whose blocks are ``block_stride`` slots apart."""
        blocks = self.blocks
        return [blocks[at // block_size] * block_stride + at % block_size for at in range(self.start, self.stop)]
