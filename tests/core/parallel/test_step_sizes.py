"""Default step sizes: fewer tokens for larger models, within bounds, and whole tiles on GPUs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aphro_core.parallel.step_sizes import GPU_TOKENS, context_per_token, default_step_sizes


@pytest.mark.parametrize(
    ("parameters", "tokens"), [(8_030_000_000, 1792), (494_000_000, 16384), (3_000_000_000, 4864), (70 * 10**9, 1024)]
)
def test_a_step_beside_streams_lasts_about_50_ms(parameters: int, tokens: int) -> None:
    assert default_step_sizes("cuda", parameters).decode_tokens == tokens


@given(st.integers(0, 10**13), st.integers(0, 10**13))
def test_bounds_and_order(first: int, second: int) -> None:
    less, more = (default_step_sizes("cuda", parameters) for parameters in sorted((first, second)))
    assert GPU_TOKENS[0] <= more.decode_tokens <= less.decode_tokens <= GPU_TOKENS[1]
    assert less.prefill_tokens == max(less.decode_tokens, 8192)
    assert less.decode_tokens % 256 == 0


def test_context_counts_by_the_bytes_of_its_keys_and_values() -> None:
    assert context_per_token(8_030_000_000, 131_072) == 612
    assert context_per_token(8_030_000_000, 65_536) == 1225
    assert context_per_token(0, 0) == 1


def test_cpus_have_one_size() -> None:
    sizes = default_step_sizes("cpu", 10**9)
    assert sizes.decode_tokens == sizes.prefill_tokens == sizes.most_tokens
