"""The online softmax over pages of keys that all attention shares, and the kernel for chunks of queries."""
# ruff: noqa: N803, N806  (the constants of a kernel are in capitals)

from __future__ import annotations

from aphro_kernels.language import jit, start_in_chain, tl


@jit(do_not_specialize=["table_stride", "scale", "value_scale"])
def attention_kernel(
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    out: tl.tensor,
    block_tables: tl.tensor,
    seq_lens: tl.tensor,
    query_start_loc: tl.tensor,
    num_seqs: tl.tensor,
    q_stride: tl.tensor,
    block_stride: tl.tensor,
    table_stride: tl.tensor,
    scale: tl.tensor,
    value_scale: tl.tensor,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """One tile of a sequence's queries, with all heads that share a KV head, against its keys.

    Rows of the tile are queries times heads of the group.
    """
    start_in_chain(CHAINED)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last tiles see most keys: they go first
    kv_head = tl.program_id(1)
    count = tl.load(num_seqs)
    if tile > tl.load(query_start_loc + count) // QUERIES + count:
        return  # room for longer sequences, or more of them
    seq = _sequence_of_tile(query_start_loc, tile, count, QUERIES)
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
    table = block_tables + seq.to(tl.int64) * table_stride
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DIMS], tl.float32)
    # keys that every row of the tile sees need no masks; with a window, all are masked
    plain_high = 0 if WINDOW > 0 else tl.minimum(first_position + 1, high) // KEYS * KEYS
    mixed, largest, total = attend(
        mixed, largest, total, q_tile, positions, k_cache, v_cache, table, kv_head, block_stride, low, plain_high,
        scale, HEAD_DIM, BLOCK_SIZE, WINDOW, SOFTCAP, PRECISION, KEYS, IS_MASKED=False,
    )  # fmt: skip
    mixed, largest, total = attend(
        mixed, largest, total, q_tile, positions, k_cache, v_cache, table, kv_head, block_stride,
        tl.maximum(low, plain_high), high, scale, HEAD_DIM, BLOCK_SIZE, WINDOW, SOFTCAP, PRECISION, KEYS,
        IS_MASKED=True,
    )  # fmt: skip

    row = token * (tl.num_programs(1) * GROUP) + head
    mixed = mixed * (value_scale / tl.where(total > 0.0, total, 1.0))[:, None]
    tl.store(out + row[:, None] * HEAD_DIM + dims[None, :], mixed.to(out.dtype.element_ty), mask=is_inside)


@jit()
def attend(
    mixed: tl.tensor,
    largest: tl.tensor,
    total: tl.tensor,
    q: tl.tensor,
    positions: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    block_table: tl.tensor,
    kv_head: tl.tensor,
    block_stride: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    scale: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    KEYS: tl.constexpr,
    IS_MASKED: tl.constexpr,
) -> tl.tensor:
    """Go on with an online softmax over keys ``low`` to ``high``; scores, and their cap (0: none), in units of log2.

    ``mixed``: sum of values by weight, ``largest`` score, ``total`` weight of each row so far. Nothing outside the
    range is read: it may be anything. Without masks the range is whole tiles of KEYS. A cache of bytes holds float8:
    16-bit queries meet it in float16, which float8 becomes in one instruction and without loss.
    """
    IS_FLOAT8: tl.constexpr = k_cache.dtype.element_ty == tl.uint8
    if IS_FLOAT8 and q.dtype == tl.bfloat16:
        q = q.to(tl.float16)
    factor = scale
    if SOFTCAP > 0:
        factor = 1.0
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
        at = (block * block_stride + (kv_head * BLOCK_SIZE + keys % BLOCK_SIZE) * HEAD_DIM)[:, None] + dims
        k = _load(k_cache + at, is_inside, IS_MASKED or q.shape[1] > HEAD_DIM)
        if IS_FLOAT8:
            k = k.to(tl.float8e4nv, bitcast=True).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if SOFTCAP > 0:
            scores = SOFTCAP * (1.0 - 2.0 / (tl.exp2(scores * (scale * (2.0 * 1.4426950408889634 / SOFTCAP))) + 1.0))
        if IS_MASKED:
            is_seen = is_key[None, :] & (keys[None, :] <= positions[:, None])
            if WINDOW > 0:
                is_seen = is_seen & (keys[None, :] > positions[:, None] - WINDOW)
            scores = tl.where(is_seen, scores, float("-inf"))
        peak = tl.maximum(largest, tl.max(scores, axis=1) * factor)
        shift = peak
        if IS_MASKED:
            shift = tl.where(peak == float("-inf"), 0.0, peak)  # a row that has seen no key yet
        weight = tl.exp2(scores * factor - shift[:, None])
        decay = tl.exp2(largest - shift)
        v = _load(v_cache + at, is_inside, IS_MASKED or q.shape[1] > HEAD_DIM)
        if IS_FLOAT8:
            v = v.to(tl.float8e4nv, bitcast=True).to(q.dtype)
        mixed = mixed * decay[:, None] + tl.dot(weight.to(v.dtype), v, input_precision=PRECISION)
        total = total * decay + tl.sum(weight, axis=1)
        largest = peak
    return mixed, largest, total


@jit()
def _load(at: tl.tensor, is_inside: tl.tensor, IS_MASKED: tl.constexpr) -> tl.tensor:
    if IS_MASKED:
        return tl.load(at, mask=is_inside, other=0)
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
