"""Decode steps of a CPU made again: the calls of one step's blocks are noted, and later ones change what they read."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from aphro_kernels.cpu_program import Recording
from torch import Tensor

from aphro_core.layers.batch import Batch, DirectRows, GatheredRows, PagedRows
from aphro_core.layers.decoder import Decoder
from aphro_core.parallel.memory import REPLAYED_BYTES

_MAX_ROWS: Final = 128  # above them the work takes so long that what is between the calls does not count
_MAX_KEPT: Final = 32  # steps, the last ones used
_LOG: Final = logging.getLogger(__name__)

Size = tuple[int, int]  # rows, blocks of a table


class ReplayedSteps:
    """Runs a decoder's step: as it is, or from what was noted of one of the same size. The answers are the same bits.

    A size is noted when it comes twice in a row: batches that change with every step would only pay for it.
    """

    def __init__(self, decoder: Decoder, caches: Sequence[Tensor], *, can_replay: bool) -> None:
        """``can_replay`` must be False where ranks sum in every layer: sums cannot be noted."""
        self._decoder, self._caches = decoder, caches
        self._kept: OrderedDict[Size, _Step] = OrderedDict()
        self._last: Size | None = None
        self._most_rows = {0: _MAX_ROWS}  # by blocks of a table: with so many or more, so many rows at most
        self.can_replay = can_replay

    def __call__(self, batch: Batch, hidden_states: Tensor | None, kept: Tensor | None = None) -> Tensor:
        """As the decoder's own call."""
        size, self._last = self._last, self._size(batch) if self.can_replay and kept is None else None
        if self._last is None:
            return self._decoder(batch, hidden_states, self._caches, kept)
        if (step := self._kept.get(self._last)) is not None:
            self._kept.move_to_end(self._last)
            return step(batch, hidden_states)
        if size != self._last:
            return self._decoder(batch, hidden_states, self._caches)
        return self._note(self._last, batch, hidden_states)

    @property
    def num_kept(self) -> int:
        """Sizes that are made again."""
        return len(self._kept)

    @property
    def num_bytes(self) -> int:
        """What they keep: at most ``REPLAYED_BYTES``, of a large model a few steps, or none of many rows."""
        return sum(step.num_bytes for step in self._kept.values())

    def _size(self, batch: Batch) -> Size | None:
        """None: a step that is not noted."""
        rows = batch.cache_rows
        assert isinstance(rows, GatheredRows)
        if rows.direct is None or any(rows.chunks.values()):
            return None
        size = batch.num_tokens, 1 << (max(rows.direct.block_tables.shape[1], 8) - 1).bit_length()
        return size if self._can_keep(*size) else None

    def _can_keep(self, num_rows: int, num_blocks: int) -> bool:
        return all(num_rows <= most for least, most in self._most_rows.items() if least <= num_blocks)

    def _note(self, size: Size, batch: Batch, hidden_states: Tensor | None) -> Tensor:
        step = _Step(self._decoder, size)
        answer = step.note(batch, hidden_states, self._caches)
        if step.foreign:
            self.can_replay = False
            _LOG.debug("decode steps are not replayed: they call torch's %s", ", ".join(sorted(step.foreign)))
            return answer
        if step.num_bytes > REPLAYED_BYTES:
            # neither it nor a larger one is tried again; most of the bytes are a row's own
            self._most_rows[size[1]] = size[0] * REPLAYED_BYTES // (step.num_bytes + 1)
            return answer
        self._kept[size] = step
        while len(self._kept) > _MAX_KEPT or self.num_bytes > REPLAYED_BYTES:
            self._kept.popitem(last=False)
        return answer


class _Step:
    """The blocks' calls of one size, and the memory that they read: what differs from step to step is copied there."""

    def __init__(self, decoder: Decoder, size: Size) -> None:
        self._decoder = decoder
        self._num_rows, self._num_blocks = size
        self.foreign: set[str] = set()

    def note(self, batch: Batch, hidden_states: Tensor | None, caches: Sequence[Tensor]) -> Tensor:
        """Compute this step, and keep its calls unless some of them are :attr:`foreign`."""
        self._x = self._decoder.begin(batch, hidden_states).clone()
        self._rotations = self._decoder.rotations(batch, self._x.dtype)
        self._rows = self._padded(batch.cache_rows)
        recording = Recording()
        with recording:
            self._delta = self._decoder.run_blocks(self._x, self._rotations, self._rows, caches)
        self.foreign = recording.foreign
        if not self.foreign:
            self._program = recording.program()
        return self._answer()

    @property
    def num_bytes(self) -> int:
        tensors = [self._x, self._rows.slot_rows, *(part for each in self._rotations for part in (each.cos, each.sin))]
        if (direct := self._rows.direct) is not None:
            tensors += [direct.block_tables, direct.seq_lens]
        return self._program.num_bytes + sum(tensor.nbytes for tensor in tensors)

    def __call__(self, batch: Batch, hidden_states: Tensor | None) -> Tensor:
        self._x.copy_(self._decoder.begin(batch, hidden_states))
        for kept, rotation in zip(self._rotations, self._decoder.rotations(batch, self._x.dtype), strict=True):
            kept.cos.copy_(rotation.cos)
            kept.sin.copy_(rotation.sin)
        kept_rows, rows = self._rows, batch.cache_rows
        assert isinstance(rows, GatheredRows)
        assert rows.direct is not None
        assert kept_rows.direct is not None
        kept_rows.slot_rows.copy_(rows.slot_rows)
        tables = rows.direct.block_tables
        kept_rows.direct.block_tables[:, : tables.shape[1]] = tables
        kept_rows.direct.seq_lens.copy_(rows.direct.seq_lens)
        self._program()
        return self._answer()

    def _padded(self, rows: GatheredRows | PagedRows) -> GatheredRows:
        assert isinstance(rows, GatheredRows)
        assert rows.direct is not None
        tables = rows.direct.block_tables
        padded = tables.new_zeros(self._num_rows, self._num_blocks)
        padded[:, : tables.shape[1]] = tables
        return GatheredRows(rows.slot_rows.clone(), DirectRows(padded, rows.direct.seq_lens.clone()), rows.chunks)

    def _answer(self) -> Tensor:
        """Not in memory that the next step writes: the next stage may not have it yet."""
        return self._x.clone() if self._delta is None else self._x + self._delta.whole()
