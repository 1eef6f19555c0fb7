"""The two kernels of paged_attention.py: queries against pages of keys, and the sum of the parts of a split row."""
# ruff: noqa: N803  (the constants of a kernel are in capitals)

from __future__ import annotations

from aphro_kernels.language import jit, tl


@jit(do_not_specialize=["num_seqs", "piece", "table_stride", "scale"])
def attention_kernel(
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    out: tl.tensor,
    weights: tl.tensor,
    block_tables: tl.tensor,
    seq_lens: tl.tensor,
    query_start_loc: tl.tensor,
    num_seqs: tl.tensor,
    piece: tl.tensor,
    q_stride: tl.tensor,
    block_stride: tl.tensor,
    table_stride: tl.tensor,
    scale: tl.tensor,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    IS_DECODE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """One tile of a sequence's queries, with all heads that share a KV head, against its keys or a piece of them.

    Rows of the tile are queries times heads of the group. Decode: tile = sequence = its only query.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # of a prefill the last tiles see most keys: they go first
    kv_head = tl.program_id(1)
    if IS_DECODE:
        seq, start, query_len, first = tile, tile, 1, 0
    else:
        seq = _sequence_of_tile(query_start_loc, tile, num_seqs, QUERIES)
        start = tl.load(query_start_loc + seq)
        query_len = tl.load(query_start_loc + seq + 1) - start
        first = (tile - (start // QUERIES + seq)) * QUERIES
        if first >= query_len:
            return
    seq_len = tl.load(seq_lens + seq)
    first_position = seq_len - query_len + first
    low = 0
    high = tl.minimum(first_position + QUERIES, seq_len)
    if WINDOW > 0:
        low = tl.maximum(low, first_position - WINDOW + 1)
    if IS_DECODE:
        low = tl.maximum(low, tl.program_id(2) * piece)
        high = tl.minimum(high, (tl.program_id(2) + 1) * piece)
        if IS_SPLIT:  # noqa: SIM102  (a constant outside, a number of the GPU inside)
            if low >= high:  # combine_kernel reads no such piece
                return

    rows = tl.arange(0, ROWS)
    query = rows // GROUP_PADDED
    head = kv_head * GROUP + rows % GROUP_PADDED
    is_row = (query < QUERIES) & (first + query < query_len) & (rows % GROUP_PADDED < GROUP)
    dims = tl.arange(0, DIMS)
    is_inside = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    token = (start + first + query).to(tl.int64)
    q_at = q + token[:, None] * q_stride + head[:, None] * HEAD_DIM + dims[None, :]
    q_tile = tl.load(q_at, mask=is_inside, other=0.0)
    positions = first_position + query
    k_cache += kv_head * BLOCK_SIZE * HEAD_DIM
    v_cache += kv_head * BLOCK_SIZE * HEAD_DIM
    table = block_tables + seq.to(tl.int64) * table_stride
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DIMS], tl.float32)
    # keys that every row of the tile sees need no masks; with a window, all are masked
    plain_high = 0 if WINDOW > 0 else tl.minimum(first_position + 1, high) // KEYS * KEYS
    mixed, largest, total = _attend(
        mixed, largest, total, q_tile, positions, k_cache, v_cache, table, block_stride, low, plain_high, scale,
        HEAD_DIM, BLOCK_SIZE, WINDOW, PRECISION, KEYS, IS_MASKED=False,
    )  # fmt: skip
    mixed, largest, total = _attend(
        mixed, largest, total, q_tile, positions, k_cache, v_cache, table, block_stride, tl.maximum(low, plain_high),
        high, scale, HEAD_DIM, BLOCK_SIZE, WINDOW, PRECISION, KEYS, IS_MASKED=True,
    )  # fmt: skip

    row = token * (tl.num_programs(1) * GROUP) + head
    if IS_SPLIT:
        row = row * tl.num_programs(2) + tl.program_id(2)
        tl.store(weights + row, largest + tl.log2(total), mask=is_row)
    mixed = mixed / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(out + row[:, None] * HEAD_DIM + dims[None, :], mixed.to(out.dtype.element_ty), mask=is_inside)


@jit()
def _attend(
    mixed: tl.tensor,
    largest: tl.tensor,
    total: tl.tensor,
    q: tl.tensor,
    positions: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    block_table: tl.tensor,
    block_stride: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    scale: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    KEYS: tl.constexpr,
    IS_MASKED: tl.constexpr,
) -> tl.tensor:
    """Go on with an online softmax over keys ``low`` to ``high``; scores in units of log2.

    ``mixed``: sum of values by weight, ``largest`` score, ``total`` weight of each row so far. Nothing outside the
    range is read: it may be anything. Without masks the range is whole tiles of KEYS.
    """
    dims = tl.arange(0, q.shape[1])[None, :]
    for start in range(low // KEYS * KEYS, high, KEYS):
        keys = start + tl.arange(0, KEYS)
        if IS_MASKED:
            is_key = (keys >= low) & (keys < high)
            is_inside = is_key[:, None] & (dims < HEAD_DIM)
            block = tl.load(block_table + keys // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
        else:
            is_inside = (keys >= 0)[:, None] & (dims < HEAD_DIM)
            block = tl.load(block_table + keys // BLOCK_SIZE).to(tl.int64)
        at = (block * block_stride + keys % BLOCK_SIZE * HEAD_DIM)[:, None] + dims
        k = _load(k_cache + at, is_inside, IS_MASKED or q.shape[1] > HEAD_DIM)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if IS_MASKED:
            is_seen = is_key[None, :] & (keys[None, :] <= positions[:, None])
            if WINDOW > 0:
                is_seen = is_seen & (keys[None, :] > positions[:, None] - WINDOW)
            scores = tl.where(is_seen, scores, float("-inf"))
        peak = tl.maximum(largest, tl.max(scores, axis=1) * scale)
        shift = peak
        if IS_MASKED:
            shift = tl.where(peak == float("-inf"), 0.0, peak)  # a row that has seen no key yet
        weight = tl.exp2(scores * scale - shift[:, None])
        decay = tl.exp2(largest - shift)
        v = _load(v_cache + at, is_inside, IS_MASKED or q.shape[1] > HEAD_DIM)
        mixed = mixed * decay[:, None] + tl.dot(weight.to(v.dtype), v, input_precision=PRECISION)
        total = total * decay + tl.sum(weight, axis=1)
        largest = peak
    return mixed, largest, total


@jit()
def _load(at: tl.tensor, is_inside: tl.tensor, IS_MASKED: tl.constexpr) -> tl.tensor:
    if IS_MASKED:
        return tl.load(at, mask=is_inside, other=0.0)
    else:
        return tl.load(at)


@jit()
def _sequence_of_tile(
    query_start_loc: tl.tensor, tile: tl.tensor, num_seqs: tl.tensor, QUERIES: tl.constexpr
) -> tl.tensor:
    """The last sequence whose tiles begin at or before ``tile``; sequence s begins at start // QUERIES + s."""
    low = 0
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start_loc + middle) // QUERIES + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@jit(do_not_specialize=["num_pieces", "piece"])
def combine_kernel(
    parts: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    seq_lens: tl.tensor,
    num_pieces: tl.tensor,
    piece: tl.tensor,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    WINDOW: tl.constexpr,
    PIECES: tl.constexpr,
) -> None:
    """Add the pieces of one row and head, each weighted by exp2 of its log-sum-exp, always in the same order."""
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    dims = tl.arange(0, DIMS)
    seq_len = tl.load(seq_lens + tl.program_id(0))
    low = 0
    if WINDOW > 0:
        low = tl.maximum(seq_len - WINDOW, 0) // piece
    high = tl.cdiv(seq_len, piece)
    largest = float("-inf")
    total = 0.0
    mixed = tl.zeros([DIMS], tl.float32)
    for start in range(low, high, PIECES):
        pieces = start + tl.arange(0, PIECES)
        at = row * num_pieces + pieces
        weight = tl.load(weights + at, mask=pieces < high, other=float("-inf"))
        part_at = parts + at[:, None] * HEAD_DIM + dims[None, :]
        part = tl.load(part_at, mask=(pieces < high)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
        peak = tl.maximum(largest, tl.max(weight, axis=0))
        share = tl.exp2(weight - peak)
        decay = tl.exp2(largest - peak)
        mixed = mixed * decay + tl.sum(part * share[:, None], axis=0)
        total = total * decay + tl.sum(share, axis=0)
        largest = peak
    mixed = mixed / tl.where(total > 0.0, total, 1.0)
    tl.store(out + row * HEAD_DIM + dims, mixed.to(out.dtype.element_ty), mask=dims < HEAD_DIM)
