"""How a server lays out the cache of a rank: bytes of a block, blocks that a request needs, tokens that it prints."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import ceil
from typing import Final

from aphro_core.estimate.facts import AttentionFacts, ModelFacts
from aphro_core.estimate.parameters import rank_heads

_WHOLE_HEAD: Final = 256  # what keys and values of latent attention were padded to before servers cached them latent
_EVEN_ENOUGH: Final = 1.5  # the commoner kind has less than so many times the layers of the rarer: one group each


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that share block tables; ``kind`` and ``window`` say which blocks a request holds in them.

    ``block_tokens``: of a block in these groups, None = the layout's. Layers with narrower rows put more tokens into
    the same page.
    """

    kind: str
    window: int | None
    count: int  # groups of this kind
    block_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class KvLayout:
    """One rank's cache. A model of one kind of layers has one group and ``block_tokens`` = the block size."""

    block_bytes: int
    block_tokens: int
    groups: tuple[Group, ...]
    states_per_request: int = 1
    prints_by_concurrency: bool = False  # newest servers derive the printed tokens of hybrids from a request's need

    @property
    def num_groups(self) -> int:
        return sum(group.count for group in self.groups)

    def blocks_per_request(self, num_tokens: int, max_num_batched_tokens: int) -> int:
        """Blocks that one request of so many tokens needs at most, over all groups.

        A sliding layer keeps window - 1 + T tokens and a block that the window's edge cuts, a chunked one chunk + T, a
        state its fixed number (vLLM's kv_cache_interface.py, max_memory_usage_bytes of each kind).
        """
        total = 0
        for group in self.groups:
            kept = num_tokens
            edge = 0
            if group.kind == "sliding" and group.window:
                kept, edge = min(group.window - 1 + max_num_batched_tokens, num_tokens), 1
            elif group.kind == "chunked" and group.window:
                kept = min(group.window + max_num_batched_tokens, num_tokens)
            tokens = group.block_tokens or self.block_tokens
            blocks = self.states_per_request if group.kind == "linear" else ceil(kept / tokens) + edge
            total += group.count * blocks
        return total

    def longest_request(self, num_blocks: int, max_num_batched_tokens: int, limit: int) -> int:
        """Tokens of the largest single request that fits, at most ``limit``."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            if self.blocks_per_request(middle, max_num_batched_tokens) <= num_blocks:
                low = middle
            else:
                high = middle - 1
        return low

    def printed_tokens(self, num_blocks: int, max_model_len: int, max_num_batched_tokens: int) -> int:
        """What servers print as the cache's size: for hybrids blocks // groups x block, or concurrency x length."""
        if self.num_groups > 1 and self.prints_by_concurrency:
            return int(num_blocks / self.blocks_per_request(max_model_len, max_num_batched_tokens) * max_model_len)
        return num_blocks // self.num_groups * self.block_tokens


def layer_token_bytes(
    attention: AttentionFacts, tp: int, tp_rank: int, cache_bytes: int, *, has_latent: bool = True
) -> int:
    """Bytes that one token takes in one layer on a rank; a latent row is whole on every rank."""
    if attention.kind in ("linear", "none") or attention.shares_cache:
        return 0
    if attention.latent is not None and not has_latent:
        return 2 * ceil(attention.num_heads / tp) * _WHOLE_HEAD * cache_bytes
    if attention.latent is not None:
        return (attention.latent.kv_rank + attention.latent.rope_dim) * cache_bytes + attention.index_bytes
    _, kv_heads = rank_heads(attention.num_heads, attention.num_kv_heads, tp, tp_rank)
    return kv_heads * (attention.head_dim + attention.v_head_dim) * cache_bytes


def state_bytes(attention: AttentionFacts, tp: int, dtype_bytes: int, draft_tokens: int = 0) -> int:
    """Bytes of one request's state in one linear layer on a rank."""
    state = attention.state
    assert state is not None
    conv = state.conv_channels // tp * (state.conv_kernel - 1 + draft_tokens) * dtype_bytes
    return state.recurrent // tp * state.recurrent_bytes + conv


def build_layout(
    facts: ModelFacts,
    layers: range,
    *,
    tp: int,
    tp_rank: int,
    block_size: int,
    cache_bytes: int,
    dtype_bytes: int,
    has_groups: bool = True,
    pads_latent: bool = False,
    has_latent: bool = True,
    extra_layers: int = 0,
    states_per_request: int = 1,
    draft_tokens: int = 0,
    prints_by_concurrency: bool = False,
) -> KvLayout:
    """The cache of ``layers`` on one rank.

    ``has_groups`` False: every layer keeps everything, as before hybrids had managers of their own. ``pads_latent``:
    latent rows are multiples of 256 bytes (the old engine); ``has_latent`` False: the
    cache holds whole keys and values instead. ``extra_layers`` are a draft model's, like the first layer.
    """
    attentions = [facts.layers[layer].attention for layer in layers]
    kinds: Counter[tuple[str, int | None]] = Counter(
        (a.kind, a.window) for a in attentions if a.kind != "none" and not a.shares_cache
    )
    if extra_layers and attentions:
        kinds[attentions[0].kind, attentions[0].window] += extra_layers
    if not has_groups:
        kinds = Counter({("full", None): sum(n for (kind, _), n in kinds.items() if kind != "linear")})
    rows = [layer_token_bytes(a, tp, tp_rank, cache_bytes, has_latent=has_latent) for a in attentions]
    if pads_latent and has_latent:
        rows = [ceil(row / 256) * 256 if a.latent else row for row, a in zip(rows, attentions, strict=True)]
    widest = max(rows, default=0)
    tokens = block_size
    states = [state_bytes(a, tp, dtype_bytes, draft_tokens) for a in attentions if a.state is not None]
    if states and widest:
        tokens = max(ceil(max(states) / widest / 16) * 16, block_size)
    if len(kinds) <= 1:
        whole = sum(rows) + extra_layers * widest
        kind, window = next(iter(kinds), ("full", None))
        return KvLayout(max(whole * tokens, 1), tokens, (Group(kind, window, 1),))
    size = _group_size(kinds)
    row_of: dict[tuple[str, int | None], int] = {
        (a.kind, a.window): row for a, row in zip(attentions, rows, strict=True) if row
    }
    groups = tuple(
        Group(kind, window, ceil(count / size), tokens * widest // row_of.get((kind, window), widest))
        for (kind, window), count in kinds.items()
    )
    return KvLayout(size * tokens * widest, tokens, groups, states_per_request, prints_by_concurrency)


def _group_size(kinds: Counter[tuple[str, int | None]]) -> int:
    """Layers in a group: those of the rarer kind, or of the commoner one if they are nearly as many."""
    fewest, most = min(kinds.values()), max(kinds.values())
    return most if most < fewest * _EVEN_ENOUGH else fewest
