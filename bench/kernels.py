"""Times the Triton kernels on a GPU: achieved bytes or FLOPs a second against ceilings measured in the same process.

Each figure is the median over replays of one CUDA graph of many calls, whose inputs rotate past the L2 cache.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from aphro_kernels.decode_work import build_decode_work, plan_decode_
from aphro_kernels.gated_gemm import gated_linear, is_faster
from aphro_kernels.language import triton
from aphro_kernels.paged_attention import paged_attention
from aphro_kernels.rms_norm import add_rms_norm_, rms_norm
from aphro_kernels.rotary import rotary_and_cache
from aphro_kernels.sample import SamplingDials, build_sample_workspace, sample
from aphro_kernels.silu_and_mul import silu_and_mul
from aphro_kernels.skinny_linear import build_skinny_workspace, skinny_linear
from aphro_kernels.tuned import skinny_config
from torch import Tensor
from torch.nn.functional import linear

BLOCK_SIZE = 16
ROTATED_BYTES = 256 * 2**20  # of inputs, several times an L2


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int


SHAPES = {
    "llama-3-8b": Shape(4096, 14336, 32, 8, 128, 128256),
    "qwen2.5-7b": Shape(3584, 18944, 28, 4, 128, 152064),
    "qwen2.5-0.5b": Shape(896, 4864, 14, 2, 64, 151936),
    "smollm2-135m": Shape(576, 1536, 9, 3, 64, 49152),
}


def seconds_per_call(call: Callable[[int], object], num_sets: int, calls: int = 24) -> float:
    """Median seconds of ``call(set)``, with ``set`` going round over ``num_sets`` sets of inputs."""
    for index in range(min(num_sets, 3)):  # compiles, and lets the allocator settle
        call(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(calls):
            call(index % num_sets)
    times: list[float] = []
    for _ in range(9):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000 / calls)
    return statistics.median(times[2:])


def copy_bandwidth() -> float:
    """Bytes a second, read and written."""
    big = torch.randn(2, 2**29, device="cuda")
    return big.nbytes / seconds_per_call(lambda _: torch.neg(big[1], out=big[0]), 1, calls=3)


class Table:
    """Measures the two ceilings, then prints a row a kernel."""

    def __init__(self) -> None:
        square = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
        for _ in range(100):  # until the clocks have settled
            square[0] @ square[1]
        self.bandwidth = copy_bandwidth()
        self.flops = 2 * 8192**3 / seconds_per_call(lambda i: square[i] @ square[1 - i], 2, calls=6)
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
        print(f"ceilings: copy {self.bandwidth / 1e12:.2f} TB/s, bf16 product {self.flops / 1e12:.0f} TFLOP/s\n")
        print(f"{'kernel':44} {'us':>9} {'rate':>14} {'of ceiling':>11}")

    def add(self, name: str, seconds: float, *, num_bytes: float = 0.0, flops: float = 0.0) -> None:
        if num_bytes:
            rate, share = f"{num_bytes / seconds / 1e12:.2f} TB/s", num_bytes / seconds / self.bandwidth
        else:
            rate, share = f"{flops / seconds / 1e12:.0f} TFLOP/s", flops / seconds / self.flops
        print(f"{name:44} {seconds * 1e6:9.1f} {rate:>14} {share:10.0%}", flush=True)


def rotation(*shape: int) -> list[Tensor]:
    """Enough random bfloat16 tensors of this shape to outgrow the cache."""
    num_sets = min(max(ROTATED_BYTES // (2 * torch.Size(shape).numel()), 2), 24)
    return [torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for _ in range(num_sets)]


def time_rows(table: Table, shape: Shape, num_tokens: int) -> None:
    """Norms, activation, rotation: all bound by memory."""
    weight = torch.randn(shape.hidden, device="cuda", dtype=torch.bfloat16)
    xs, residuals = rotation(num_tokens, shape.hidden), rotation(num_tokens, shape.hidden)
    row = 2 * num_tokens * shape.hidden
    time = seconds_per_call(lambda i: rms_norm(xs[i], weight, 1e-5), len(xs))
    table.add(f"rms_norm, {num_tokens} rows", time, num_bytes=2 * row)
    time = seconds_per_call(lambda i: add_rms_norm_(residuals[i], xs[i], weight, 1e-5), len(xs))
    table.add(f"add_rms_norm_, {num_tokens} rows", time, num_bytes=4 * row)

    merged = rotation(num_tokens, 2 * shape.intermediate)
    time = seconds_per_call(lambda i: silu_and_mul(merged[i]), len(merged))
    table.add(f"silu_and_mul, {num_tokens} rows", time, num_bytes=6 * num_tokens * shape.intermediate)

    qkvs = rotation(num_tokens, shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim)
    angles = torch.randn(num_tokens, shape.head_dim // 2, device="cuda")
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    cache = torch.empty(2, num_blocks, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim, device="cuda", dtype=xs[0].dtype)
    slots, cos, sin = torch.randperm(num_blocks * BLOCK_SIZE, device="cuda")[:num_tokens], angles.cos(), angles.sin()
    time = seconds_per_call(
        lambda i: rotary_and_cache(qkvs[i], cos, sin, k_cache=cache[0], v_cache=cache[1], slot_mapping=slots), len(qkvs)
    )
    table.add(f"rotary_and_cache, {num_tokens} rows", time, num_bytes=2 * qkvs[0].nbytes + 2 * cos.nbytes)


def time_products(table: Table, shape: Shape, num_rows: int) -> None:
    """A layer's products and the head: the library's, and ours where the table of this device has one."""
    attended = shape.num_heads * shape.head_dim
    qkv = attended + 2 * shape.num_kv_heads * shape.head_dim
    sizes = {"qkv": (qkv, shape.hidden), "output": (shape.hidden, attended), "down": (shape.hidden, shape.intermediate)}
    sizes |= {"gate, up": (2 * shape.intermediate, shape.hidden), "head": (shape.vocab_size, shape.hidden)}
    workspace = build_skinny_workspace(torch.device("cuda"))
    for name, (n, k) in sizes.items():
        is_gated = name == "gate, up"
        weights = [weight / k**0.5 for weight in rotation(n, k)]
        x = torch.randn(num_rows, k, device="cuda", dtype=torch.bfloat16)

        def library(index: int, x: Tensor = x, weights: list[Tensor] = weights, is_gated: bool = is_gated) -> Tensor:
            y = linear(x, weights[index])
            return silu_and_mul(y) if is_gated else y

        num_bytes = weights[0].nbytes + x.nbytes + 2 * num_rows * n
        table.add(f"{name}, {num_rows} rows, cuBLAS", seconds_per_call(library, len(weights)), num_bytes=num_bytes)
        config = skinny_config(weights[0], num_rows, is_gated=is_gated)
        if config is not None:
            options = {"config": config, "workspace": workspace, "is_gated": is_gated}
            time = seconds_per_call(
                lambda i, x=x, weights=weights, options=options: skinny_linear(x, weights[i], **options), len(weights)
            )
            table.add(f"{name}, {num_rows} rows, by table", time, num_bytes=num_bytes)


def time_gated(table: Table, shape: Shape, num_rows: int) -> None:
    """Gate, up and SiLU of many rows: the library's product and a kernel after it, and ours in one."""
    weight = torch.randn(2 * shape.intermediate, shape.hidden, device="cuda", dtype=torch.bfloat16) / shape.hidden**0.5
    x = torch.randn(num_rows, shape.hidden, device="cuda", dtype=torch.bfloat16)
    flops = 4 * num_rows * shape.intermediate * shape.hidden
    time = seconds_per_call(lambda _: silu_and_mul(linear(x, weight)), 1, calls=10)
    table.add(f"gate, up, SiLU, {num_rows} rows, cuBLAS", time, flops=flops)
    if is_faster(x, weight):
        time = seconds_per_call(lambda _: gated_linear(x, weight), 1, calls=10)
        table.add(f"gate, up, SiLU, {num_rows} rows, in one", time, flops=flops)


def time_sampler(table: Table, shape: Shape, num_rows: int) -> None:
    """Against one read of the 16-bit logits."""
    logits = rotation(num_rows, shape.vocab_size)
    positions = torch.arange(num_rows, device="cuda")
    workspace = build_sample_workspace(num_rows, shape.vocab_size, logits[0].device)
    off = {"temperature": 1.0, "log_min_p": -math.inf, "top_k": shape.vocab_size, "top_p": math.inf}
    for name, asked in {
        "greedy": {"temperature": 0.0},
        "temperature": {},
        "top_k 50, top_p 0.9": {"top_k": 50, "top_p": 0.9},
    }.items():
        columns = [torch.full((num_rows,), float(value), device="cuda") for value in (off | asked).values()]
        seeds = torch.arange(num_rows, device="cuda")
        dials = SamplingDials(columns[0], columns[1], columns[2].int(), columns[3], seeds)
        time = seconds_per_call(
            lambda i, dials=dials: sample(logits[i], positions, dials, workspace=workspace), len(logits)
        )
        table.add(f"sample, {name}, {num_rows} rows", time, num_bytes=logits[0].nbytes)


def time_attention(table: Table, shape: Shape, name: str, query_lens: list[int], seq_lens: list[int]) -> None:
    blocks_of = [-(-seq_len // BLOCK_SIZE) for seq_len in seq_lens]
    head_bytes = 2 * shape.num_kv_heads * shape.head_dim
    kv_bytes = 2 * head_bytes * sum(seq_lens)
    num_blocks = max(sum(blocks_of), ROTATED_BYTES // (2 * head_bytes * BLOCK_SIZE))
    cache = torch.randn(
        2, num_blocks, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim, device="cuda", dtype=torch.bfloat16
    )
    tables = []
    for _ in range(4):
        shuffled = torch.randperm(num_blocks, device="cuda", dtype=torch.int32)
        rows = [part[: max(blocks_of)] for part in torch.split(shuffled[: sum(blocks_of)], blocks_of)]
        tables.append(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))
    q = torch.randn(sum(query_lens), shape.num_heads, shape.head_dim, device="cuda", dtype=torch.bfloat16)
    lens = torch.tensor(seq_lens, dtype=torch.int32, device="cuda")
    starts = torch.tensor([0, *query_lens], device="cuda").cumsum(0).int()

    work = None
    if max(query_lens) == 1:
        heads = {"num_heads": shape.num_heads, "num_kv_heads": shape.num_kv_heads, "head_dim": shape.head_dim}
        work = build_decode_work(len(seq_lens), **heads, dtype=q.dtype, device=q.device)
        plan_decode_(work, lens, shape.num_kv_heads, is_new=torch.zeros_like(lens))

    def call(index: int) -> Tensor:
        return paged_attention(
            q,
            cache[0],
            cache[1],
            block_tables=tables[index],
            seq_lens=lens,
            query_start_loc=starts,
            max_query_len=max(query_lens),
            max_seq_len=max(seq_lens),
            scale=shape.head_dim**-0.5,
            work=work,
        )

    seconds = seconds_per_call(call, len(tables), calls=20)
    if max(query_lens) == 1:
        return table.add(f"decode, {name}", seconds, num_bytes=kv_bytes + 2 * q.nbytes)
    pairs = zip(query_lens, seq_lens, strict=True)
    keys_seen = sum(queries * (keys - queries) + queries * (queries + 1) / 2 for queries, keys in pairs)
    return table.add(f"prefill, {name}", seconds, flops=4 * shape.num_heads * shape.head_dim * keys_seen)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b", help="whose layer to time")
    shape = SHAPES[parser.parse_args().shape]
    if not torch.cuda.is_available() or triton is None:
        missing = "Triton is not installed" if torch.cuda.is_available() else "torch sees no CUDA GPU"
        print(f"bench/kernels.py needs a CUDA GPU and Triton: {missing} (torch {torch.__version__})", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    table = Table()
    for num_tokens in (1, 32, 256, 8192):
        time_rows(table, shape, num_tokens)
    for num_rows in (1, 8, 32, 64, 256):
        time_products(table, shape, num_rows)
    for num_rows in (2048, 8192):
        time_gated(table, shape, num_rows)
    for num_rows in (1, 32, 256):
        time_sampler(table, shape, num_rows)
    for batch, length in ((1, 1024), (32, 1024), (256, 1024), (1, 32768), (32, 32768), (64, 2048)):
        time_attention(table, shape, f"{batch} x {length}", [1] * batch, [length] * batch)
    time_attention(table, shape, "1 x 65536 and 63 x 1024", [1] * 64, [65536] + [1024] * 63)
    for batch, length in ((1, 2048), (4, 2048), (1, 8192), (1, 32768)):
        time_attention(table, shape, f"{batch} x {length}", [length] * batch, [length] * batch)
    time_attention(table, shape, "2048 behind 30720 cached", [2048], [32768])
    return 0


if __name__ == "__main__":
    sys.exit(main())
