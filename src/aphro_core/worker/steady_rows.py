"""Rows that decode and come again: the numbers that a device made for itself, followed by its host."""

from __future__ import annotations

import numpy as np
from aphro_kernels.step_rows import ANSWER, BLOCK, IS_NEW, POSITION, ROW_FIELDS, TOKEN

from aphro_core.worker.step_memory import PagedStep


class SteadyRows:
    """A decode step whose rows all draw, and what was sent of it; the device moves them on with each step."""

    def __init__(self, step: PagedStep, values: np.ndarray) -> None:
        """``values`` [shape.num_rows, ROW_FIELDS] int64 are kept."""
        self.step = step
        self._values = values
        self._num_steps = 0  # that the device is ahead of them

    def go_on(self) -> None:
        """One step, all rows by one token."""
        self._num_steps += 1

    def leave_out(self, without: list[int], step: PagedStep, padding: tuple[int, ...]) -> SteadyRows:
        """``step`` is of the rows that are left when those at ``without`` have gone."""
        padded = np.empty((step.shape.num_rows, ROW_FIELDS), dtype=np.int64)
        padded[: step.num_rows] = np.delete(self._values[: self.step.num_rows], without, axis=0)
        padded[step.num_rows :] = padding
        left = SteadyRows(step, padded)
        left._num_steps = self._num_steps
        return left

    def values(self, new_blocks: list[tuple[int, int]], place: int) -> np.ndarray:
        """What the device has of them now, to be sent: ``new_blocks`` (index, block) are begun, the first row is
        answered at ``place``."""
        ours = self._values[: self.step.num_rows]
        ours[:, POSITION] += self._num_steps
        self._num_steps = 0
        ours[:, TOKEN] = -1  # drawn by the step before, and kept there
        ours[:, BLOCK] = -1
        ours[:, IS_NEW] = 0
        ours[:, ANSWER] = np.arange(place, place + len(ours))
        for index, block in new_blocks:
            ours[index, BLOCK] = block
        return self._values
