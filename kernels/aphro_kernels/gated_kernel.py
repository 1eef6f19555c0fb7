"""The kernel of gated_gemm.py: one warp loads tiles of rows, gate and up by the copy engine, two groups multiply.

A program takes tile after tile, ``num_programs`` apart, or with ``IS_CUT`` an equal stretch of the inputs of all tiles:
then none waits for others at the end. What it has of a tile that began in the program before, it does first and hands
over as sums; what it has of a tile that it begins itself, it does last and adds those of the program behind it.
"""
# ruff: noqa: N803, N806  (the constants of a kernel are in capitals)

from __future__ import annotations

from aphro_kernels.hopper import barrier, gl, hopper, jit
from aphro_kernels.language import tl


@jit(do_not_specialize=["num_rows"])
def gated_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    sums: tl.tensor,
    arrivals: tl.tensor,
    num_rows: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    INPUTS: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    IS_CUT: gl.constexpr,
    CHAINED: gl.constexpr,
) -> None:
    """``sums`` [programs, 2 halves, gate and up, ROWS / 2, COLUMNS] float32 and ``arrivals`` [programs, 2] int32, 0
    between calls, are read where tiles are cut."""
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    BARRIER: gl.constexpr = hopper.mbarrier.MBarrierLayout()
    HALF: gl.constexpr = ROWS // 2
    x_tiles = gl.allocate_shared_memory(x.dtype, [2 * STAGES, HALF, INPUTS], SHARED)
    w_tiles = gl.allocate_shared_memory(x.dtype, [2 * STAGES, COLUMNS, INPUTS], SHARED)
    out_tiles = gl.allocate_shared_memory(x.dtype, [2, HALF, COLUMNS], SHARED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for stage in gl.static_range(STAGES):
        hopper.mbarrier.init(full.index(stage), count=1)
        hopper.mbarrier.init(empty.index(stage), count=2)
    hopper.fence_async_shared()
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    0, out, sums, arrivals, x_tiles, w_tiles, out_tiles, full, empty, num_rows, n, k, ROWS, COLUMNS,
                    INPUTS, GROUP, STAGES, IS_CUT, CHAINED,
                ),
            ),
            (
                _multiply,
                (
                    1, out, sums, arrivals, x_tiles, w_tiles, out_tiles, full, empty, num_rows, n, k, ROWS, COLUMNS,
                    INPUTS, GROUP, STAGES, IS_CUT, CHAINED,
                ),
            ),
            (
                _load,
                (
                    x, weight, x_tiles, w_tiles, full, empty, num_rows, n, k, ROWS, COLUMNS, INPUTS, GROUP, STAGES,
                    IS_CUT, CHAINED,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@jit()
def _stretch(
    num_rows: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    INPUTS: gl.constexpr,
    IS_CUT: gl.constexpr,
) -> tl.tensor:
    """In steps of INPUTS inputs, tile after tile: where this program begins and ends, how many make a tile."""
    steps = (k + INPUTS - 1) // INPUTS
    total = ((num_rows + ROWS - 1) // ROWS) * ((n + COLUMNS - 1) // COLUMNS) * steps
    program = gl.program_id(0)
    begin = program * steps
    end = total
    if IS_CUT:
        begin = program * total // gl.num_programs(0)
        end = (program + 1) * total // gl.num_programs(0)
    return begin, end, steps


@jit()
def _piece(at: tl.tensor, end: tl.tensor, steps: tl.tensor, IS_CUT: gl.constexpr) -> tl.tensor:
    """Of the tile at ``at``: its number, this program's first step and the one behind its last, where it goes on."""
    tile = at // steps
    first = at % steps
    last = gl.minimum(first + end - at, steps)
    following = at + gl.num_programs(0) * steps
    if IS_CUT:
        following = at + last - first
    return tile, first, last, following


@jit()
def _place(
    tile: tl.tensor,
    num_rows: tl.tensor,
    n: tl.tensor,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    GROUP: gl.constexpr,
) -> tl.tensor:
    """First row and first column of a tile."""
    row_tiles = (num_rows + ROWS - 1) // ROWS
    column_tiles = (n + COLUMNS - 1) // COLUMNS
    first = tile // (GROUP * column_tiles) * GROUP
    size = gl.minimum(row_tiles - first, GROUP)
    inside = tile % (GROUP * column_tiles)
    return (first + inside % size) * ROWS, inside // size * COLUMNS


@jit()
def _load(
    x: tl.tensor,
    weight: tl.tensor,
    x_tiles: tl.tensor,
    w_tiles: tl.tensor,
    full: tl.tensor,
    empty: tl.tensor,
    num_rows: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    INPUTS: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    IS_CUT: gl.constexpr,
    CHAINED: gl.constexpr,
) -> None:
    """One warp: both halves of the rows' tile, the gate's and up's. What lies beyond the matrices is zeros.

    The first weights are on their way before the kernel ahead has ended: nobody writes them.
    """
    TILE_BYTES: gl.constexpr = 2 * INPUTS * (ROWS + 2 * COLUMNS)
    at, end, steps = _stretch(num_rows, n, k, ROWS, COLUMNS, INPUTS, IS_CUT)
    tile, first, last, following = _piece(at, end, steps, IS_CUT)
    row, column = _place(tile, num_rows, n, ROWS, COLUMNS, GROUP)
    early = gl.minimum(last - first, STAGES)
    for ahead in gl.static_range(STAGES):
        if ahead < early:
            hopper.mbarrier.expect(full.index(ahead), TILE_BYTES)
            for half in gl.static_range(2):
                at_weight = [column + half * n, (first + ahead) * INPUTS]
                hopper.tma.async_copy_global_to_shared(
                    weight, at_weight, full.index(ahead), w_tiles.index(2 * ahead + half)
                )
    if CHAINED:
        tl.extra.cuda.gdc_wait()
    for ahead in gl.static_range(STAGES):
        if ahead < early:
            for half in gl.static_range(2):
                at_x = [row + half * (ROWS // 2), (first + ahead) * INPUTS]
                hopper.tma.async_copy_global_to_shared(x, at_x, full.index(ahead), x_tiles.index(2 * ahead + half))
    loaded = early
    first += early
    while at < end:
        for step in range(first, last):
            stage = loaded % STAGES
            hopper.mbarrier.wait(empty.index(stage), ((loaded // STAGES) & 1) ^ 1)
            hopper.mbarrier.expect(full.index(stage), TILE_BYTES)
            for half in gl.static_range(2):
                hopper.tma.async_copy_global_to_shared(
                    x, [row + half * (ROWS // 2), step * INPUTS], full.index(stage), x_tiles.index(2 * stage + half)
                )
                hopper.tma.async_copy_global_to_shared(
                    weight, [column + half * n, step * INPUTS], full.index(stage), w_tiles.index(2 * stage + half)
                )
            loaded += 1
        at = following
        tile, first, last, following = _piece(at, end, steps, IS_CUT)
        row, column = _place(tile, num_rows, n, ROWS, COLUMNS, GROUP)


@jit()
def _multiply(
    PART: gl.constexpr,
    out: tl.tensor,
    sums: tl.tensor,
    arrivals: tl.tensor,
    x_tiles: tl.tensor,
    w_tiles: tl.tensor,
    out_tiles: tl.tensor,
    full: tl.tensor,
    empty: tl.tensor,
    num_rows: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    INPUTS: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    IS_CUT: gl.constexpr,
    CHAINED: gl.constexpr,
) -> None:
    """Four warps, half of a tile's rows. A stage is free again when the products after its own have begun."""
    HALF: gl.constexpr = ROWS // 2
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    HALVES: gl.constexpr = COLUMNS // 64
    if CHAINED:
        tl.extra.cuda.gdc_wait()
    out_tile = out_tiles.index(PART)
    out_parts = out_tile._reinterpret(out.dtype, [HALVES, HALF, 64], out_tile.layout)
    used = 0
    at, end, steps = _stretch(num_rows, n, k, ROWS, COLUMNS, INPUTS, IS_CUT)
    while at < end:
        tile, first, last, following = _piece(at, end, steps, IS_CUT)
        gate = gl.zeros([HALF, COLUMNS], gl.float32, SUMS)
        up = gl.zeros([HALF, COLUMNS], gl.float32, SUMS)
        for step in range(first, last):
            stage = used % STAGES
            hopper.mbarrier.wait(full.index(stage), (used // STAGES) & 1)
            left = x_tiles.index(2 * stage + PART)
            gate = hopper.warpgroup_mma(left, w_tiles.index(2 * stage).permute((1, 0)), gate, is_async=True)
            up = hopper.warpgroup_mma(left, w_tiles.index(2 * stage + 1).permute((1, 0)), up, is_async=True)
            gate, up = hopper.warpgroup_mma_wait(2, deps=(gate, up))
            barrier()
            hopper.mbarrier.arrive(empty.index((used + STAGES - 1) % STAGES), count=1, pred=step > first)
            used += 1
        gate, up = hopper.warpgroup_mma_wait(0, deps=(gate, up))
        barrier()
        hopper.mbarrier.arrive(empty.index((used + STAGES - 1) % STAGES), count=1)
        if IS_CUT:  # noqa: SIM102  (one of the two is a constant)
            if (first == 0) & (last < steps):
                gate, up = _add_following(gate, up, sums, arrivals, PART, HALF, COLUMNS, SUMS)
        if first == 0:
            row, column = _place(tile, num_rows, n, ROWS, COLUMNS, GROUP)
            product = gate / (1.0 + gl.exp(-gate)) * up
            hopper.tma.store_wait(0)
            barrier()
            out_tile.store(product.to(out.dtype))
            hopper.fence_async_shared()
            barrier()
            for half in gl.static_range(HALVES):
                hopper.tma.async_copy_shared_to_global(
                    out, [row + PART * HALF, column + half * 64], out_parts.index(half)
                )
        if IS_CUT:  # noqa: SIM102
            if first > 0:
                _hand_over(gate, up, sums, arrivals, PART, HALF, COLUMNS, SUMS)
        at = following
    hopper.tma.store_wait(0)


@jit()
def _hand_over(
    gate: tl.tensor,
    up: tl.tensor,
    sums: tl.tensor,
    arrivals: tl.tensor,
    PART: gl.constexpr,
    HALF: gl.constexpr,
    COLUMNS: gl.constexpr,
    SUMS: gl.constexpr,
) -> None:
    """To the program before this one: each thread's sums lie where the same thread of that one looks for them."""
    at = _places(sums, gl.program_id(0), PART, HALF, COLUMNS, SUMS)
    gl.store(at, gate)
    gl.store(at + HALF * COLUMNS, up)
    barrier()  # all threads have stored before one of them says so
    gl.atomic_xchg(arrivals + 2 * gl.program_id(0) + PART, 1, sem="release", scope="gpu")


@jit()
def _add_following(
    gate: tl.tensor,
    up: tl.tensor,
    sums: tl.tensor,
    arrivals: tl.tensor,
    PART: gl.constexpr,
    HALF: gl.constexpr,
    COLUMNS: gl.constexpr,
    SUMS: gl.constexpr,
) -> tl.tensor:
    """What the program behind this one, which runs at the same time and began with it, has of the tile."""
    program = gl.program_id(0) + 1
    flag = arrivals + 2 * program + PART
    while gl.atomic_cas(flag, 1, 0, sem="acquire", scope="gpu") == 0:
        pass
    barrier()
    at = _places(sums, program, PART, HALF, COLUMNS, SUMS)
    gate += gl.load(at, cache_modifier=".cg")
    up += gl.load(at + HALF * COLUMNS, cache_modifier=".cg")
    return gate, up


@jit()
def _places(
    sums: tl.tensor,
    program: tl.tensor,
    PART: gl.constexpr,
    HALF: gl.constexpr,
    COLUMNS: gl.constexpr,
    SUMS: gl.constexpr,
) -> tl.tensor:
    rows = gl.arange(0, HALF, gl.SliceLayout(1, SUMS))
    columns = gl.arange(0, COLUMNS, gl.SliceLayout(0, SUMS))
    return sums + (2 * program + PART) * (2 * HALF * COLUMNS) + rows[:, None] * COLUMNS + columns[None, :]
