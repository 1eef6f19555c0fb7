"""Default step sizes: fewer tokens for larger models, within bounds, and whole tiles on GPUs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aphro_core.parallel.shard import build_plan
from aphro_core.parallel.step_sizes import GPU_TOKENS, context_room, default_step_sizes, parameters_on_the_way
from tests.core.parallel.test_memory import LLAMA_8B


@pytest.mark.parametrize(
    ("parameters", "tokens"), [(8_030_000_000, 2048), (494_000_000, 16384), (3_000_000_000, 5376), (70 * 10**9, 1024)]
)
def test_a_step_beside_streams_lasts_about_50_ms(parameters: int, tokens: int) -> None:
    assert default_step_sizes("cuda", parameters).decode_tokens == tokens


@given(st.integers(0, 10**13), st.integers(0, 10**13))
def test_bounds_and_order(first: int, second: int) -> None:
    less, more = (default_step_sizes("cuda", parameters) for parameters in sorted((first, second)))
    assert GPU_TOKENS[0] <= more.decode_tokens <= less.decode_tokens <= GPU_TOKENS[1]
    assert less.prefill_tokens == max(less.decode_tokens, 8192)
    assert less.decode_tokens % 256 == 0
    staged = default_step_sizes("cuda", max(first, second), 2)  # whose last stage waits for the first step's end
    assert staged.decode_tokens == staged.prefill_tokens == more.decode_tokens


@given(st.integers(0, 10**11), st.integers(1, 20_000))
def test_whoever_asks_for_a_size_gets_it(parameters: int, asked: int) -> None:
    default, alone = (default_step_sizes("cuda", parameters, decode_tokens=tokens) for tokens in (None, asked))
    assert alone.decode_tokens == asked
    assert alone.prefill_tokens == max(default.prefill_tokens, asked)
    for sizes in (default_step_sizes("cuda", parameters, 2, asked), default_step_sizes("cpu", parameters, 2, asked)):
        assert sizes.decode_tokens == sizes.prefill_tokens == asked, "with stages, and on CPUs, no step is larger"


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 4), (3, 2)])
def test_stages_are_on_the_way_and_ranks_beside_each_other_are_not(tp: int, pp: int) -> None:
    spec, whole, plan = LLAMA_8B, build_plan(LLAMA_8B, 1, 1), build_plan(LLAMA_8B, tp, pp)
    share = parameters_on_the_way(spec, plan) / parameters_on_the_way(spec, whole)
    assert share == pytest.approx(1 / tp, rel=0.15)
    room, halved = context_room(spec, whole, 2), context_room(spec, plan, 1)
    assert room.context_per_token == 2 * parameters_on_the_way(spec, whole) // (131_072 * 200) == 612
    assert halved.context_per_token == pytest.approx(2 * 612, rel=0.1)
    assert room.free_context == 34e9 // 131_072
    assert halved.free_context >= 2 * room.free_context


def test_cpus_have_one_size() -> None:
    sizes = default_step_sizes("cpu", 10**9)
    assert sizes.decode_tokens == sizes.prefill_tokens == sizes.most_tokens
