"""The shapes that steps are padded to, so that one CUDA graph serves every step of its shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def row_buckets(max_rows: int) -> tuple[int, ...]:
    """Rows that steps are padded to: 1, 2, 4, 8, 16, 24, 32, every 16 to 256, every 32 to ``max_rows``, and that."""
    sizes = [1, 2, 4, 8, 16, 24, *range(32, 257, 16), *range(288, max_rows, 32)]
    return (*(size for size in sizes if size < max_rows), max_rows)


def token_buckets(most: int) -> tuple[int, ...]:
    """Tokens that steps with chunks are padded to: 32, 64, 128, 192, 256, then four to a doubling, to ``most``, and
    that; none with 0."""
    sizes = [32, 64, 128, 192]
    sizes += [quarters * 2**power // 4 for power in range(8, 15) for quarters in range(4, 8)]
    return (*(size for size in sizes if size < most), most) if most else ()


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step's launches hang on, besides what stands in fixed memory."""

    num_tokens: int
    num_rows: int  # places for rows of one token
    num_seqs: int = 0  # places for sequences with chunks, and one before them; 0: a step without chunks
    is_long: bool = False  # chunks are, on average


class StepShapes:
    def __init__(self, max_rows: int, graph_tokens: int, long: int, has_long: Callable[[int], bool]) -> None:
        """Steps with chunks are padded up to ``graph_tokens``. ``has_long``: whether so many tokens are computed
        otherwise where chunks are ``long`` on average."""
        self.graph_tokens = graph_tokens
        self._long_chunk = long
        self._max_rows = max_rows
        self._rows, self._tokens = row_buckets(max_rows), token_buckets(graph_tokens)
        self._long = {size for size in self._tokens if size >= long and has_long(size)}
        in_short = [self._mixed(size, is_long=False) for size in self._tokens]
        in_long = [self._mixed(size, is_long=True) for size in self._tokens if size in self._long]
        self.padded: tuple[StepShape, ...] = (*map(self.of_rows, self._rows), *in_short, *in_long)
        self._are_padded = frozenset(self.padded)

    @property
    def max_tokens(self) -> int:
        """Of a padded step."""
        return max(self._rows[-1], *self._tokens, 0)

    @property
    def kinds(self) -> list[StepShape]:
        """Enough of them for every kernel to be launched: kernels of chunks are made for powers of two."""
        sizes = [size for size in self._tokens if size & (size - 1) == 0 or size == self._tokens[-1]]
        mixed = {self._mixed(size, is_long=is_long) for size in sizes for is_long in {False, size in self._long}}
        return [*map(self.of_rows, self._rows), *sorted(mixed, key=lambda shape: (shape.num_tokens, shape.is_long))]

    def has(self, shape: StepShape) -> bool:
        """Whether ``shape`` is one of the padded ones."""
        return shape in self._are_padded

    def of_rows(self, num_rows: int) -> StepShape:
        """Of a step of rows of one token each."""
        size = next(size for size in self._rows if size >= num_rows)
        return StepShape(size, size)

    def with_chunks(self, num_tokens: int, num_rows: int, num_chunks: int) -> StepShape:
        """Of a step of ``num_tokens``, ``num_rows`` of them rows of one token, the others in ``num_chunks``."""
        is_long = num_tokens - num_rows >= self._long_chunk * num_chunks
        size = next((size for size in self._tokens if size >= num_tokens), None)
        if size is None:
            return StepShape(num_tokens, num_rows, num_chunks + 1, is_long)
        return self._mixed(size, is_long=is_long and size in self._long)

    def _mixed(self, size: int, *, is_long: bool) -> StepShape:
        most_chunks = size // self._long_chunk if is_long else min(size // 2, self._max_rows)
        return StepShape(size, min(size, self._max_rows), most_chunks + 1, is_long)
