"""Kernels without a GPU: Triton's interpreter in a process of its own, and the references against torch's own ops."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from aphro_kernels import language
from aphro_kernels.paged_attention import paged_attention
from aphro_kernels.rms_norm import add_rms_norm_, rms_norm
from aphro_kernels.rotary import rotary_and_cache
from aphro_kernels.sample import gumbel_reference, hash_seeds, sample_reference
from aphro_kernels.silu_and_mul import silu_and_mul
from torch.nn.functional import scaled_dot_product_attention, silu

from tests.kernels.comparisons import DIALS as DIALS_OF_ROWS
from tests.kernels.comparisons import sampling_dials

HERE = Path(__file__).parent
CPU = torch.device("cpu")


def triton_version() -> tuple[int, int]:
    try:
        major, minor = importlib.metadata.version("triton").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return (0, 0)
    return (int(major), int(minor))


@pytest.mark.skipif(triton_version() < (3, 7), reason="the interpreter of Triton before 3.7 fails under numpy 2.4")
def test_kernels_in_tritons_interpreter() -> None:
    """In a process of its own: the switch must be set before anything imports Triton."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


ATTENTION = {
    **dict.fromkeys(["q", "k_cache", "v_cache", "out"], "*bf16"),
    **dict.fromkeys(["block_tables", "seq_lens", "query_start_loc", "num_seqs"], "*i32"),
    **dict.fromkeys(["q_stride", "block_stride", "table_stride"], "i32"),
    **{"scale": "fp32", "GROUP": 4, "GROUP_PADDED": 4, "HEAD_DIM": 80, "DIMS": 128, "BLOCK_SIZE": 16},
    **{"WINDOW": 100, "SOFTCAP": 0.0, "PRECISION": "tf32", "KEYS": 64, "value_scale": "fp32"},
}
OF_FLOAT8 = {"k_cache": "*u8", "v_cache": "*u8", "SOFTCAP": 43.0}
KERNELS: dict[str, dict[str, Any]] = {  # "module.kernel": types of its arguments, values of its constants
    "attention_kernels.attention_kernel": ATTENTION | {"QUERIES": 32, "ROWS": 128},
    "decode_attention._decode_kernel": ATTENTION
    | dict.fromkeys(["stretches", "totals", "arrivals"], "*i32")
    | {"parts": "*fp32", "part_weights": "*fp32", "NUM_KV_HEADS": 2, "HEADS": 4, "ROWS": 16, "FIELDS": 8},
    "attention_kernels.attention_kernel float8": ATTENTION | OF_FLOAT8 | {"QUERIES": 32, "ROWS": 128},
    "decode_work._plan_kernel": {
        **dict.fromkeys(["seq_lens", "stretches", "totals"], "*i32"),
        **{"is_new": "*i64", "num_rows": "i32", "num_programs": "i32", "new_stride": "i32"},
        **{"NUM_KV_HEADS": 2, "KEYS": 64, "WINDOW": 100, "ROWS": 256, "AT_ONCE": 8, "FIELDS": 8},
    },
    "chunk_tiles._find_kernel": {
        **dict.fromkeys(["seq_lens", "query_start_loc", "found"], "*i32"),
        **{"num_seqs": "i32", "num_tiles": "i32"},
        **{"GROUP": 7, "ROWS": 128, "KEYS": 128, "MOST": 4096, "AT_ONCE": 128, "FIELDS": 8},
    },
    "chunk_tiles._order_kernel": {
        **{"found": "*i32", "listed": "*i32", "num_tiles": "i32", "LONG": 8, "AT_ONCE": 128, "FIELDS": 8}
    },
    "begin_step._begin_step_kernel": {
        **dict.fromkeys(["rows", "last_token_ids", "token_ids", "positions", "slot_mapping"], "*i64"),
        **dict.fromkeys(["block_tables", "seq_lens", "row_tables", "stretches", "totals"], "*i32"),
        **dict.fromkeys(["embedding", "x"], "*bf16") | dict.fromkeys(["frequencies", "cos", "sin"], "*fp32"),
        **dict.fromkeys(["num_rows", "num_plans", "table_stride", "num_programs"], "i32") | {"scale": "fp32"},
        **{"BLOCK_SIZE": 16, "BLOCKS": 256, "WIDTH": 1500, "COLUMNS": 1024, "HALF": 40, "DIMS": 64},
        **{"NUM_KV_HEADS": 2, "KEYS": 64, "WINDOW": 0, "ROWS": 256, "AT_ONCE": 8, "FIELDS": 8},
    },
    "step_rows._end_rows_kernel": {
        **dict.fromkeys(["rows", "tokens", "last_token_ids", "answers"], "*i64"),
        **{"is_bad": "*i1", "num_rows": "i32", "line": "i32", "num_places": "i32", "AT_ONCE": 128},
    },
    "rms_norm._rms_norm_kernel": {
        **dict.fromkeys(["x", "residual", "weight", "out"], "*bf16"),
        **dict.fromkeys(["width", "x_stride", "residual_stride", "out_stride"], "i32"),
        **{"eps": "fp32", "HAS_RESIDUAL": True, "BLOCK": 1024},
    },
    "silu_and_mul._silu_and_mul_kernel": {
        **{"x": "*bf16", "out": "*bf16", "width": "i32", "x_stride": "i32", "out_stride": "i32", "BLOCK": 1024}
    },
    "rotary_angles._rotary_angles_kernel": {
        **{"positions": "*i64", "frequencies": "*fp32", "cos": "*fp32", "sin": "*fp32", "num_tokens": "i32"},
        **{"scale": "fp32", "HALF": 40, "DIMS": 64, "TOKENS": 16},
    },
    "rotary._rotary_and_cache_kernel": {
        **dict.fromkeys(["qkv", "q_norm", "k_norm", "q_out", "k_cache", "v_cache"], "*bf16"),
        **{"cos": "*fp32", "sin": "*fp32", "slot_mapping": "*i64", "token_stride": "i32", "block_stride": "i32"},
        **{"key_factor": "fp32", "value_factor": "fp32"},
        **{"eps": "fp32", "HAS_NORM": True, "NUM_HEADS": 9, "NUM_KV_HEADS": 3, "HEAD_DIM": 80, "HALF": 40},
        **{"BLOCK_SIZE": 16, "HEADS": 16, "DIMS": 128},
    },
}

KERNELS["quantise_rows._quantise_rows_kernel"] = {
    **{"x": "*bf16", "out": "*u8", "scales": "*fp32", "width": "i32", "x_stride": "i32", "scale": "fp32"},
    **{"shrink": "fp32", "IS_STATIC": False, "IS_FP8": True, "IS_CODES": True, "LARGEST_CODE": 448.0, "BLOCK": 2048},
}
KERNELS["rotary._rotary_and_cache_kernel float8"] = KERNELS["rotary._rotary_and_cache_kernel"] | {
    "k_cache": "*u8",
    "v_cache": "*u8",
}

DIALS = {
    **dict.fromkeys(["logits"], "*bf16"),
    **dict.fromkeys(["temperature", "log_min_p", "top_p", "peaks", "best", "mass"], "*fp32"),
    **dict.fromkeys(["top_k", "best_ids", "listed"], "*i32"),
    **dict.fromkeys(["seed_hashes", "positions", "token_ids"], "*i64"),
    **dict.fromkeys(["rows", "last_token_ids", "answers"], "*i64"),
    **{"is_bad": "*i1", "row_stride": "i32", "position_offset": "i32", "line": "i32", "num_places": "i32"},
    **{"VOCAB": 50257, "BLOCKS": 393, "BLOCKS_PADDED": 512, "TILES": 13, "TILES_PADDED": 16, "TILE": 4096},
    **{"ALL_GREEDY": False, "tiles_each": "i32"},
}
SKINNY = {
    **dict.fromkeys(["x", "weight", "bias", "out"], "*bf16"),
    **{"parts": "*fp32", "arrivals": "*i32", "num_rows": "i32", "x_stride": "i32"},
    **{
        "scales": "*bf16",
        "offsets": "*bf16",
        "KIND": "plain",
        "GROUP": 0,
        "SPLIT": 1,
        "IS_TILED": False,
        "HAS_ASM": False,
    },
    **{"n": "i32", "k": "i32", "ahead": "i32", "BN": 32, "BK": 256, "IS_EVEN": False, "IS_EARLY": True, "STAGES": 3},
    **{"HAS_BIAS": True},
}
KERNELS |= {f"sample_kernels.{name}_kernel": DIALS for name in ("peaks", "draw", "choose")}
KERNELS |= {
    f"skinny_kernel.skinny_kernel {rows} {gated}": SKINNY | {"ROWS": rows, "IS_GATED": gated}
    for rows in (1, 16)
    for gated in (False, True)
}

KERNELS["peer_all_reduce._one_shot_kernel"] = {
    **dict.fromkeys(["x", "residual", "gain", "out"], "*bf16"),
    **{"memory": "*u8", "peers": "*i64", "calls": "*i32", "status": "*i32", "eps": "fp32"},
    **dict.fromkeys(["num_rows", "width", "x_stride", "slab_rows", "max_polls"], "i32"),
    **{
        "RANK": 1,
        "SIZE": 3,
        "FLAG_BYTES": 8192,
        "IS_FATAL": True,
        "HAS_RESIDUAL": True,
        "HAS_NORM": True,
        "BLOCK": 1024,
    },
}

KERNELS["peer_columns._columns_kernel"] = {
    **{"x": "*bf16", "is_whole": "*i32", "memory": "*u8", "first": "*i64", "expected": "*i32", "status": "*i32"},
    **dict.fromkeys(["num_rows", "width", "kept", "start", "columns", "peaks_at", "max_polls"], "i32"),
    **{"RANK": 0, "SIZE": 3, "FLAG_BYTES": 128, "IS_FATAL": True, "BLOCKS": 32},
}

PEER_LINE: dict[str, Any] = {
    **{"x": "*i32", "memory": "*u8", "peer": "*i64", "calls": "*i32", "status": "*i32"},
    **{"num_rows": "i32", "max_polls": "i32", "SLOTS": 2, "SLOT_WORDS": 4096, "WORDS": 2048, "FLAG_LINE": 32},
    **{"IS_FATAL": True, "ROWS": 1, "COLUMNS": 2048},
}
KERNELS["peer_line._line_kernel put"] = PEER_LINE | {"IS_WRITER": True}
KERNELS["peer_line._line_kernel take"] = PEER_LINE | {"IS_WRITER": False}

KERNELS["peer_two_shot._two_shot_kernel"] = {
    **dict.fromkeys(["x", "residual", "gain", "out"], "*bf16"),
    **{"memory": "*u8", "peers": "*i64", "calls": "*i32", "status": "*i32", "eps": "fp32"},
    **dict.fromkeys(["num_rows", "width", "share", "slab_rows", "max_polls"], "i32"),
    **{"RANK": 1, "SIZE": 3, "PROGRAMS": 256, "LINE": 32, "BLOCK": 1024},
    **{"HAS_RESIDUAL": True, "HAS_NORM": True, "IS_SHARED_OUT": False, "IS_FATAL": True},
}


@pytest.mark.skipif(triton_version() < (3, 4), reason="Triton is not installed")
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_for_a_gpu_that_is_not_there(name: str) -> None:
    """The interpreter takes Python that the compiler refuses; compiling to machine code needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, kernel_name = name.split(maxsplit=1)[0].split(".")
    kernel = getattr(importlib.import_module(f"aphro_kernels.{module}"), kernel_name)
    given = {"CHAINED": True, **KERNELS[name]}
    is_type = {argument: isinstance(value, str) and value not in ("tf32", "plain") for argument, value in given.items()}
    signature = {argument: given[argument] if is_type[argument] else "constexpr" for argument in kernel.arg_names}
    constants = {(i,): given[argument] for i, argument in enumerate(kernel.arg_names) if not is_type[argument]}
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert len(compiled.asm["cubin"]) > 1000


def test_modules_import_without_triton() -> None:
    """Where Triton is missing the ops still answer for CPU tensors."""
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from aphro_kernels import paged_attention, rms_norm, rotary, silu_and_mul\n"
        "print(silu_and_mul.silu_and_mul(torch.ones(1, 4)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "torch.Size([1, 2])", done.stderr


def test_a_gpu_without_triton_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        is_cuda = True

    monkeypatch.setattr(language, "triton", None)
    with pytest.raises(ModuleNotFoundError, match="pip install triton"):
        language.runs_kernels(OnGpu())  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_torchs(dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 96, dtype=dtype), torch.randn(96, dtype=dtype)
    expected = torch.nn.functional.rms_norm(x.double(), (96,), weight.double(), 1e-5).to(dtype)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected)
    residual = torch.randn(5, 96, dtype=dtype)
    total = residual + x
    expected = torch.nn.functional.rms_norm(total.double(), (96,), weight.double(), 1e-5).to(dtype)
    torch.testing.assert_close(add_rms_norm_(residual, x, weight, 1e-5), expected)
    assert torch.equal(residual, total)


def test_silu_and_mul_takes_the_gate_first() -> None:
    gate, up = torch.randn(3, 7), torch.randn(3, 7)
    torch.testing.assert_close(silu_and_mul(torch.cat([gate, up], dim=1)), silu(gate) * up)


def test_rotary_is_transformers() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    qkv, angles = torch.randn(4, 6 + 2 * 2, 32), torch.randn(4, 16)
    k_cache, v_cache = torch.zeros(3, 2, 16, 32), torch.zeros(3, 2, 16, 32)
    slots = torch.tensor([33, -1, 0, 15])
    q = rotary_and_cache(qkv, angles.cos(), angles.sin(), k_cache=k_cache, v_cache=v_cache, slot_mapping=slots)
    both = torch.cat([angles, angles], dim=-1).unsqueeze(0)
    heads = qkv.transpose(0, 1).unsqueeze(0)
    q_expected, k_expected = apply_rotary_pos_emb(heads[:, :6], heads[:, 6:8], both.cos(), both.sin())
    torch.testing.assert_close(q, q_expected[0].transpose(0, 1))
    for token, (block, offset) in {0: (2, 1), 2: (0, 0), 3: (0, 15)}.items():
        torch.testing.assert_close(k_cache[block, :, offset], k_expected[0, :, token])
        assert torch.equal(v_cache[block, :, offset], qkv[token, 8:])
    assert int((k_cache != 0).any(dim=-1).sum()) == 3 * 2  # three tokens, two heads


@pytest.mark.parametrize("window", [None, 5])
def test_attention_is_torchs(window: int | None) -> None:
    """A chunk of 7 queries behind 13 cached keys, and a decode row, through a shuffled block table."""
    k_cache, v_cache = torch.randn(6, 2, 16, 32), torch.randn(6, 2, 16, 32)
    q = torch.randn(8, 4, 32)
    tables = torch.tensor([[4, 1], [0, 5]], dtype=torch.int32)
    out = paged_attention(
        q,
        k_cache,
        v_cache,
        block_tables=tables,
        seq_lens=torch.tensor([20, 18], dtype=torch.int32),
        query_start_loc=torch.tensor([0, 7, 8], dtype=torch.int32),
        max_query_len=7,
        max_seq_len=20,
        scale=0.2,
        window=window,
    )
    for start, stop, seq_len, blocks in ((0, 7, 20, [4, 1]), (7, 8, 18, [0, 5])):
        keys, values = (cache[blocks].transpose(0, 1).flatten(1, 2)[:, :seq_len] for cache in (k_cache, v_cache))
        distance = torch.arange(seq_len - (stop - start), seq_len).unsqueeze(1) - torch.arange(seq_len)
        is_seen = (distance >= 0) & (distance < (window or seq_len))
        queries = q[start:stop].transpose(0, 1)
        expected = scaled_dot_product_attention(
            queries, keys.repeat_interleave(2, 0), values.repeat_interleave(2, 0), attn_mask=is_seen, scale=0.2
        )
        torch.testing.assert_close(out[start:stop], expected.transpose(0, 1))


def test_noise_is_the_workers() -> None:
    from aphro_core.worker.gumbel import GumbelNoise, draw_keys

    seeds, positions = [0, 5, 2**63 - 1], [0, 131071, 9]
    expected = torch.zeros(3, 5000)
    GumbelNoise(5000, CPU).add_(expected, draw_keys(list(zip(seeds, positions, strict=True)), CPU))
    assert torch.equal(gumbel_reference(hash_seeds(seeds), torch.tensor(positions), 5000), expected)


@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_sampling_is_the_workers(spread: float) -> None:
    from aphro_core.request import SamplingParams
    from aphro_core.worker.sampler import Sampler, SamplingRow

    logits = torch.randn(44, 3000, generator=torch.Generator().manual_seed(2)) * spread
    dials = sampling_dials(44, 3000, "cpu")
    rows = [
        SamplingRow(i, SamplingParams(**DIALS_OF_ROWS[i % len(DIALS_OF_ROWS)]), 2**62 // (i + 1), 30 + i, [1], 1)
        for i in range(44)
    ]
    drawn = [token.token_id for token in Sampler(3000, CPU).sample(logits, rows)]
    assert sample_reference(logits, torch.arange(30, 74), dials)[0].tolist() == drawn
