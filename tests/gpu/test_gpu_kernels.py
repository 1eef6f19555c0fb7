"""The kernels on a real GPU against their references: every dtype and head size, model shapes, odd sizes."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from aphro_kernels import decode_work, hopper_attention, tuned
from aphro_kernels.decode_attention import decode_attention
from aphro_kernels.decode_work import build_decode_work, plan_decode_
from aphro_kernels.hopper import suits_hopper
from aphro_kernels.packed_linear import packed_linear_reference
from aphro_kernels.paged_attention import paged_attention_reference
from aphro_kernels.rms_norm import rms_norm
from aphro_kernels.rotary import rotary_and_cache
from aphro_kernels.skinny_linear import SkinnyConfig, build_skinny_workspace, rows_bucket

from aphro_core.quantization.kernel_linear import KernelProduct
from aphro_core.quantization.matrix import PackedMatrix
from tests.kernels.comparisons import (
    assert_close,
    compare_attention,
    compare_begin_step,
    compare_end_rows,
    compare_expert_rows,
    compare_gated_linear,
    compare_grouped_float8_wide,
    compare_grouped_linear,
    compare_grouped_packed_linear,
    compare_grouped_wide,
    compare_list_tiles,
    compare_packed_linear,
    compare_plan_tiles,
    compare_quantise_rows,
    compare_rms_norm,
    compare_rotary,
    compare_rotary_angles,
    compare_route,
    compare_sample,
    compare_silu_and_mul,
    compare_skinny_linear,
    compare_split_places,
    compare_split_rows,
    packed_weight,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 63, 1500])
@pytest.mark.parametrize("width", [1, 63, 576, 1500, 4096, 8192])
def test_rms_norm(num_tokens: int, width: int, dtype: torch.dtype) -> None:
    compare_rms_norm(num_tokens, width, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 63, 1500])
@pytest.mark.parametrize("width", [1, 63, 1536, 14336])
def test_silu_and_mul(num_tokens: int, width: int, dtype: torch.dtype) -> None:
    compare_silu_and_mul(num_tokens, width, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 63, 1500])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "rotary_dim"),
    [(9, 3, 64, 64), (32, 8, 128, 128), (28, 4, 128, 128), (4, 4, 80, 80), (6, 2, 96, 48), (4, 1, 256, 256)],
)
def test_rotary(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    num_tokens: int,
    has_norm: bool,
    dtype: torch.dtype,
) -> None:
    compare_rotary(num_tokens, num_heads, num_kv_heads, head_dim, rotary_dim, dtype, "cuda", has_norm)


@pytest.mark.parametrize(("num_tokens", "half"), [(1, 64), (63, 40), (1500, 128)])
def test_rotary_angles(num_tokens: int, half: int) -> None:
    compare_rotary_angles(num_tokens, half, "cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(1152, 896), (63, 1500), (4096, 4096)])
@pytest.mark.parametrize("num_rows", [1, 2, 9, 31, 64])
def test_skinny_linear(num_rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    for columns, inputs, programs in ((64, 128, 264), (16, 256, 132)):
        config = SkinnyConfig(rows_bucket(num_rows), columns, inputs, programs, 4, 3, 2, programs == 264)
        compare_skinny_linear(num_rows, n, k, config, dtype, "cuda", has_bias=True)
        compare_skinny_linear(num_rows, n, k, config, dtype, "cuda")
        half = SkinnyConfig(rows_bucket(num_rows), columns // 2, inputs, programs, 4, 3, 2, programs == 264)
        compare_skinny_linear(num_rows, n, k, half, dtype, "cuda", is_gated=True, has_bias=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "n", "k"), [(1, 64, 64), (77, 4864, 896), (1000, 1504, 1000), (2500, 8, 4096)])
def test_gated_linear(num_rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    if not suits_hopper(torch.empty(1, device="cuda", dtype=dtype)):
        pytest.skip("a kernel for Hopper, in the Gluon of Triton 3.6")
    compare_gated_linear(num_rows, n, k, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(9, 3, 64), (14, 2, 64), (32, 8, 128), (3, 1, 128)]
)
def test_chunks_on_hopper(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """Of any size, by the kernel that takes large ones: more sequences than it looks at at once, and empty ones."""
    if not suits_hopper(torch.empty(1, device="cuda", dtype=dtype)):
        pytest.skip("a kernel for Hopper, in the Gluon of Triton 3.6")
    heads = (num_heads, num_kv_heads, head_dim, dtype, "cuda")
    with mock.patch.multiple(hopper_attention, _FEWEST_ROWS=0, FEWEST_QUERIES=0):
        compare_attention([2], [2], *heads)
        compare_attention([63, 1, 300, 0, 1], [63, 500, 1100, 40, 1], *heads)
        compare_attention([1500], [1500], *heads)
        compare_attention([7, 2] * 100, [7, 300] * 100, *heads)


@pytest.mark.parametrize("group", [1, 4, 7])
def test_list_tiles(group: int) -> None:
    compare_list_tiles([512, 1, 300, 0, 1] * 3, [512, 500, 9100, 40, 0] * 3, group, "cuda")
    compare_list_tiles([7, 2] * 200, [7, 300] * 200, group, "cuda")


HEADS = [(9, 3, 64), (32, 8, 128), (28, 4, 128), (4, 4, 80), (7, 1, 96), (4, 2, 256), (40, 1, 64), (4, 2, 8)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), HEADS)
def test_decode(num_heads: int, num_kv_heads: int, head_dim: int, window: int | None, dtype: torch.dtype) -> None:
    for seq_lens in ([1], [63, 16, 0, 200], [1500, 1, 257, 4096]):
        compare_attention([1] * len(seq_lens), seq_lens, num_heads, num_kv_heads, head_dim, dtype, "cuda", window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), HEADS)
def test_chunks(num_heads: int, num_kv_heads: int, head_dim: int, window: int | None, dtype: torch.dtype) -> None:
    for query_lens, seq_lens in (([2], [2]), ([70, 63, 1, 300], [0, 63, 500, 1100]), ([1500], [1500])):
        compare_attention(query_lens, seq_lens, num_heads, num_kv_heads, head_dim, dtype, "cuda", window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("softcap", "is_float8"), [(0.7, False), (None, True), (30.0, True)])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(9, 3, 64), (32, 8, 128), (8, 4, 256), (4, 4, 80)])
def test_caps_and_float8(
    num_heads: int, num_kv_heads: int, head_dim: int, softcap: float | None, is_float8: bool, dtype: torch.dtype
) -> None:
    heads = (num_heads, num_kv_heads, head_dim, dtype, "cuda")
    options = {"softcap": softcap, "is_float8": is_float8}
    for window in (None, 100):
        compare_attention([1] * 4, [1500, 1, 257, 4096], *heads, window, **options)
        compare_attention([63, 1, 300, 1], [63, 500, 1100, 1], *heads, window, **options)
        compare_attention([1500], [1500], *heads, window, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(9, 3, 64), (32, 8, 128), (4, 4, 80)])
def test_rotary_into_float8(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    for num_tokens in (1, 63, 1500):
        compare_rotary(num_tokens, num_heads, num_kv_heads, head_dim, head_dim, dtype, "cuda", is_float8=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(14, 2, 64), (16, 1, 64), (32, 8, 128), (28, 4, 128), (16, 1, 128)]
)
def test_decode_of_many_rows(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """By the kernel for Hopper where there is one, and by the other: pieces, segments cut over programs, empty rows."""
    heads = (num_heads, num_kv_heads, head_dim, dtype, "cuda")
    for seq_lens in ([16, 64, 128, 0] * 40, [*range(1, 700, 30)], [3000, 20, 700, 1025]):
        compare_attention([1] * len(seq_lens), seq_lens, *heads)
        with mock.patch.object(decode_work, "is_hopper", return_value=False):
            compare_attention([1] * len(seq_lens), seq_lens, *heads)


def test_rows_read_what_rows_of_their_step_write() -> None:
    """A prefix may be written by the very step that reads it: what is read early is not that. 200 tokens of a sequence
    as rows of one token, behind a long kernel, so that the later ones of the chain are there while it runs."""
    num_rows, num_heads, num_kv_heads, head_dim = 200, 8, 2, 128
    scale = head_dim**-0.5
    qkv = torch.randn(num_rows, num_heads + 2 * num_kv_heads, head_dim, device="cuda", dtype=torch.bfloat16)
    angles = torch.randn(num_rows, head_dim // 2, device="cuda")
    cache = torch.empty(13, 2, num_kv_heads, 16, head_dim, device="cuda", dtype=torch.bfloat16)
    k_cache, v_cache = cache.unbind(1)
    slots = torch.arange(num_rows, device="cuda")
    tables = torch.arange(13, device="cuda", dtype=torch.int32).repeat(num_rows, 1)
    seq_lens = slots.int() + 1
    size = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    work = build_decode_work(num_rows, **size, dtype=cache.dtype, device=cache.device)
    plan_decode_(work, seq_lens, num_kv_heads, is_new=torch.ones_like(slots))
    large, gain = torch.randn(2**16, 4096, device="cuda", dtype=cache.dtype), torch.ones(4096, device="cuda").bfloat16()
    for _ in range(5):
        cache.fill_(math.nan)
        rms_norm(large, gain, 1e-5)
        into = {"k_cache": k_cache, "v_cache": v_cache, "slot_mapping": slots}
        q = rotary_and_cache(qkv.clone(), angles.cos(), angles.sin(), **into)
        found = decode_attention(q, k_cache, v_cache, block_tables=tables, seq_lens=seq_lens, scale=scale, work=work)
        expected = paged_attention_reference(
            q,
            k_cache,
            v_cache,
            block_tables=tables[:1],
            seq_lens=seq_lens[-1:],
            query_start_loc=torch.tensor([0, num_rows], device="cuda", dtype=torch.int32),
            max_query_len=num_rows,
            max_seq_len=num_rows,
            scale=scale,
        )
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


def test_decode_is_the_same_run_for_run() -> None:
    heads = (32, 8, 128, torch.bfloat16, "cuda")
    first = compare_attention([1] * 4, [3000, 20, 700, 1025], *heads)
    again = compare_attention([1] * 4, [3000, 20, 700, 1025], *heads)
    assert torch.equal(first, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.1, 2.0, 6.0])
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(1, 128256), (33, 151936), (256, 49153)])
def test_sample(num_rows: int, vocab_size: int, spread: float, dtype: torch.dtype) -> None:
    compare_sample(num_rows, vocab_size, dtype, "cuda", spread=spread)


@pytest.mark.parametrize("vocab_size", [49152, 50257])
def test_the_sampler_draws_on_a_gpu_what_it_draws_on_a_cpu(vocab_size: int) -> None:
    from aphro_core.request import SamplingParams
    from aphro_core.worker.sampler import Sampler, SamplingRow

    logits = torch.randn(64, vocab_size, generator=torch.Generator().manual_seed(1)) * 3
    dials = [
        {"temperature": 0.0},
        {},
        {"top_k": 50, "top_p": 0.9},
        {"top_p": 0.8, "temperature": 1.5},
        {"min_p": 0.01},
        {"top_k": 300, "repetition_penalty": 1.2, "presence_penalty": 0.5},
    ]
    drawn = []
    for device in ("cpu", "cuda"):
        rows = [SamplingRow(i, SamplingParams(**dials[i % 6]), 2**40 + i, 30 + i, [1, 2, 3, i], 2) for i in range(64)]
        sampled = Sampler(vocab_size, torch.device(device)).sample(logits.to(device), rows)
        drawn.append([token.token_id for token in sampled])
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "top", "num_experts", "here", "shape"),
    [
        (1, 2, 8, range(8), (1024, 512)),
        (63, 2, 8, range(3, 6), (1500, 576)),
        (700, 8, 64, range(64), (192, 256)),
    ],
)
def test_grouped_linear(
    num_tokens: int, top: int, num_experts: int, here: range, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    for is_gated in (False, True):
        compare_grouped_linear(num_tokens, top, num_experts, here, shape, dtype, "cuda", is_gated=is_gated)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "top", "num_experts", "here", "shape"),
    [
        (1, 2, 8, range(8), (1024, 512)),
        (300, 2, 8, range(3, 6), (1504, 576)),
        (900, 4, 60, range(60), (352, 200)),
        (2000, 2, 8, range(8), (4096, 64)),
        (700, 2, 8, range(2, 8), (72, 4096)),
    ],
)
def test_grouped_wide(
    num_tokens: int,
    top: int,
    num_experts: int,
    here: range,
    shape: tuple[int, int],
    is_gated: bool,
    dtype: torch.dtype,
) -> None:
    compare_grouped_wide(num_tokens, top, num_experts, here, shape, dtype, is_gated)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "num_experts", "top"), [(1, 8, 2), (5, 60, 4), (3, 4, 4), (3000, 128, 8)])
def test_route(num_tokens: int, num_experts: int, top: int, dtype: torch.dtype) -> None:
    compare_route(num_tokens, num_experts, top, dtype, "cuda")


@pytest.mark.parametrize("rows", [16, 64, 128])
@pytest.mark.parametrize(
    ("num_tokens", "top", "num_experts", "here"),
    [
        (1, 2, 8, range(8)),
        (16, 2, 8, range(3, 6)),
        (256, 4, 60, range(60)),
        (257, 2, 8, range(8)),
        (8192, 2, 8, range(8)),
        (4000, 8, 128, range(64, 128)),
    ],
)
def test_plan_tiles(num_tokens: int, top: int, num_experts: int, here: range, rows: int) -> None:
    compare_plan_tiles(num_tokens, top, num_experts, here, rows, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "top", "here", "width"), [(1, 2, range(8), 4096), (210, 3, range(2, 5), 1100)])
def test_expert_rows(num_tokens: int, top: int, here: range, width: int, dtype: torch.dtype) -> None:
    compare_expert_rows(num_tokens, top, here, width, dtype, "cuda")


@pytest.mark.parametrize(("num_tokens", "here", "width"), [(1, range(8), 4096), (300, range(2, 5), 14336)])
def test_split_places(num_tokens: int, here: range, width: int) -> None:
    compare_split_places(num_tokens, here, width, "cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize(
    ("num_rows", "shape", "num_groups"),
    [
        (1, (4096, 4096), 32),
        (1, (6144, 4096), 1),
        (16, (1500, 960), 30),
        (32, (4100, 768), 6),
        (3, (72, 96), 1),
        (17, (4104, 4096), 1),
        (32, (4096, 14336), 112),
        (1, (1504, 14336), 112),
    ],
)
def test_packed_linear(num_rows: int, shape: tuple[int, int], num_groups: int, kind: str, dtype: torch.dtype) -> None:
    compare_packed_linear(num_rows, shape, kind, num_groups, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kind", "num_groups"), [("int4", 32), ("int4", 16), ("int8", 64), ("fp8", 1), ("fp8", 8)])
def test_one_output(kind: str, num_groups: int, dtype: torch.dtype) -> None:
    """As the gate of a shared expert is, by whatever a layer takes for so many rows."""
    depth, device = 2048, torch.device("cuda")
    for num_rows in (1, 8):
        compare_packed_linear(num_rows, (1, depth), kind, num_groups, dtype, "cuda")
    weight = packed_weight((1, depth), kind, num_groups, dtype, "cuda")
    matrix = PackedMatrix(weight.kind, weight.codes, weight.scales, weight.offsets)
    product = KernelProduct(matrix, None, build_skinny_workspace(device))
    for num_rows in (1, 2, 20, 60, 300):
        x = torch.randn(num_rows, depth, device=device).to(dtype)
        assert_close(product(x), packed_linear_reference(x, matrix.for_kernels()))
    compare_skinny_linear(1, 1, depth, tuned._for_one_row(1, depth, False), dtype, "cuda")


@pytest.mark.parametrize(("kind", "group"), [("int8", 16), ("int8", 32), ("int4", 32)])  # Q6_K; Q8_0, Q5_0; Q4_K, Q4_0
@pytest.mark.parametrize("num_rows", [1, 8, 20])
@pytest.mark.parametrize("shape", [(1024, 4096), (8192, 512)])
def test_packed_linear_of_gguf_blocks(num_rows: int, shape: tuple[int, int], kind: str, group: int) -> None:
    compare_packed_linear(num_rows, shape, kind, shape[1] // group, torch.bfloat16, "cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4096, 4096), (1504, 14336), (96, 640)])
@pytest.mark.parametrize("num_rows", [1, 3, 8, 17])
def test_packed_linear_of_tiles(num_rows: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    compare_packed_linear(num_rows, shape, "int4", shape[1] // 128, dtype, "cuda", is_tiled=True)


def test_packed_linear_of_tiles_and_split_rows() -> None:
    compare_packed_linear(100, (4096, 4096), "int4", 32, torch.bfloat16, "cuda", is_tiled=True)


@pytest.mark.parametrize(("num_rows", "groups"), [(2, 32), (33, 1), (200, 32)])
def test_packed_linear_of_split_rows(num_rows: int, groups: int) -> None:
    compare_packed_linear(num_rows, (1030, 4096), "fp8", groups, torch.bfloat16, "cuda")


@pytest.mark.parametrize(("num_rows", "width"), [(1, 128), (33, 4096), (5, 14336), (200, 640)])
def test_split_rows(num_rows: int, width: int) -> None:
    compare_split_rows(num_rows, width, "cuda")


@pytest.mark.parametrize("num_tokens", [1, 40, 300])
@pytest.mark.parametrize(("kind", "groups"), [("fp8", 1), ("fp8", 8), ("int4", 8)])
def test_grouped_packed_linear_of_split_rows(num_tokens: int, kind: str, groups: int) -> None:
    options = {"is_tiled": kind == "int4", "is_split": True}
    for is_gated in (False, True):
        compare_grouped_packed_linear(
            num_tokens, 2, range(2, 7), (1040, 1024), kind, groups, torch.bfloat16, "cuda", is_gated=is_gated, **options
        )


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize(
    ("num_tokens", "here", "shape"),
    [(1, range(8), (1024, 1024)), (150, range(3, 6), (1480, 2048)), (900, range(8), (8192, 1024))],
)
def test_grouped_float8_wide(num_tokens: int, here: range, shape: tuple[int, int], groups: int) -> None:
    compare_grouped_float8_wide(num_tokens, here, shape, groups)


def test_grouped_packed_linear_of_tiles() -> None:
    shape = (1024, 512)
    for is_gated in (False, True):
        compare_grouped_packed_linear(
            19, 2, range(2, 5), shape, "int4", 4, torch.bfloat16, "cuda", is_tiled=True, is_gated=is_gated
        )


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize(
    ("num_tokens", "here", "shape", "groups"),
    [(1, range(8), (1024, 512), 4), (19, range(2, 5), (1500, 576), 1), (90, range(8), (72, 256), 8)],
)
def test_grouped_packed_linear(num_tokens: int, here: range, shape: tuple[int, int], groups: int, kind: str) -> None:
    for is_gated in (False, True):
        compare_grouped_packed_linear(
            num_tokens, 2, here, shape, kind, groups, torch.bfloat16, "cuda", is_gated=is_gated
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, 0.01])
@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_quantise_rows(kind: str, scale: float | None, dtype: torch.dtype) -> None:
    for num_rows, width in ((1, 63), (65, 4096), (2, 14336)):
        compare_quantise_rows(num_rows, width, kind, scale, dtype, "cuda")


@pytest.mark.parametrize("scale", [None, 0.01])
@pytest.mark.parametrize("num_rows", [1, 64, 300])
def test_rounded_float8_products(num_rows: int, scale: float | None) -> None:
    """Few rows by the kernel, many by the library's float8 product: both are that of the rounded numbers."""
    from aphro_kernels.quantise_rows import quantise_rows_reference

    from aphro_core.quantization.linear import QuantizedLinear
    from aphro_core.quantization.matrix import RoundedInputs
    from aphro_core.quantization.online import quantise

    matrix = quantise(torch.randn(1536, 1024, device="cuda"), "fp8", None, torch.float32)
    matrix.inputs = RoundedInputs(scale)
    x = torch.randn(num_rows, 1024, device="cuda", dtype=torch.bfloat16)
    layer = QuantizedLinear([matrix], None, torch.bfloat16, build_skinny_workspace(torch.device("cuda")))
    codes, scales = quantise_rows_reference(x, "fp8", scale)
    expected = (codes.float() * scales[:, None]) @ matrix.dequantise(torch.float32).T
    assert (layer(x).float() - expected).norm() / expected.norm() < 5e-3


@pytest.mark.parametrize("num_rows", [1, 63, 256])
@pytest.mark.parametrize("is_whole", [False, True])
def test_begin_step(num_rows: int, is_whole: bool) -> None:
    compare_begin_step(num_rows, "cuda", is_whole=is_whole)


@pytest.mark.parametrize("has_bad", [False, True])
@pytest.mark.parametrize("num_rows", [1, 16, 512])
def test_end_rows(num_rows: int, has_bad: bool) -> None:
    compare_end_rows(num_rows, "cuda", has_bad=has_bad)
