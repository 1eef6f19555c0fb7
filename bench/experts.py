"""The experts of one layer on a GPU: their products at some numbers of tokens, microseconds beside their floor.

    python bench/experts.py [--tokens 1 8 32 256 4096] [--sizes 4096 14336 8 2] [--configs]

Random rows, weights in bfloat16 and fp8, even choices of experts. Floor: the bytes of the experts that were chosen over
the bandwidth of a copy, or the operations over 790 TFLOP/s, whichever is larger. ``--configs``: every tile of the
kernel for few rows, of which ``grouped_gemm.py`` takes one.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from itertools import pairwise, product

import torch
from aphro_kernels import grouped_gemm, grouped_packed, row_tiles
from aphro_kernels.expert_rows import spread_rows, weigh_rows
from aphro_kernels.float8 import FLOAT8
from aphro_kernels.gated_gemm import ROWS
from aphro_kernels.grouped_float8 import launch_grouped_float8
from aphro_kernels.grouped_gemm import GroupedConfig
from aphro_kernels.grouped_hopper import grouped_wide
from aphro_kernels.grouped_hopper_float8 import grouped_float8_wide
from aphro_kernels.packed_linear import PackedWeight
from aphro_kernels.route import route
from aphro_kernels.split_places import split_places
from torch import Tensor
from torch.nn.functional import linear
from workloads import CEILINGS

from aphro_core.worker.compile_ahead import compiling_ahead

Runs = dict[str, Callable[[], object]]


class Layer:
    def __init__(self, hidden: int, width: int, num_experts: int, top: int) -> None:
        self.hidden, self.width, self.num_experts, self.top = hidden, width, num_experts, top
        self.gate_up = self._random(num_experts, 2 * width, hidden) / hidden**0.5
        self.down = self._random(num_experts, hidden, width) / width**0.5
        self.router = self._random(num_experts, hidden) / hidden**0.5
        self.packed = {"gate_up": self._packed(self.gate_up, 0), "down": self._packed(self.down, 128)}

    def _packed(self, weight: Tensor, group: int) -> PackedWeight:
        codes = (weight.flatten(0, 1) * weight.shape[2] ** 0.5 * 64).to(FLOAT8)
        groups = weight.shape[2] // group if group else 1
        dtype = torch.bfloat16 if group else torch.float32
        return PackedWeight(codes, torch.rand(len(codes), groups, dtype=dtype, device="cuda") / 64)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")

    def runs(self, tokens: int, *, every_config: bool) -> dict[str, Runs]:
        x, logits = self._random(tokens, self.hidden), self._random(tokens, self.num_experts)
        chosen, shares = route(logits, self.top, renormalize=True)
        inner = self._random(tokens * self.top, self.width)
        slots = self._random(tokens * self.top, self.hidden)
        found: dict[str, Runs] = {"route": {}, "plan": {}, "gate_up": {}, "down": {}, "rest": {}}
        found["route"]["choice"] = lambda: route(logits, self.top, renormalize=True)
        found["route"]["product, choice"] = lambda: route(linear(x, self.router), self.top, renormalize=True)
        rows_of = [row_tiles.tile_rows(tokens * self.top, self.num_experts)]
        if every_config:
            rows_of = sorted({*rows_of, *((1, 16) if tokens <= 4 else (16, 32, 64)[: 3 if tokens >= 64 else 2])})
        for rows in rows_of if tokens <= 512 else []:
            found["plan"][f"few {rows}"] = lambda rows=rows: row_tiles.plan_tiles(chosen, 0, self.num_experts, rows)
            tiles = row_tiles.plan_tiles(chosen, 0, self.num_experts, rows)
            for name, given, weight, per in (("gate_up", x, self.gate_up, self.top), ("down", inner, self.down, 1)):
                gated = name == "gate_up"
                for config in _configs(rows) if every_config else [grouped_gemm._config(given, tiles)]:
                    out = given.new_empty(tokens * self.top, weight.shape[1] // (1 + gated))
                    found[name][f"few {rows} {_text(config)}"] = (
                        lambda given=given, weight=weight, per=per, out=out, gated=gated, config=config, tiles=tiles: (
                            grouped_gemm._launch(given, weight, tiles, per, out, is_gated=gated, config=config)
                        )
                    )
            found["rest"]["weigh"] = lambda tiles=tiles: weigh_rows(slots, shares, tiles.places, is_spread=False)
        if tokens * self.top >= 2 * self.num_experts:
            found["plan"]["wide"] = lambda: row_tiles.plan_tiles(chosen, 0, self.num_experts, ROWS)
            wide = row_tiles.plan_tiles(chosen, 0, self.num_experts, ROWS)
            spread = spread_rows(x, wide)
            outs = [x.new_empty(len(spread), size) for size in (self.width, self.hidden)]
            outs[0].normal_()
            found["gate_up"]["wide"] = lambda: grouped_wide(spread, self.gate_up, wide, is_gated=True, out=outs[0])
            found["down"]["wide"] = lambda: grouped_wide(outs[0], self.down, wide, is_gated=False, out=outs[1])
            found["rest"]["spread"] = lambda: spread_rows(x, wide)
            found["rest"]["weigh spread"] = lambda: weigh_rows(outs[1], shares, wide.places, is_spread=True)
            merged = self._random(len(spread), 2 * self.width)
            for name, rows_in, weight in (("gate_up", x, self.gate_up), ("down", merged, self.down)):
                result = x.new_empty(len(spread), weight.shape[1])
                found[f"{name} fp8"] = {"wide": self._wide_float8(name, rows_in, wide, result)}
        for rows in rows_of if tokens <= 512 else []:
            found["plan"][f"few {rows}"] = lambda rows=rows: row_tiles.plan_tiles(chosen, 0, self.num_experts, rows)
            tiles = row_tiles.plan_tiles(chosen, 0, self.num_experts, rows)
            for name, given, per in (("gate_up", x, self.top), ("down", inner, 1)):
                packed = found.setdefault(f"{name} fp8", {})
                for config in _configs(rows) if every_config and rows == 1 else [None]:
                    how = f"few {rows}" + (f" {_text(config)}" if config else "")
                    packed[how] = self._few_float8(name, given, tiles, per, config)
        return found

    def _wide_float8(self, name: str, x: Tensor, tiles: row_tiles.RowTiles, out: Tensor) -> Callable[[], object]:
        def run() -> None:
            codes, scales = split_places(x, tiles, is_gated=name == "down")
            grouped_float8_wide(codes, scales, self.packed[name], self.num_experts, tiles, out)

        return run

    def _few_float8(
        self, name: str, x: Tensor, tiles: row_tiles.RowTiles, per: int, config: GroupedConfig | None
    ) -> Callable[[], object]:
        gated = name == "gate_up"
        out = x.new_empty(tiles.num_slots, self.width if gated else self.hidden)
        place = x, self.packed[name], self.num_experts, tiles, per, out
        if tiles.rows > 1:
            return lambda: launch_grouped_float8(*place, is_gated=gated)
        return lambda: grouped_packed._launch(*place, is_gated=gated, config=config)

    def floor(self, name: str, tokens: int, bandwidth: float, flops: float) -> float:
        if "gate_up" not in name and "down" not in name:
            return 0.0
        weight = self.gate_up if "gate_up" in name else self.down
        touched = self.num_experts * (1 - (1 - self.top / self.num_experts) ** tokens)
        size = weight[0].numel()
        return max(touched * size * (1 if "fp8" in name else 2) / bandwidth, 2 * size * tokens * self.top / flops)


def _configs(rows: int) -> list[GroupedConfig]:
    if rows == 1:
        sizes = [(4, 1024), (8, 512), (8, 1024), (16, 512)]
        return [GroupedConfig(*size, *shape) for size, shape in product(sizes, ((2, 4), (4, 3)))]
    sizes = [(32, 128), (64, 64), (64, 128), (128, 64)]
    found = [GroupedConfig(*size, 4, stages) for size, stages in product(sizes, (3, 5))]
    return [config for config in found if rows <= 32 or config.columns < 128]


def _text(config: GroupedConfig) -> str:
    return f"{config.columns}x{config.inputs} w{config.num_warps} s{config.num_stages}"


def seconds(run: Callable[[], object]) -> float:
    """Of one call among five in a graph, median of nine replays."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(5):
            run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(10)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(marks)) / 5e3


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 256, 4096])
    parser.add_argument("--sizes", type=int, nargs=4, default=[4096, 14336, 8, 2], help="hidden, inner, experts, top")
    parser.add_argument("--configs", action="store_true", help="time every tile of the kernel for few rows")
    parser.add_argument("--best", type=int, default=6, help="print so many of them")
    arguments = parser.parse_args()
    card = torch.cuda.get_device_name()
    bandwidth, flops = next((value for key, value in CEILINGS.items() if key in card), CEILINGS["H200"])
    layer = Layer(*arguments.sizes)
    print(f"{card}, hidden, inner, experts, top: {arguments.sizes}; us (floor)", flush=True)
    with compiling_ahead(min(os.cpu_count() or 1, 24)):
        for tokens in arguments.tokens:
            for runs in layer.runs(tokens, every_config=arguments.configs).values():
                for run in runs.values():
                    run()
    for tokens in arguments.tokens:
        print(f"{tokens} tokens", flush=True)
        for name, runs in layer.runs(tokens, every_config=arguments.configs).items():
            took = sorted((seconds(run), how) for how, run in runs.items())
            floor = layer.floor(name, tokens, bandwidth, flops)
            cells = [f"{how} {each * 1e6:.1f}" for each, how in took[: arguments.best]]
            cells += [f"{how} {each * 1e6:.1f}" for each, how in took[arguments.best :] if how == "wide"]
            print(f"  {name:8} ({floor * 1e6:.1f})  " + "; ".join(cells), flush=True)


if __name__ == "__main__":
    main()
