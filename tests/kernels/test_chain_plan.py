"""How a chain's work is shared out: every output once, within a multiprocessor, in a ring that two groups can share."""

from __future__ import annotations

import pytest
from aphro_kernels.chain_plan import (
    GROUPS,
    MAX_ROWS,
    SLOT_ROWS,
    ChainShape,
    Stripes,
    can_chain,
    chain_plan,
    fewest_rows,
)
from hypothesis import given
from hypothesis import strategies as st

sizes = st.integers(1, 1000).map(lambda eighth: 8 * eighth)
shapes = st.builds(ChainShape, sizes, sizes, st.integers(1, 4000).map(lambda eighth: 8 * eighth), sizes | st.just(0))


@given(shapes, st.integers(1, MAX_ROWS), st.integers(66, 144))
def test_plan(shape: ChainShape, num_rows: int, multiprocessors: int) -> None:
    plan = chain_plan(shape, num_rows, multiprocessors)
    for stripes, n in ((plan.hidden, shape.hidden), (plan.inner, shape.inner), (plan.qkv, shape.qkv)):
        if n:
            assert (stripes.count - 1) * stripes.columns < n <= stripes.count * stripes.columns
        assert stripes.columns % 8 == 0
        assert stripes.columns % stripes.box == 0
        assert stripes.pad % stripes.box == 0
        assert stripes.columns <= stripes.pad <= SLOT_ROWS
    assert can_chain(shape, multiprocessors) == (min(shape.attended, shape.hidden, shape.inner) >= 64)
    assert plan.programs <= multiprocessors
    assert max(plan.hidden.count, plan.qkv.count) <= plan.programs  # one stripe a program
    assert max(GROUPS * plan.inner.pad, plan.hidden.pad, plan.qkv.pad) <= plan.slot_rows  # gate and up in one slot
    assert num_rows <= plan.rows <= MAX_ROWS
    # the groups' buffers alternate, and each group holds one while it waits for its next
    assert plan.stages % GROUPS == plan.slots % GROUPS == 0
    assert min(plan.stages, plan.slots) >= 2 * GROUPS
    rows = plan.stages * plan.chunks * plan.rows + MAX_ROWS - plan.rows
    halves = MAX_ROWS * max(plan.hidden.pad, plan.qkv.pad)
    barriers = 8 * (2 * plan.slots + 2 * plan.stages + 5) + 4 * MAX_ROWS
    assert (rows + plan.slots * plan.slot_rows) * 128 + 4 * halves + max(barriers, 1024) <= 227 * 1024


@pytest.mark.parametrize(
    ("shape", "programs", "widths", "fewest"),
    [
        (ChainShape(4096, 4096, 14336, 6144), 128, (32, 56, 48), 2),
        (ChainShape(3584, 3584, 18944, 4608), 132, (32, 24, 40), 1),  # three times 24, not twice 40
        (ChainShape(896, 896, 4864, 1152), 112, (8, 24, 16), 1),
    ],
)
def test_known_models(shape: ChainShape, programs: int, widths: tuple[int, int, int], fewest: int) -> None:
    plan = chain_plan(shape, 32, 132)
    assert plan.programs == programs
    assert (plan.hidden.columns, plan.inner.columns, plan.qkv.columns) == widths
    assert fewest_rows(shape) == fewest


def test_what_cannot_be_chained() -> None:
    assert not can_chain(ChainShape(64, 68, 128, 96), 132)  # a row of 136 bytes
    assert not can_chain(ChainShape(64, 56, 128, 96), 132)
    assert not can_chain(ChainShape(4096, 132 * SLOT_ROWS + 8, 4096, 6144), 132)
    assert Stripes(40, 3).box == 8
