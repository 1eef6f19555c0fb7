"""From the QKV projection to attention's inputs in one pass: QK-norm, rotation, and K and V into the paged cache."""
# ruff: noqa: N803  (the constants of a kernel are in capitals)

from __future__ import annotations

import torch
from torch import Tensor

from aphro_kernels.float8 import FLOAT8, float8_as_bytes, narrow_to_float8
from aphro_kernels.language import (
    chain_options,
    jit,
    let_next_start,
    next_power_of_2,
    runs_kernels,
    tl,
    triton,
    wait_for_last,
)
from aphro_kernels.rms_norm import rms_norm_reference


def rotary_and_cache_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> Tensor:
    num_kv_heads, block_size = k_cache.shape[1:3]
    q, k, v = qkv[:, : -2 * num_kv_heads], qkv[:, -2 * num_kv_heads : -num_kv_heads], qkv[:, -num_kv_heads:]
    q, k = _rotate_reference(q, cos, sin, q_norm, eps), _rotate_reference(k, cos, sin, k_norm, eps)
    is_real = slot_mapping >= 0
    blocks, offsets = slot_mapping[is_real] // block_size, slot_mapping[is_real] % block_size
    for cache, values, scale in ((k_cache, k, key_scale), (v_cache, v, value_scale)):
        if cache.dtype == FLOAT8:
            cache.view(torch.uint8)[blocks, :, offsets] = narrow_to_float8(values[is_real], scale).view(torch.uint8)
        else:
            cache[blocks, :, offsets] = values[is_real].to(cache.dtype)
    return q


def _rotate_reference(x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    wide = x.float() if norm is None else rms_norm_reference(x.float(), norm, eps)
    half = cos.shape[-1]
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x.dtype)


def rotary_and_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> Tensor:
    """Rotated q ``[num_tokens, num_heads, head_dim]``; rotated k, and v, go to their slots and nowhere else.

    ``qkv`` [num_tokens, num_heads + 2 * num_kv_heads, head_dim] is left alone, its tokens may be strided. ``cos``,
    ``sin`` [num_tokens, rotary_dim / 2] float32 are each token's own; dim i < rotary_dim / 2 rotates with
    i + rotary_dim / 2, dims beyond rotary_dim pass. ``q_norm``, ``k_norm`` [head_dim]: RMSNorm per head before the
    rotation, both or neither. Caches ``[num_blocks, num_kv_heads, block_size, head_dim]``. ``slot_mapping``
    [num_tokens] int64 = block * block_size + offset; a negative slot marks padding and is not written. Caches of
    float8_e4m3fn get k / ``key_scale`` and v / ``value_scale``, cut off at its range.
    """
    op = _launch if runs_kernels(qkv) else rotary_and_cache_reference
    return op(
        qkv,
        cos,
        sin,
        k_cache=k_cache,
        v_cache=v_cache,
        slot_mapping=slot_mapping,
        q_norm=q_norm,
        k_norm=k_norm,
        eps=eps,
        key_scale=key_scale,
        value_scale=value_scale,
    )


def _launch(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    num_tokens, num_all_heads, head_dim = qkv.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    num_heads = num_all_heads - 2 * num_kv_heads
    assert qkv.stride()[1:] == (head_dim, 1)
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    assert k_cache[0].is_contiguous()
    assert k_cache.stride() == v_cache.stride()
    out = qkv.new_empty(num_tokens, num_heads, head_dim) if out is None else out
    if num_tokens:
        heads = 16
        _rotary_and_cache_kernel[(num_tokens, triton.cdiv(num_all_heads, heads))](
            qkv,
            cos,
            sin,
            qkv if q_norm is None else q_norm,
            qkv if k_norm is None else k_norm,
            slot_mapping,
            out,
            float8_as_bytes(k_cache),
            float8_as_bytes(v_cache),
            qkv.stride(0),
            k_cache.stride(0),
            eps,
            1.0 / key_scale,
            1.0 / value_scale,
            HAS_NORM=q_norm is not None,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            HALF=cos.shape[-1],
            BLOCK_SIZE=block_size,
            HEADS=heads,
            DIMS=next_power_of_2(head_dim),
            num_warps=4,
            **chain_options(qkv),
        )
    return out


@jit(do_not_specialize=["eps", "key_factor", "value_factor"])
def _rotary_and_cache_kernel(
    qkv: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    q_norm: tl.tensor,
    k_norm: tl.tensor,
    slot_mapping: tl.tensor,
    q_out: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    token_stride: tl.tensor,
    block_stride: tl.tensor,
    eps: tl.tensor,
    key_factor: tl.tensor,
    value_factor: tl.tensor,
    HAS_NORM: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    DIMS: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    let_next_start(CHAINED)
    token = tl.program_id(0).to(tl.int64)
    heads = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]  # q heads, then k heads, then v heads
    dims = tl.arange(0, DIMS)[None, :]
    inside = (heads < NUM_HEADS + 2 * NUM_KV_HEADS) & (dims < HEAD_DIM)
    is_q = heads < NUM_HEADS
    is_kv = heads >= NUM_HEADS
    is_v = heads >= NUM_HEADS + NUM_KV_HEADS
    rotates = inside & (dims < 2 * HALF)
    partner_dims = tl.where(dims < HALF, dims + HALF, dims - HALF)
    angle = tl.where(dims < HALF, dims, dims - HALF)
    cos_row = tl.load(cos + token * HALF + angle, mask=dims < 2 * HALF, other=1.0)
    sin_row = tl.load(sin + token * HALF + angle, mask=dims < 2 * HALF, other=0.0)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    wait_for_last(CHAINED)
    row = qkv + token * token_stride + heads * HEAD_DIM
    x = tl.load(row + dims, mask=inside, other=0.0).to(tl.float32)
    partner = tl.load(row + partner_dims, mask=rotates, other=0.0).to(tl.float32)

    raw = x
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / HEAD_DIM + eps)
        gain_q = tl.load(q_norm + dims, mask=inside & is_q, other=0.0).to(tl.float32)
        gain_k = tl.load(k_norm + dims, mask=inside & is_kv, other=0.0).to(tl.float32)
        x = x * scale * (gain_q + gain_k)
        gain_q = tl.load(q_norm + partner_dims, mask=rotates & is_q, other=0.0).to(tl.float32)
        gain_k = tl.load(k_norm + partner_dims, mask=rotates & is_kv, other=0.0).to(tl.float32)
        partner = partner * scale * (gain_q + gain_k)

    rotated = x * cos_row + partner * tl.where(dims < HALF, -sin_row, sin_row)
    tl.store(
        q_out + (token * NUM_HEADS + heads) * HEAD_DIM + dims,
        rotated.to(q_out.dtype.element_ty),
        mask=inside & is_q,
    )

    kv_head = heads - NUM_HEADS - tl.where(is_v, NUM_KV_HEADS, 0)
    at = slot // BLOCK_SIZE * block_stride + (kv_head * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM + dims
    if slot >= 0:
        is_k = is_kv & (heads < NUM_HEADS + NUM_KV_HEADS)
        tl.store(k_cache + at, _as_stored(rotated, key_factor, k_cache.dtype.element_ty), mask=inside & is_k)
        tl.store(v_cache + at, _as_stored(raw, value_factor, v_cache.dtype.element_ty), mask=inside & is_v)


@jit()
def _as_stored(x: tl.tensor, factor: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """A cache of bytes holds float8."""
    if dtype == tl.uint8:
        return tl.minimum(tl.maximum(x * factor, -448.0), 448.0).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        return x.to(dtype)
