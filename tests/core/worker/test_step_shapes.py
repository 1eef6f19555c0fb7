"""Padded shapes have room for every step that is given them, and a block holds what stands in it apart."""

from __future__ import annotations

import numpy as np
import torch
from aphro_kernels.decode_work import places_of
from hypothesis import given
from hypothesis import strategies as st

from aphro_core.worker.chunk_numbers import chunk_block_size, chunk_numbers
from aphro_core.worker.step_shapes import StepShapes, row_buckets, token_buckets


@st.composite
def steps(draw: st.DrawFn) -> tuple[StepShapes, int, list[int]]:
    max_rows = draw(st.integers(1, 600))
    shapes = StepShapes(max_rows, draw(st.integers(0, 9000)), 192, lambda num_tokens: num_tokens >= 4000)
    num_chunks = draw(st.integers(1, min(max_rows, 40)))
    longest = draw(st.sampled_from([3, 60, 4000]))
    return (
        shapes,
        draw(st.integers(0, max_rows - num_chunks)),
        [draw(st.integers(2, longest)) for _ in range(num_chunks)],
    )


@given(steps())
def test_a_shape_has_room_for_its_step(step: tuple[StepShapes, int, list[int]]) -> None:
    shapes, num_rows, chunks = step
    num_tokens = num_rows + sum(chunks)
    shape = shapes.with_chunks(num_tokens, num_rows, len(chunks))
    assert shape.num_tokens >= num_tokens
    assert shape.num_rows >= num_rows
    assert shape.num_seqs > len(chunks)
    if num_tokens <= max((shape.num_tokens for shape in shapes.padded if shape.num_seqs), default=0):
        assert shapes.has(shape), "every small step is one that a graph serves"
        assert shape.num_tokens <= max(num_tokens * 4 / 3, num_tokens + 63, 64), "not much of it is padding"
    else:
        assert (shape.num_tokens, shape.num_rows, shape.num_seqs) == (num_tokens, num_rows, len(chunks) + 1)


@given(st.integers(1, 700), st.integers(0, 20_000))
def test_shapes_are_few_and_each_stands_once(max_rows: int, graph_tokens: int) -> None:
    shapes = StepShapes(max_rows, graph_tokens, 192, lambda num_tokens: True)
    assert len(set(shapes.padded)) == len(shapes.padded)
    assert len(shapes.padded) <= len(row_buckets(max_rows)) + 2 * len(token_buckets(graph_tokens))
    assert all(shapes.has(shape) for shape in shapes.padded)
    assert all(size <= graph_tokens for size in token_buckets(graph_tokens))
    assert set(shapes.kinds) <= set(shapes.padded)
    assert shapes.max_tokens == max(shape.num_tokens for shape in shapes.padded)


@given(st.integers(1, 600), st.integers(1, 9000))
def test_few_shapes_launch_every_kernel_that_begins_one(max_rows: int, graph_tokens: int) -> None:
    shapes = StepShapes(max_rows, graph_tokens, 192, lambda num_tokens: True)
    mixed, rehearsed = ({shape for shape in those if shape.num_seqs} for those in (shapes.padded, shapes.kinds))
    assert {places_of(shape.num_rows) for shape in rehearsed} == {places_of(shape.num_rows) for shape in mixed}
    assert {shape.is_long for shape in rehearsed} == {shape.is_long for shape in mixed}


@given(st.integers(1, 600), st.integers(256, 9000))
def test_what_begins_a_longer_step_is_compiled_for_a_padded_one(max_rows: int, graph_tokens: int) -> None:
    """Rows of one token beside chunks have a kernel without embeddings, which decode steps do not compile."""
    shapes = StepShapes(max_rows, graph_tokens, 192, lambda num_tokens: True)
    compiled = {places_of(shape.num_rows) for shape in shapes.kinds if shape.num_seqs}
    for num_rows in range(1, min(max_rows, graph_tokens) + 1):
        shape = shapes.with_chunks(graph_tokens + num_rows + 1, num_rows, 1)
        assert not shapes.has(shape)
        assert places_of(shape.num_rows) in compiled


@given(steps())
def test_sections_of_a_block_do_not_meet(step: tuple[StepShapes, int, list[int]]) -> None:
    shapes, num_rows, chunks = step
    shape = shapes.with_chunks(num_rows + sum(chunks), num_rows, len(chunks))
    block = np.zeros(chunk_block_size(shape), dtype=np.int64)
    numbers = chunk_numbers(shape, block)
    names = type(numbers).__dataclass_fields__
    for number, name in enumerate(names):
        getattr(numbers, name)[:] = number + 1
    read = chunk_numbers(shape, torch.from_numpy(block))
    for number, name in enumerate(names):
        section = getattr(read, name)
        assert bool((section == number + 1).all()), name
        assert section.data_ptr() % 16 == block.ctypes.data % 16, "as aligned as the block"
