"""The kernels of sample.py: peaks of blocks of the vocabulary, draws from tiles of it, and the choice for each row.

A row's blocks of 128 tokens are known by their largest logit. Whatever concerns only the tokens above some score reads
only the blocks whose peak is above it: of a row as models make them a few, of a flat one all, always exact.
"""
# ruff: noqa: N803, PLR0915  (constants in capitals; a kernel is one piece)

from __future__ import annotations

from typing import Final

from aphro_kernels.language import jit, start_in_chain, tl
from aphro_kernels.step_rows import end_row

BLOCK: Final = 128  # tokens


@jit()
def peaks_kernel(
    logits: tl.tensor,
    peaks: tl.tensor,
    row_stride: tl.tensor,
    VOCAB: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """The largest logit of 32 blocks of one row; +inf for a block with NaN."""
    start_in_chain(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.program_id(1) * 32 + tl.arange(0, 32)
    tile = _load_blocks(logits + row * row_stride, blocks, blocks < BLOCKS, VOCAB)
    tile = tl.where(tile == tile, tile, float("inf"))  # noqa: PLR0124  (NaN is not itself)
    tl.store(peaks + row * BLOCKS + blocks, tl.max(tile, axis=1), mask=blocks < BLOCKS)


@jit(do_not_specialize=["position_offset", "tiles_each"])
def draw_kernel(
    logits: tl.tensor,
    temperature: tl.tensor,
    log_min_p: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    seed_hashes: tl.tensor,
    positions: tl.tensor,
    peaks: tl.tensor,
    best: tl.tensor,
    best_ids: tl.tensor,
    mass: tl.tensor,
    row_stride: tl.tensor,
    position_offset: tl.tensor,
    tiles_each: tl.tensor,
    VOCAB: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_PADDED: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """Of ``tiles_each`` tiles the largest score + noise among those that min_p leaves, and the mass. Not for top_k."""
    start_in_chain(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    heat = tl.load(temperature + row)
    if (heat > 0.0) & (tl.load(top_k + row) >= VOCAB):
        blocks = tl.arange(0, BLOCKS_PADDED)
        peak = tl.max(tl.load(peaks + row * BLOCKS + blocks, mask=blocks < BLOCKS, other=float("-inf")), axis=0)
        floor = tl.load(log_min_p + row)
        key0, key1 = _draw_key(tl.load(seed_hashes + row), tl.load(positions + row) + position_offset)
        first = tl.program_id(1) * tiles_each
        for tile in range(first, tl.minimum(first + tiles_each, TILES)):
            ids = tile * TILE + tl.arange(0, TILE)
            logit = tl.load(logits + row * row_stride + ids, mask=ids < VOCAB, other=float("-inf")).to(tl.float32)
            score = tl.div_rn(logit - peak, tl.zeros_like(logit) + heat)
            noisy = tl.where(score >= floor, score - _log_exponential(ids, key0, key1), float("-inf"))
            value, index = tl.max(noisy, axis=0, return_indices=True)
            at = row * TILES + tile
            tl.store(best + at, value)
            tl.store(best_ids + at, tile * TILE + index)
            tl.store(mass + at, tl.sum(tl.exp(score), axis=0))


@jit(do_not_specialize=["position_offset", "line", "num_places"])
def choose_kernel(
    logits: tl.tensor,
    temperature: tl.tensor,
    log_min_p: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    seed_hashes: tl.tensor,
    positions: tl.tensor,
    peaks: tl.tensor,
    best: tl.tensor,
    best_ids: tl.tensor,
    mass: tl.tensor,
    listed: tl.tensor,
    token_ids: tl.tensor,
    is_bad: tl.tensor,
    rows: tl.tensor | None,
    last_token_ids: tl.tensor | None,
    answers: tl.tensor | None,
    line: tl.tensor,
    num_places: tl.tensor,
    row_stride: tl.tensor,
    position_offset: tl.tensor,
    VOCAB: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_PADDED: tl.constexpr,
    TILES: tl.constexpr,
    TILES_PADDED: tl.constexpr,
    ALL_GREEDY: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """One row: its token, whatever it asks; with ``rows`` also the end of it, step_rows.py says how."""
    start_in_chain(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, BLOCKS_PADDED)
    row_peaks = tl.load(peaks + row * BLOCKS + blocks, mask=blocks < BLOCKS, other=float("-inf"))
    peak = tl.max(row_peaks, axis=0)
    logits += row * row_stride
    sound = (peak < float("inf")) & (peak > float("-inf"))
    heat = tl.load(temperature + row)
    token = 0
    if ALL_GREEDY:
        token = _first_peak(logits, row_peaks, peak, VOCAB, BLOCKS_PADDED)
    elif sound:
        if heat == 0.0:
            token = _first_peak(logits, row_peaks, peak, VOCAB, BLOCKS_PADDED)
        else:
            key0, key1 = _draw_key(tl.load(seed_hashes + row), tl.load(positions + row) + position_offset)
            block_scores = tl.div_rn(row_peaks - peak, tl.zeros_like(row_peaks) + heat)
            floor = tl.load(log_min_p + row)
            k = tl.load(top_k + row)
            p = tl.load(top_p + row)
            listed += row * BLOCKS
            total = 0.0
            if k < VOCAB:
                least = _kth_peak(block_scores, k, BLOCKS)
                least = tl.maximum(least, floor)
                count = _list_blocks(listed, block_scores, least, BLOCKS_PADDED)
                floor = tl.maximum(floor, _kth_score(logits, listed, count, least, k, peak, heat, VOCAB))
                total, token = _scan(logits, listed, count, floor, peak, heat, key0, key1, VOCAB)
            else:
                tiles = tl.arange(0, TILES_PADDED)
                found = tl.load(best + row * TILES + tiles, mask=tiles < TILES, other=float("-inf"))
                tile = tl.argmax(found, axis=0)
                token = tl.load(best_ids + row * TILES + tile)
                if p < float("inf"):
                    if floor > float("-inf"):
                        count = _list_blocks(listed, block_scores, floor, BLOCKS_PADDED)
                        total, _ = _scan(logits, listed, count, floor, peak, heat, key0, key1, VOCAB)
                    else:
                        total = tl.sum(tl.load(mass + row * TILES + tiles, mask=tiles < TILES, other=0.0), axis=0)
            if p < float("inf"):
                # a token is outside if the mass above it reaches top_p: then it and all below leave, as in quickselect
                is_open = True
                while is_open:
                    drawn = _score_of(logits, token, peak, heat)
                    above = _next_above(drawn)
                    count = _list_blocks(listed, block_scores, above, BLOCKS_PADDED)
                    over, other = _scan(logits, listed, count, above, peak, heat, key0, key1, VOCAB)
                    is_open = over >= p * total
                    token = tl.where(is_open, other, token)
    tl.store(token_ids + row, tl.where(sound, token, 0).to(tl.int64))
    tl.store(is_bad + row, ~sound)
    if rows is not None:
        end_row(rows, row, row >= 0, tl.where(sound, token, -1), last_token_ids, answers, line, num_places)


@jit()
def _load_blocks(logits: tl.tensor, blocks: tl.tensor, is_block: tl.tensor, VOCAB: tl.constexpr) -> tl.tensor:
    """``[blocks, 128]`` float32, -inf outside."""
    ids = blocks[:, None] * 128 + tl.arange(0, 128)[None, :]
    return tl.load(logits + ids, mask=is_block[:, None] & (ids < VOCAB), other=float("-inf")).to(tl.float32)


@jit()
def _score_of(logits: tl.tensor, token: tl.tensor, peak: tl.tensor, heat: tl.tensor) -> tl.tensor:
    return tl.div_rn(tl.load(logits + token).to(tl.float32) - peak, heat)


@jit()
def _first_peak(
    logits: tl.tensor, row_peaks: tl.tensor, peak: tl.tensor, VOCAB: tl.constexpr, BLOCKS_PADDED: tl.constexpr
) -> tl.tensor:
    """The first token whose logit is the row's largest."""
    block = tl.min(tl.where(row_peaks == peak, tl.arange(0, BLOCKS_PADDED), BLOCKS_PADDED - 1), axis=0)
    ids = block * 128 + tl.arange(0, 128)
    logit = tl.load(logits + ids, mask=ids < VOCAB, other=float("-inf")).to(tl.float32)
    return tl.minimum(tl.min(tl.where(logit == peak, ids, VOCAB - 1), axis=0), VOCAB - 1)


@jit()
def _list_blocks(
    listed: tl.tensor, block_scores: tl.tensor, least: tl.tensor, BLOCKS_PADDED: tl.constexpr
) -> tl.tensor:
    """Write the blocks that reach ``least`` into ``listed``, in order; returns how many there are."""
    is_listed = (block_scores >= least) & (block_scores > float("-inf"))
    place = tl.cumsum(is_listed.to(tl.int32), axis=0)
    tl.debug_barrier()  # whoever still reads the last list
    tl.store(listed + place - 1, tl.arange(0, BLOCKS_PADDED), mask=is_listed)
    tl.debug_barrier()
    return tl.sum(is_listed.to(tl.int32), axis=0)


@jit()
def _scores(
    logits: tl.tensor,
    listed: tl.tensor,
    start: tl.tensor,
    count: tl.tensor,
    peak: tl.tensor,
    heat: tl.tensor,
    VOCAB: tl.constexpr,
) -> tl.tensor:
    """Blocks (64) and scores ([64, 128], -inf outside) of the list from ``start`` on."""
    places = start + tl.arange(0, 64)
    blocks = tl.load(listed + places, mask=places < count, other=0)
    logit = _load_blocks(logits, blocks, places < count, VOCAB)
    return blocks, tl.div_rn(logit - peak, tl.zeros_like(logit) + heat)


@jit()
def _scan(
    logits: tl.tensor,
    listed: tl.tensor,
    count: tl.tensor,
    least: tl.tensor,
    peak: tl.tensor,
    heat: tl.tensor,
    key0: tl.tensor,
    key1: tl.tensor,
    VOCAB: tl.constexpr,
) -> tl.tensor:
    """Of the tokens that reach ``least``: their mass, and the one with the largest score + noise."""
    total = 0.0
    largest = float("-inf")
    token = 0
    for start in range(0, count, 64):
        blocks, score = _scores(logits, listed, start, count, peak, heat, VOCAB)
        is_in = score >= least
        total += tl.sum(tl.sum(tl.where(is_in, tl.exp(score), 0.0), axis=1), axis=0)
        ids = blocks[:, None] * 128 + tl.arange(0, 128)[None, :]
        noisy = tl.where(is_in, score - _log_exponential(ids, key0, key1), float("-inf"))
        value = tl.max(tl.max(noisy, axis=1), axis=0)
        first = tl.min(tl.min(tl.where(noisy == value, ids, VOCAB), axis=1), axis=0)
        token = tl.where(value > largest, first, token)
        largest = tl.maximum(largest, value)
    return total, token


@jit()
def _order(score: tl.tensor) -> tl.tensor:
    """int32 in the order of the scores, none of which is above 0."""
    return -tl.abs(score).to(tl.int32, bitcast=True)


@jit()
def _score_at(order: tl.tensor) -> tl.tensor:
    return -(-order).to(tl.float32, bitcast=True)


@jit()
def _next_above(score: tl.tensor) -> tl.tensor:
    """The least score above this one; above 0, which is the largest, something that none reaches."""
    return tl.where(score == 0.0, 1.0, _score_at(_order(score) + 1))


@jit()
def _kth_peak(block_scores: tl.tensor, k: tl.tensor, BLOCKS: tl.constexpr) -> tl.tensor:
    """The k-th largest peak of a block, which the k-th largest score at least reaches; -inf with fewer blocks."""
    order = _order(block_scores)
    low = -2139095040  # of -inf
    high = 0
    while low < high:
        middle = low + (high - low + 1) // 2
        is_reached = tl.sum((order >= middle).to(tl.int32), axis=0) >= k
        low = tl.where(is_reached, middle, low)
        high = tl.where(is_reached, high, middle - 1)
    return tl.where(k <= BLOCKS, _score_at(low), float("-inf"))


@jit()
def _kth_score(
    logits: tl.tensor,
    listed: tl.tensor,
    count: tl.tensor,
    least: tl.tensor,
    k: tl.tensor,
    peak: tl.tensor,
    heat: tl.tensor,
    VOCAB: tl.constexpr,
) -> tl.tensor:
    """The k-th largest score, or ``least`` if fewer reach that. The first blocks of the list stay in registers."""
    _, first = _scores(logits, listed, 0, count, peak, heat, VOCAB)
    order = _order(first)
    low = tl.maximum(_order(least), -2139095040)
    high = 0
    while low < high:
        middle = low + (high - low + 1) // 2
        reached = tl.sum(tl.sum((order >= middle).to(tl.int32), axis=1), axis=0)
        for start in range(64, count, 64):
            _, more = _scores(logits, listed, start, count, peak, heat, VOCAB)
            reached += tl.sum(tl.sum((_order(more) >= middle).to(tl.int32), axis=1), axis=0)
        low = tl.where(reached >= k, middle, low)
        high = tl.where(reached >= k, high, middle - 1)
    return _score_at(low)


@jit()
def _draw_key(seed_hash: tl.tensor, position: tl.tensor) -> tl.tensor:
    """splitmix64(seed_hash + position), its high half and its low one."""
    z = (seed_hash + position).to(tl.uint64) + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    return (z >> 32).to(tl.uint32), (z & 0xFFFFFFFF).to(tl.uint32)


@jit()
def _log_exponential(ids: tl.tensor, key0: tl.tensor, key1: tl.tensor) -> tl.tensor:
    """log(E) of the exponential number that (row, token) stands for: minus Gumbel noise (worker/gumbel.py)."""
    bits = ids.to(tl.uint32) + 0x9E3779B9
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    bits = (bits ^ (bits >> 16)) ^ key0
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D + key1
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    bits = (bits ^ (bits >> 16)) & 0x7FFFFFFF
    v = bits.to(tl.float32) * 4.6566123179658803e-10 + 2.3283064365386963e-10
    # -log(1 - v): a series where 1 - v would round v away
    series = v * (1.0 + v * (0.5 + v * (0.3333333333 + v * (0.25 + v * (0.2 + v * 0.1666666667)))))
    return tl.log(tl.where(v < 0.0625, series, -tl.log(1.0 - v)))
