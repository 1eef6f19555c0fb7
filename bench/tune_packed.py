"""Times candidate configurations of quantised products on this GPU, beside dequantising and cuBLAS, and 16-bit cuBLAS.

    python bench/tune_packed.py [--kinds int4 fp8] [--rows 1 8 32 64 128 256] [--json FILE]

The rules of ``packed_linear.packed_config`` come from its figures: microseconds a call in a CUDA graph of products with
a norm before each, weights rotating past the L2 cache, shapes of Llama-3-8B. "rule" is what the rule takes now.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from aphro_kernels.float8_kernel import float8_kernel
from aphro_kernels.float8_linear import Float8Config
from aphro_kernels.packed_linear import PackedConfig, PackedWeight, dequantise, in_tiles, packed_config, packed_linear
from aphro_kernels.rms_norm import rms_norm
from aphro_kernels.silu_and_mul import silu_and_mul
from aphro_kernels.skinny_kernel import skinny_kernel
from aphro_kernels.skinny_linear import SkinnyConfig, build_skinny_workspace, rows_bucket
from aphro_kernels.tile_kernel import tile_kernel
from aphro_kernels.tile_linear import TileConfig
from torch.nn.functional import linear
from tune import ROTATED_BYTES, microseconds

SIZES = {"qkv": (6144, 4096, None), "o": (4096, 4096, 128), "gate_up": (28672, 4096, None), "down": (4096, 14336, 128)}


@dataclass(frozen=True)
class Layer:
    name: str
    kind: str

    @property
    def is_gated(self) -> bool:
        return self.name == "gate_up"

    @property
    def group(self) -> int:
        """As quantising while loading has it, 0 = the whole row."""
        return SIZES[self.name][2] or (128 if self.kind == "int4" else 0)

    def weight(self, device: str = "cuda") -> PackedWeight:
        n, k, _ = SIZES[self.name]
        groups = k // self.group if self.group else 1
        scales = torch.rand(n, groups, device=device).to(torch.bfloat16 if self.group else torch.float32) / k**0.5 / 8
        if self.kind == "int4":
            codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
            return in_tiles(PackedWeight(codes, scales, -7.5 * scales))
        codes = torch.randint(0, 256, (n, k), dtype=torch.uint8, device=device)
        if self.kind == "int8":
            return PackedWeight(codes.view(torch.int8), scales / 16)
        return PackedWeight((codes & 0xBF).view(torch.float8_e4m3fn), scales)


def candidates(layer: Layer, rows: int) -> Iterator[PackedConfig]:
    if layer.kind == "int4" and rows <= 8:
        yield from tile_candidates()
        return
    if layer.kind != "int8":
        yield from float8_candidates(rows)
    if rows > 32:
        return
    n = SIZES[layer.name][0] // (2 if layer.is_gated else 1)
    for bucket, columns, inputs, warps, stages, splits in tiles(layer, rows):
        stripes = -(-n // columns)
        tile_bytes = columns * inputs // (2 if layer.kind == "int4" else 1)
        for per in (1, 2, 3, 4):
            programs = -(-stripes // per)
            if per == 1 or programs >= 132:
                yield SkinnyConfig(
                    bucket, columns, inputs, programs, warps, stages, 32768 // tile_bytes, rows == 1, splits
                )


def tiles(layer: Layer, rows: int) -> Iterator[tuple[int, ...]]:
    """(rows of a tile, columns, inputs, warps, stages, splits)."""
    if rows == 1 and layer.kind != "int4":
        yield from ((1, 8, 1024, 4, 3, 1), (1, 16, 512, 4, 3, 1), (1, 4, 2048, 4, 3, 1), (1, 8, 1024, 4, 4, 1))
        yield from ((1, 4, 1024, 4, 4, 1), (1, 8, 512, 2, 4, 1))
    bucket = rows_bucket(max(rows, 8))
    shapes = [(32, 4, 4, 4), (16, 4, 4, 4), (16, 8, 8, 3), (32, 2, 2, 4)]
    shapes += [(32, 8, 8, 3), (64, 4, 4, 3), (64, 2, 2, 3)] if rows < 32 else []
    for columns, splits, warps, stages in shapes:
        yield bucket, columns, 128 * splits, warps, stages, splits


def tile_candidates() -> Iterator[TileConfig]:
    for warps, ahead in product((4, 8), (0, 1, 2)):
        yield TileConfig(warps, ahead, is_unrolled=False)
    for warps, ahead in ((4, 2), (4, 4), (8, 1), (8, 2), (8, 3), (8, 4), (16, 2), (16, 3)):
        yield TileConfig(warps, ahead, is_unrolled=True)
    yield TileConfig(4, 1, is_unrolled=False, registers=72)


def float8_candidates(rows: int) -> Iterator[Float8Config]:
    for tile in (8, 16, 32, 64):
        if tile <= max(2 * rows, 8) and rows <= 4 * tile:
            for splits, stages in product((1, 2, 4, 5, 8), (3, 4)):
                yield Float8Config(tile, 128, splits, 8 if tile == 64 else 4, stages)


def compile_float8(layer: Layer, config: Float8Config) -> None:
    n, k, _ = SIZES[layer.name]
    codes = torch.float8_e4m3fn if layer.kind == "fp8" else torch.uint8
    scale = torch.bfloat16 if layer.group else torch.float32
    pointers = [torch.float8_e4m3fn, torch.float32, torch.float32, codes, scale, torch.bfloat16, torch.bfloat16]
    constants = {"ROWS": config.rows, "BN": config.columns, "STAGES": config.num_stages, "HAS_ASM": True}
    constants |= {"IS_GATED": layer.is_gated, "HAS_BIAS": False, "KIND": layer.kind, "GROUP": layer.group}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "CHAINED": True, "launch_pdl": True}
    pointers += [torch.float32, torch.int32]
    float8_kernel.warmup(*pointers, 7, n, k, config.splits, **constants, **options, grid=(1,))


def compile_tiles(layer: Layer, config: TileConfig) -> None:
    n, k, _ = SIZES[layer.name]
    constants = {"TILES": k // 128, "WARPS": config.num_warps, "IS_UNROLLED": config.is_unrolled}
    constants |= {"AHEAD": min(config.ahead, -(-k // 128 // config.num_warps)), "IS_GATED": layer.is_gated}
    constants |= {"HAS_BIAS": False, "HAS_ASM": True, "CHAINED": True}
    pointers = [torch.bfloat16, torch.uint8, *[torch.bfloat16] * 3]
    options = {"num_warps": config.num_warps, "launch_pdl": True}
    options |= {} if config.registers is None else {"maxnreg": config.registers}
    tile_kernel.warmup(*pointers, 1, n, k, **constants, **options, grid=(1,))


def compile_candidate(job: tuple[Layer, PackedConfig]) -> None:
    layer, config = job
    if isinstance(config, TileConfig):
        compile_tiles(layer, config)
        return
    if isinstance(config, Float8Config):
        compile_float8(layer, config)
        return
    n, k, _ = SIZES[layer.name]
    codes = {"int4": torch.uint8, "int8": torch.int8, "fp8": torch.uint8}[layer.kind]
    scale = torch.bfloat16 if layer.group else torch.float32
    pointers = [torch.bfloat16, codes, torch.bfloat16, torch.bfloat16, torch.float32, torch.int32, scale, scale]
    constants = {"ROWS": config.rows, "BN": config.columns, "BK": config.inputs, "STAGES": config.num_stages}
    constants |= {"IS_EVEN": k % config.inputs == 0, "IS_EARLY": config.is_early, "IS_GATED": layer.is_gated}
    constants |= {"HAS_BIAS": False, "KIND": layer.kind, "GROUP": layer.group, "SPLIT": config.splits, "HAS_ASM": True}
    constants |= {"IS_TILED": layer.kind == "int4"}
    options = {"num_warps": config.num_warps, "CHAINED": True, "launch_pdl": True}
    try:
        skinny_kernel.warmup(*pointers, config.rows, n, k, k, config.ahead, **constants, **options, grid=(1,))
    except Exception as error:
        print(f"{job}: {type(error).__name__} {str(error)[:200]}")


class Timer:
    def __init__(self) -> None:
        self._workspace = build_skinny_workspace(torch.device("cuda"))
        self.rows: list[dict[str, Any]] = []

    def time(self, layer: Layer, rows: int) -> None:
        k = SIZES[layer.name][1]
        first = layer.weight()
        num_bytes = first.codes.nbytes + first.scales.nbytes * (2 if layer.kind == "int4" else 1)
        weights = [first, *(layer.weight() for _ in range(min(max(ROTATED_BYTES // num_bytes, 1), 60)))]
        x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
        gain = torch.ones(k, device="cuda", dtype=torch.bfloat16)
        calls = max(24, len(weights))
        expected = finish(linear(rms_norm(x, gain, 1e-5).float(), dequantise(first, torch.float32)), layer)

        def run(config: PackedConfig) -> float:
            options: dict[str, Any] = {"config": config, "workspace": self._workspace, "is_gated": layer.is_gated}
            y = packed_linear(rms_norm(x, gain, 1e-5), weights[0], **options).float()
            error = float((y - expected).norm() / expected.norm())
            if not error < 1e-2:
                print(f"WRONG {layer} {rows} {astuple(config)}: error {error}")
                return 1e9
            return microseconds(
                lambda i: packed_linear(rms_norm(x, gain, 1e-5), weights[i], **options), len(weights), calls
            )

        timed = []
        for config in candidates(layer, rows):
            try:
                timed.append((run(config), config))
            except Exception as error:
                print(f"{layer} {rows} {astuple(config)}: {type(error).__name__} {str(error)[:100]}")
        timed.sort(key=lambda pair: pair[0])
        rule = packed_config(first, x, is_gated=layer.is_gated)
        try:
            ruled = run(rule) if rule is not None else float("nan")
        except Exception as error:
            print(f"rule {layer} {rows}: {type(error).__name__} {str(error)[:100]}")
            ruled = float("nan")

        def expand(index: int) -> torch.Tensor:
            y = linear(rms_norm(x, gain, 1e-5), dequantise(weights[index], torch.bfloat16))
            return silu_and_mul(y) if layer.is_gated else y

        expanded = microseconds(expand, len(weights), 8)
        best = timed[0][0] if timed else float("nan")
        leaders = "; ".join(f"{time:.1f} {astuple(config)}" for time, config in timed[:6])
        rate = num_bytes / best / 1e6
        print(
            f"{layer.kind:4} {layer.name:8} {rows:4} rows: best {best:7.1f} us {rate:5.2f} TB/s, "
            f"rule {ruled:7.1f}, dequantised {expanded:7.1f} | {leaders}",
            flush=True,
        )
        self.rows += [
            {"layer": layer.name, "kind": layer.kind, "rows": rows, "us": t, "config": astuple(c)} for t, c in timed
        ]


def finish(y: torch.Tensor, layer: Layer) -> torch.Tensor:
    return silu_and_mul(y) if layer.is_gated else y


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["int4", "fp8"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    jobs = [(Layer(name, kind), rows) for rows, kind, name in product(arguments.rows, arguments.kinds, SIZES)]
    began = time.monotonic()
    kinds = {}
    for layer, rows in jobs:
        for config in candidates(layer, rows):
            is_even, kept = True, replace(config, splits=1) if isinstance(config, Float8Config) else config
            if isinstance(config, SkinnyConfig):
                is_even, kept = SIZES[layer.name][1] % config.inputs == 0, replace(config, programs=0, ahead=0)
            key = (layer.kind, layer.group, layer.is_gated, kept, is_even, SIZES[layer.name][1])
            kinds[key] = (layer, config)
    with multiprocessing.get_context("fork").Pool(max((os.cpu_count() or 2) - 1, 1)) as pool:  # before CUDA starts here
        list(pool.imap_unordered(compile_candidate, list(kinds.values()), chunksize=2))
    print(f"{len(kinds)} candidates compiled in {time.monotonic() - began:.0f} s", flush=True)
    torch.manual_seed(0)
    timer = Timer()
    for layer, rows in jobs:
        timer.time(layer, rows)
        if arguments.json:
            arguments.json.write_text(json.dumps(timer.rows))
    print(f"{torch.cuda.get_device_name()}, {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
