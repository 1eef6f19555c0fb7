"""What a reader of a format gets: one linear layer of the checkpoint, of which a rank wants some rows or columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aphro_core.checkpoint.checkpoint import Checkpoint
from aphro_core.models.quantization import QuantSpec


@dataclass(frozen=True)
class QuantSource:
    """Rows and columns of ``module``, a linear layer of ``shape``. ``group`` is the inputs that share a scale, None
    for whole rows; ``scale_dtype`` what scales and offsets of groups are kept in (of rows: float32)."""

    checkpoint: Checkpoint
    spec: QuantSpec
    module: str
    shape: tuple[int, int]
    rows: range
    columns: range
    group: int | None
    scale_dtype: torch.dtype
    device: torch.device  # where it will be kept

    @property
    def dtype(self) -> torch.dtype:
        """Of the scales."""
        return torch.float32 if self.group is None else self.scale_dtype

    @property
    def groups(self) -> range:
        """Of the columns; they begin and end between groups (parallel/shard.py)."""
        if self.group is None:
            return range(1)
        assert self.columns.start % self.group == self.columns.stop % self.group == 0, "cut between groups"
        return range(self.columns.start // self.group, self.columns.stop // self.group)

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> Tensor:
        """A checkpoint tensor of the module, or these rows (and columns) of it, as it is stored."""
        full = f"{self.module}.{name}"
        if rows is None:
            return self.checkpoint.read(full)
        tensor = self.checkpoint.read(full, 0, rows.start, rows.stop)
        return tensor if columns is None else tensor[:, columns.start : columns.stop]

    def read_columns(self, name: str, columns: range) -> Tensor:
        return self.checkpoint.read(f"{self.module}.{name}", 1, columns.start, columns.stop)


def words_of(elements: range, per_word: int) -> tuple[range, slice]:
    """(words that hold these elements, where the elements are among the codes of those words)."""
    words = range(elements.start // per_word, -(-elements.stop // per_word))
    first = elements.start - words.start * per_word
    return words, slice(first, first + len(elements))
