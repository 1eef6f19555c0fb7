"""Layouts of the cache: hybrids against published logs, and what must hold for every layout."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aphro_core.estimate.config_reader import read_facts
from aphro_core.estimate.kv_layout import Group, KvLayout, build_layout, state_bytes
from tests.core.estimate.configs import DEEPSEEK_LITE, GEMMA3_27B, LLAMA_8B, QWEN_HYBRID_27B


def layout_of(config: dict[str, object], tp: int = 1, cache_bytes: int = 2, **changes: bool | int) -> KvLayout:
    facts = read_facts(config)
    whole = {"tp": tp, "tp_rank": 0, "block_size": 16, "cache_bytes": cache_bytes, "dtype_bytes": 2} | changes
    return build_layout(facts, range(facts.num_layers), **whole)  # type: ignore[arg-type]


def test_grouped_query_attention() -> None:
    assert layout_of(LLAMA_8B).block_bytes == 2 * 2**20
    assert layout_of(LLAMA_8B, tp=3).block_bytes == 32 * 2 * 3 * 128 * 2 * 16  # the largest share: 3 of 8 heads
    assert layout_of(LLAMA_8B, tp=16).block_bytes == layout_of(LLAMA_8B, tp=8).block_bytes  # copied


def test_latent_rows_are_whole_on_every_rank() -> None:
    assert layout_of(DEEPSEEK_LITE).block_bytes == 27 * 576 * 2 * 16
    assert layout_of(DEEPSEEK_LITE, tp=4).block_bytes == layout_of(DEEPSEEK_LITE).block_bytes
    assert layout_of(DEEPSEEK_LITE, pads_latent=True).block_bytes == 27 * 1280 * 16


def test_linear_attention_stretches_the_block() -> None:
    """Qwen3.8-27B at tp 2: 208 blocks of 1568 tokens print 302,921 tokens at 131,072."""
    facts = read_facts(QWEN_HYBRID_27B)
    linear = next(layer.attention for layer in facts.layers if layer.attention.state)
    assert round(state_bytes(linear, 2, 2) / 2**20, 2) == 1.53
    layout = layout_of(QWEN_HYBRID_27B, tp=2, cache_bytes=1, states_per_request=2, prints_by_concurrency=True)
    assert (layout.block_tokens, layout.num_groups) == (1568, 4)
    assert layout_of(QWEN_HYBRID_27B, tp=2, cache_bytes=2).block_tokens == 784
    assert layout.blocks_per_request(131_072, 8192) == 84 + 3 * 2
    assert layout.printed_tokens(208, 131_072, 8192) == 302_921


def test_without_groups_everything_is_kept() -> None:
    assert layout_of(GEMMA3_27B, has_groups=False).block_bytes == 62 * 2 * 16 * 128 * 2 * 16


def test_draft_layers_are_layers() -> None:
    assert layout_of(LLAMA_8B, extra_layers=1).block_bytes * 32 == layout_of(LLAMA_8B).block_bytes * 33


@given(
    st.integers(1, 200_000),
    st.integers(1, 200_000),
    st.sampled_from(["full", "sliding", "chunked"]),
    st.integers(1, 8192),
    st.integers(1, 8),
)
def test_longest_request_is_the_longest(blocks: int, limit: int, kind: str, window: int, count: int) -> None:
    layout = KvLayout(1024, 16, (Group("full", None, 1), Group(kind, window, count)))
    longest = layout.longest_request(blocks, 2048, limit)
    assert 0 <= longest <= limit
    assert longest == 0 or layout.blocks_per_request(longest, 2048) <= blocks
    assert longest == limit or layout.blocks_per_request(longest + 1, 2048) > blocks
