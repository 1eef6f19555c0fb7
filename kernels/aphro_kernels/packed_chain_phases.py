"""The multiplying warps of packed_chain_kernel.py from phase to phase."""
# mypy: disable-error-code="assignment"
# ruff: noqa: N803, N806, RUF005  (constants in capitals; a kernel is one piece; tuples are sums)

from __future__ import annotations

from aphro_kernels.hopper import barrier, gl, hopper, jit
from aphro_kernels.language import tl
from aphro_kernels.packed_chain_products import product
from aphro_kernels.packed_chain_row import load_gain, read_row


@jit()
def multiply_all(
    attended: tl.tensor,
    x: tl.tensor,
    gain: tl.tensor,
    next_gain: tl.tensor,
    bias: tl.tensor,
    inner: tl.tensor,
    qkv: tl.tensor,
    arrivals: tl.tensor,
    eps: tl.tensor,
    out_scales: tl.tensor,
    gate_up_scales: tl.tensor,
    down_scales: tl.tensor,
    qkv_scales: tl.tensor,
    slots: tl.tensor,
    pairs: tl.tensor,
    row: tl.tensor,
    units: tl.tensor,
    sums: tl.tensor,
    full: tl.tensor,
    empty: tl.tensor,
    is_open: tl.tensor,
    ATTENDED: gl.constexpr,
    HIDDEN: gl.constexpr,
    INNER: gl.constexpr,
    QKV: gl.constexpr,
    STRIPES: gl.constexpr,
    QKV_STRIPES: gl.constexpr,
    OUT_GROUP: gl.constexpr,
    GATE_UP_GROUP: gl.constexpr,
    DOWN_GROUP: gl.constexpr,
    QKV_GROUP: gl.constexpr,
    KIND: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    CHAINED: gl.constexpr,
) -> None:
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    OUTPUTS: gl.constexpr = (
        gl.SliceLayout(0, gl.SliceLayout(2, gl.BlockedLayout([1, 1, 1], [1, 8, 4], [8, 1, 1], [2, 1, 0])))
        if KIND == "int4"
        else gl.SliceLayout(0, gl.SliceLayout(2, gl.NVMMADistributedLayout([2, 0], [8, 1, 1], [1, 16, 8])))
    )
    used = 0
    gains = load_gain(gain, HIDDEN)
    read_row(attended, gains, row, units, sums, ATTENDED, False, KIND)
    used = _add_product(
        x, out_scales, slots, pairs, row, units, sums, full, empty, used, HIDDEN, ATTENDED, STRIPES, OUT_GROUP, KIND,
        OUTPUTS,
    )  # fmt: skip
    hopper.mbarrier.wait(is_open.index(0), 0)  # the count has been read before this program adds to it
    _arrive(arrivals)

    hopper.mbarrier.wait(is_open.index(0), 1)
    squares = read_row(x, gains, row, units, sums, HIDDEN, True, KIND)
    norm = gl.rsqrt(squares / HIDDEN + eps)
    output = gl.arange(0, 16, OUTPUTS)
    for unit in range(gl.program_id(0), INNER // 16, gl.num_programs(0)):
        column = unit * 16 + output
        if KIND == "fp8" and GATE_UP_GROUP == 0:
            scale = gl.load(gate_up_scales + column).to(gl.float32)
            up_scale = gl.load(gate_up_scales + INNER + column).to(gl.float32)
        totals, used = product(
            gate_up_scales, unit * 16, INNER, slots, pairs, row, units, sums, full, empty, used, HIDDEN, 2,
            GATE_UP_GROUP, KIND,
        )  # fmt: skip
        gate = gl.convert_layout(totals[0], OUTPUTS) * norm
        up = gl.convert_layout(totals[1], OUTPUTS) * norm
        if KIND == "fp8" and GATE_UP_GROUP == 0:
            gate, up = gate * scale, up * up_scale
        gl.store(inner + column, (gate / (1.0 + gl.exp(-gate)) * up).to(inner.dtype.element_ty))
    _arrive(arrivals)

    if QKV > 0:
        gains = load_gain(next_gain, HIDDEN)
    hopper.mbarrier.wait(is_open.index(0), 0)
    read_row(inner, gains, row, units, sums, INNER, False, KIND)
    used = _add_product(
        x, down_scales, slots, pairs, row, units, sums, full, empty, used, HIDDEN, INNER, STRIPES, DOWN_GROUP, KIND,
        OUTPUTS,
    )  # fmt: skip
    if QKV > 0:
        _arrive(arrivals)
        hopper.mbarrier.wait(is_open.index(0), 1)
        squares = read_row(x, gains, row, units, sums, HIDDEN, True, KIND)
        norm = gl.rsqrt(squares / HIDDEN + eps)
        for unit in range(gl.program_id(0), QKV // (16 * QKV_STRIPES), gl.num_programs(0)):
            first = unit * (16 * QKV_STRIPES)
            totals, used = product(
                qkv_scales, first, 16, slots, pairs, row, units, sums, full, empty, used, HIDDEN, QKV_STRIPES,
                QKV_GROUP, KIND,
            )  # fmt: skip
            for i in gl.static_range(QKV_STRIPES):
                column = first + i * 16 + output
                y = gl.convert_layout(totals[i], OUTPUTS) * norm
                if KIND == "fp8" and QKV_GROUP == 0:
                    y *= gl.load(qkv_scales + column).to(gl.float32)
                if HAS_BIAS:
                    y += gl.load(bias + column).to(gl.float32)
                gl.store(qkv + column, y.to(qkv.dtype.element_ty))


@jit()
def _add_product(
    x: tl.tensor,
    scales: tl.tensor,
    slots: tl.tensor,
    pairs: tl.tensor,
    row: tl.tensor,
    units: tl.tensor,
    sums: tl.tensor,
    full: tl.tensor,
    empty: tl.tensor,
    used: tl.tensor,
    N: gl.constexpr,
    K: gl.constexpr,
    STRIPES: gl.constexpr,
    GROUP: gl.constexpr,
    KIND: gl.constexpr,
    OUTPUTS: gl.constexpr,
) -> tl.tensor:
    """This program's outputs added to ``x``."""
    for unit in range(gl.program_id(0), N // (16 * STRIPES), gl.num_programs(0)):
        first = unit * (16 * STRIPES)
        factors = ()
        before = ()
        for i in gl.static_range(STRIPES):
            column = first + i * 16 + gl.arange(0, 16, OUTPUTS)
            before = before + (gl.load(x + column, cache_modifier=".cg"),)
            if KIND == "fp8" and GROUP == 0:
                factors = factors + (gl.load(scales + column).to(gl.float32),)
        totals, used = product(
            scales, first, 16, slots, pairs, row, units, sums, full, empty, used, K, STRIPES, GROUP, KIND
        )
        for i in gl.static_range(STRIPES):
            y = gl.convert_layout(totals[i], OUTPUTS)
            if KIND == "fp8" and GROUP == 0:
                y *= factors[i]
            y = (before[i].to(gl.float32) + y).to(x.dtype.element_ty)
            gl.store(x + (first + i * 16 + gl.arange(0, 16, OUTPUTS)), y)
    return used


@jit()
def _arrive(arrivals: tl.tensor) -> None:
    """This program's phase is done: all its threads have stored before one of them says so."""
    barrier()
    gl.atomic_add(arrivals, 1, sem="release", scope="gpu")
