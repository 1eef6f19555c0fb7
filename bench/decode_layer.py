"""Times a whole decode layer as a chain of kernels in one CUDA graph, against the floor of its bytes.

Variants: cuBLAS with a launch for each part; our products by the table; the same without programmatic dependent
launch. Several layers with weights of their own follow each other, so that nothing stays in the L2 cache.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from unittest import mock

import torch
from aphro_kernels import language
from aphro_kernels.chain_layer import ChainLayer, NextLayer, build_chain_workspace
from aphro_kernels.chain_plan import ChainShape
from aphro_kernels.decode_attention import decode_attention
from aphro_kernels.decode_work import build_decode_work, plan_decode_
from aphro_kernels.rms_norm import add_rms_norm_
from aphro_kernels.rotary import rotary_and_cache
from aphro_kernels.silu_and_mul import silu_and_mul
from aphro_kernels.skinny_linear import build_skinny_workspace, skinny_linear
from aphro_kernels.tuned import skinny_config
from torch import Tensor
from torch.nn.functional import linear

from kernels import BLOCK_SIZE, SHAPES, Shape, copy_bandwidth

Product = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Weights:
    norm: Tensor
    qkv: Tensor
    out: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor

    @property
    def num_bytes(self) -> int:
        return sum(weight.nbytes for weight in (self.qkv, self.out, self.gate_up, self.down))


def random_weights(shape: Shape) -> Weights:
    def weight(*size: int) -> Tensor:
        return torch.randn(*size, device="cuda", dtype=torch.bfloat16) / size[-1] ** 0.5

    attended = shape.num_heads * shape.head_dim
    qkv = attended + 2 * shape.num_kv_heads * shape.head_dim
    return Weights(
        norm=torch.rand(shape.hidden, device="cuda").bfloat16() + 0.5,
        qkv=weight(qkv, shape.hidden),
        out=weight(shape.hidden, attended),
        post_norm=torch.rand(shape.hidden, device="cuda").bfloat16() + 0.5,
        gate_up=weight(2 * shape.intermediate, shape.hidden),
        down=weight(shape.hidden, shape.intermediate),
    )


class Chain:
    """A few layers of one model at ``num_rows`` rows of ``context`` keys each."""

    def __init__(self, shape: Shape, num_rows: int, context: int, num_layers: int) -> None:
        self.shape, self.num_rows, self.context = shape, num_rows, context
        self.layers = [random_weights(shape) for _ in range(num_layers)]
        heads = {"num_heads": shape.num_heads, "num_kv_heads": shape.num_kv_heads, "head_dim": shape.head_dim}
        device = torch.device("cuda")
        self.work = build_decode_work(num_rows, **heads, dtype=torch.bfloat16, device=device)
        self.workspace = build_skinny_workspace(device)
        blocks = -(-context // BLOCK_SIZE)
        size = (num_rows * blocks, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim)
        self.caches = [torch.randn(2, *size, device=device, dtype=torch.bfloat16) for _ in range(num_layers)]
        self.tables = torch.randperm(num_rows * blocks, device=device, dtype=torch.int32).view(num_rows, blocks)
        self.seq_lens = torch.full((num_rows,), context, device=device, dtype=torch.int32)
        self.slots = self.tables[:, -1].long() * BLOCK_SIZE + (context - 1) % BLOCK_SIZE
        angles = torch.randn(num_rows, shape.head_dim // 2, device=device)
        self.cos, self.sin = angles.cos(), angles.sin()
        plan_decode_(self.work, self.seq_lens, shape.num_kv_heads, is_new=torch.zeros_like(self.seq_lens))
        self.start = torch.randn(num_rows, shape.hidden, device=device, dtype=torch.bfloat16)

    @property
    def num_bytes(self) -> int:
        kv = 4 * self.shape.num_kv_heads * self.shape.head_dim * self.context * self.num_rows
        return self.layers[0].num_bytes + kv

    def attend(self, qkv: Tensor, layer: int) -> Tensor:
        k_cache, v_cache = self.caches[layer]
        shape = self.shape
        q = rotary_and_cache(
            qkv.view(self.num_rows, -1, shape.head_dim),
            self.cos,
            self.sin,
            k_cache=k_cache,
            v_cache=v_cache,
            slot_mapping=self.slots,
        )
        options = {"block_tables": self.tables, "seq_lens": self.seq_lens, "scale": shape.head_dim**-0.5}
        return decode_attention(q, k_cache, v_cache, **options, work=self.work).view(self.num_rows, -1)

    def by_library(self) -> Tensor:
        return self._run(linear, lambda x, weight: silu_and_mul(linear(x, weight)))

    def by_table(self) -> Tensor:
        return self._run(self._product, partial(self._product, is_gated=True))

    def _product(self, x: Tensor, weight: Tensor, is_gated: bool = False) -> Tensor:
        config = skinny_config(weight, self.num_rows, is_gated=is_gated)
        if config is not None:
            return skinny_linear(x, weight, config=config, workspace=self.workspace, is_gated=is_gated)
        y = linear(x, weight)
        return silu_and_mul(y) if is_gated else y

    def _run(self, product: Product, gated: Product) -> Tensor:
        x, delta = self.start.clone(), torch.zeros_like(self.start)
        for index, layer in enumerate(self.layers):
            normed = add_rms_norm_(x, delta, layer.norm, 1e-5)
            delta = product(self.attend(product(normed, layer.qkv), index), layer.out)
            normed = add_rms_norm_(x, delta, layer.post_norm, 1e-5)
            delta = product(gated(normed, layer.gate_up), layer.down)
        return x.add_(delta)

    def by_chain(self) -> Tensor:
        """Each layer behind its attention, and the next one's QKV, in one launch (Hopper)."""
        x = self.start.clone()
        normed = add_rms_norm_(x, torch.zeros_like(x), self.layers[0].norm, 1e-5)
        qkv = self._product(normed, self.layers[0].qkv)
        for index, layer in enumerate(self.chained):
            qkv = layer(x, self.attend(qkv, index))
        return x

    @cached_property
    def chained(self) -> list[ChainLayer]:
        shape = self.shape
        attended, rows = shape.num_heads * shape.head_dim, self.layers[0].qkv.shape[0]
        workspace = build_chain_workspace(
            ChainShape(attended, shape.hidden, shape.intermediate, rows), self.start.device
        )
        following = [NextLayer(layer.norm, layer.qkv, None) for layer in self.layers[1:]]
        return [
            ChainLayer(layer.out, layer.post_norm, layer.gate_up, layer.down, after, 1e-5, workspace)
            for layer, after in zip(self.layers, [*following, None], strict=True)
        ]

    def unchained(self) -> Tensor:
        with mock.patch.object(language, "_capability", return_value=(8, 0)):
            return self.by_table()


def microseconds(chain: Callable[[], Tensor]) -> tuple[float, Tensor]:
    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000)
    return statistics.median(times[2:]), out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--layers", type=int, default=8)
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: {args.shape}, copy {bandwidth / 1e12:.2f} TB/s; us a layer")
    heads = ("rows x context", "floor", "cuBLAS", "by table", "unchained", "one launch", "of floor")
    print(" ".join(f"{head:>14}" for head in heads))
    for num_rows, context in ((1, 256), (1, 1024), (8, 1024), (32, 640), (64, 640)):
        chain = Chain(shape, num_rows, context, args.layers)
        floor = chain.num_bytes / bandwidth * 1e6
        calls = (chain.by_library, chain.by_table, chain.unchained, chain.by_chain)
        found = [microseconds(call) for call in calls]
        for _, y in found[1:]:
            error = float((y.float() - found[0][1].float()).norm() / found[0][1].float().norm())
            assert error < 3e-2, f"{num_rows} rows: the chains differ by {error}"
        times = [time / args.layers for time, _ in found]
        cells = (f"{num_rows} x {context}", *(f"{time:.1f}" for time in (floor, *times)), f"{floor / min(times):.0%}")
        print(" ".join(f"{cell:>14}" for cell in cells), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
