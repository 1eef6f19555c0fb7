"""One step as tensors: where its rows stand in the paged cache, for the two ways of attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from aphro_kernels.begin_step import BegunRows
from aphro_kernels.decode_work import DecodeWork
from torch import Tensor


@dataclass(slots=True)
class DirectRows:
    """The first rows of the batch, each read straight from the cache: those that decode, and short prompts'."""

    block_tables: Tensor  # [rows, max_blocks] int64
    seq_lens: Tensor  # [rows] int64: keys of each, its own token's included


@dataclass(slots=True)
class ChunkTile:
    """Queries ``start`` to ``stop`` of a chunk with the keys that any of them sees."""

    start: int
    stop: int
    keys_t: Tensor  # [num_kv_heads, head_dim, keys]
    values: Tensor  # [num_kv_heads, keys, head_dim]
    scores: Tensor  # [num_kv_heads, group * queries, keys], scratch memory
    masked_scores: Tensor  # [num_kv_heads, group, queries, masked keys]: those of the last keys; all before are seen
    mask: Tensor  # [queries, masked keys]: 0 or -inf


@dataclass(slots=True)
class Chunk:
    """Rows ``start`` to ``stop`` of the batch: consecutive tokens of one sequence, behind a context or not."""

    start: int
    stop: int
    block_rows: Tensor
    gathered: Tensor
    tiles: list[ChunkTile]


@dataclass(slots=True)
class GatheredRows:
    """For attention on a CPU: rows of the cache to write, block tables to read through, rows to gather for chunks.

    The cache ``[num_blocks, 2, num_kv_heads, block_size, head_dim]`` is seen as a matrix: one row a (block, K or V,
    head, offset) to write, one row a (block, K or V, head) to gather.
    """

    slot_rows: Tensor  # [num_tokens, 2 * num_kv_heads] int64: each token's K heads, then its V heads
    direct: DirectRows | None
    chunks: dict[int | None, list[Chunk]]  # by the window of a layer


@dataclass(slots=True)
class PagedPart:
    """Rows ``start`` to ``stop`` of the batch for one call of the paged attention kernel."""

    start: int
    stop: int
    block_tables: Tensor  # [num_seqs, max_blocks] int32
    seq_lens: Tensor  # [num_seqs] int32
    query_start_loc: Tensor  # [num_seqs + 1] int32
    max_query_len: int
    max_seq_len: int
    num_seqs: Tensor | None = None  # [1] int32, how many of the sequences of chunks there are; None: all
    is_long: bool = False  # whether chunks are, on average
    works: Mapping[int | None, DecodeWork] = field(default_factory=dict)  # by window; planned, if max_query_len is 1
    tiles: Tensor | None = None  # of chunks, listed by the first layer whose kernel reads such a list


@dataclass(slots=True)
class PagedRows:
    """For the kernels (GPU): slots to write, block tables to read."""

    slot_mapping: Tensor  # [num_tokens] int64 = block * block_size + offset
    parts: list[PagedPart]  # in the order of the calls: what one gives a row that is not its own, a later one replaces


@dataclass(slots=True)
class Batch:
    """One step of a rank. Rows are tokens: decode rows first, then the chunks, the short contexts before the long."""

    token_ids: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64
    cache_rows: GatheredRows | PagedRows
    first_rows: dict[int, int]  # seq_id -> its first row
    sampled_rows: Tensor  # [samples] int64, in plan order
    begun: BegunRows | None = None  # where embeddings and angles are made already

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]
