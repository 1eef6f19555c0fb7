"""Times every candidate configuration of the kernels that have a table on this GPU, beside cuBLAS; writes the table.

Run it on a new kind of GPU, or for new shapes, and commit the file: nothing is tuned while serving. Each figure is
microseconds a call in a CUDA graph of products with a norm before each, as in a decode step (so that what a kernel
does before the one ahead of it has ended counts), weights rotating past the L2 cache.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from aphro_kernels.rms_norm import rms_norm
from aphro_kernels.silu_and_mul import silu_and_mul
from aphro_kernels.skinny_kernel import skinny_kernel
from aphro_kernels.skinny_linear import SkinnyConfig, build_skinny_workspace, skinny_linear
from torch.nn.functional import linear

BUCKETS = (1, 8, 16, 32, 64)
ROTATED_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Layer:
    n: int
    k: int
    is_gated: bool = False

    @property
    def num_bytes(self) -> int:
        return 2 * self.n * self.k * (1 + self.is_gated)


def layers_of(hidden: int, qkv: int, attended: int, intermediate: int, vocab: int) -> list[Layer]:
    gate_up, down = Layer(intermediate, hidden, is_gated=True), Layer(hidden, intermediate)
    return [Layer(qkv, hidden), Layer(hidden, attended), gate_up, down, Layer(vocab, hidden)]


MODELS = {
    "llama-3-8b": layers_of(4096, 6144, 4096, 14336, 128256),
    "llama-3-8b tp 2": layers_of(4096, 3072, 2048, 7168, 64128),
    "qwen2.5-7b tp 2": layers_of(3584, 2304, 1792, 9472, 76032),
    "qwen2.5-0.5b tp 2": layers_of(896, 576, 448, 2432, 75968),
    "qwen2.5-7b": layers_of(3584, 4608, 3584, 18944, 152064),
    "qwen2.5-0.5b": layers_of(896, 1152, 896, 4864, 151936),
}


def candidates(layer: Layer, bucket: int, multiprocessors: int) -> Iterator[SkinnyConfig]:
    if bucket == 1:
        tiles = [(1, 8, 512, 4, 3), (1, 16, 512, 4, 3), (1, 16, 256, 4, 4), (1, 8, 1024, 4, 3)]
        tiles += [(1, 4, 1024, 4, 3), (1, 4, 512, 2, 4), (1, 2, 1024, 2, 4)]
    elif layer.is_gated:
        tiles = [(bucket, 32, 128, 4, 4), (bucket, 16, 128, 4, 6), (bucket, 64, 128, 8, 3), (bucket, 16, 256, 4, 4)]
    else:
        tiles = [(bucket, 64, 128, 4, 5), (bucket, 32, 128, 4, 5), (bucket, 16, 256, 4, 5), (bucket, 32, 256, 4, 4)]
        tiles += [(bucket, 16, 512, 4, 4)] if bucket < 32 else [(bucket, 64, 128, 8, 4)]
    for rows, columns, inputs, warps, stages in tiles:
        tile_bytes = 2 * inputs * columns * (1 + layer.is_gated)
        for programs in _numbers_of_programs(layer, columns, multiprocessors):
            if _fits(rows, columns, inputs, stages, -(-programs // multiprocessors), layer.is_gated):
                for kib, is_early in ((0, False), (32, False), (32, True), (64, True)):
                    ahead = kib * 1024 // tile_bytes
                    yield SkinnyConfig(rows, columns, inputs, programs, warps, stages, ahead, is_early)


def _numbers_of_programs(layer: Layer, columns: int, multiprocessors: int) -> list[int]:
    """Whole multiples of the multiprocessors, and the numbers beside them that cut no stripe."""
    stripes = -(-layer.n // columns)
    whole = [-(-stripes // per) for per in range(1, 9)]
    most = 4 * multiprocessors
    return sorted(
        {multiprocessors, 2 * multiprocessors, 3 * multiprocessors, *(n for n in whole if most / 4 <= n <= most)}
    )


def _fits(rows: int, columns: int, inputs: int, stages: int, share: int, is_gated: bool) -> bool:
    """Whether ``share`` programs have room beside each other in a multiprocessor's shared memory."""
    tile_bytes = 2 * inputs * (columns * (1 + is_gated) + rows)
    return share * (max(stages - 1, 1) * tile_bytes + 2048) <= 227 * 1024


def compile_candidate(job: tuple[Layer, SkinnyConfig]) -> None:
    layer, config = job
    pointers = [torch.bfloat16] * 4 + [torch.float32, torch.int32] + [torch.bfloat16] * 2
    constants = {"ROWS": config.rows, "BN": config.columns, "BK": config.inputs, "STAGES": config.num_stages}
    constants |= {"IS_EVEN": is_even(layer, config), "IS_EARLY": config.is_early, "IS_GATED": layer.is_gated}
    constants |= {"HAS_BIAS": False, "KIND": "plain", "GROUP": 0, "SPLIT": 1, "IS_TILED": False, "HAS_ASM": False}
    options = {"num_warps": config.num_warps, "CHAINED": True, "launch_pdl": True}
    numbers = (config.rows, layer.n, layer.k, layer.k, config.ahead)
    skinny_kernel.warmup(*pointers, *numbers, **constants, **options, grid=(1,))


def is_even(layer: Layer, config: SkinnyConfig) -> bool:
    return layer.n % config.columns == 0 and layer.k % config.inputs == 0


def microseconds(call: Callable[[int], object], num_sets: int, calls: int) -> float:
    for index in range(2):
        call(index % num_sets)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(calls):
            call(index % num_sets)
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / calls)
    return statistics.median(times[1:])


class Tuner:
    def __init__(self) -> None:
        self._workspace = build_skinny_workspace(torch.device("cuda"))
        self.rows: list[dict[str, object]] = []

    def tune(self, layer: Layer, bucket: int, configs: list[SkinnyConfig]) -> None:
        weights = _rotation(layer)
        calls = max(24, len(weights)) if len(weights) < 100 else 100
        x = torch.randn(bucket, layer.k, device="cuda", dtype=torch.bfloat16)
        gain = torch.ones(layer.k, device="cuda", dtype=torch.bfloat16)
        expected = _library(rms_norm(x, gain, 1e-5), weights[0], layer.is_gated)

        def run(config: SkinnyConfig) -> float:
            def call(index: int) -> torch.Tensor:
                normed = rms_norm(x, gain, 1e-5)
                options = {"config": config, "workspace": self._workspace, "is_gated": layer.is_gated}
                return skinny_linear(normed, weights[index], **options)

            y = call(0).float()
            error = float((y - expected.float()).norm() / expected.float().norm())
            if not error < 1e-2:
                print(f"WRONG {layer} {config}: error {error}")
                return 1e9
            return microseconds(call, len(weights), calls)

        library = microseconds(
            lambda i: _library(rms_norm(x, gain, 1e-5), weights[i], layer.is_gated), len(weights), calls
        )
        timed = sorted(((_try(run, config), config) for config in configs), key=lambda pair: pair[0])
        best, config = timed[0]
        rate = layer.num_bytes / best / 1e6
        print(
            f"{layer.n:7} x {layer.k:6} {'gated' if layer.is_gated else '':5} {bucket:3} rows: {best:7.1f} us "
            f"{rate:5.2f} TB/s, cuBLAS {library:7.1f}  {tuple(asdict(config).values())}",
            flush=True,
        )
        entry = {"n": layer.n, "k": layer.k, "is_gated": layer.is_gated, "rows": bucket, "dtype": "bfloat16"}
        entry |= {"us": round(best, 2), "library_us": round(library, 2)}
        entry["config"] = asdict(config) if best < 0.985 * library else None  # less would be noise
        self.rows.append(entry)


def _try(run: Callable[[SkinnyConfig], float], config: SkinnyConfig) -> float:
    try:
        return run(config)
    except (AssertionError, RuntimeError) as error:  # too much shared memory, say: such a candidate is out
        print(f"{config}: {type(error).__name__} {str(error)[:120]}")
        return 1e9


def _library(x: torch.Tensor, weight: torch.Tensor, is_gated: bool) -> torch.Tensor:
    y = linear(x, weight)
    return silu_and_mul(y) if is_gated else y


def _rotation(layer: Layer) -> list[torch.Tensor]:
    count = min(max(ROTATED_BYTES // layer.num_bytes, 2), 200)
    shape = (layer.n * (1 + layer.is_gated), layer.k)
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16) / layer.k**0.5 for _ in range(count)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, action="append", help="whose layers; may be repeated (all)")
    parser.add_argument("--rows", type=int, choices=BUCKETS, action="append", help="which buckets of rows (all)")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write; entries of other shapes are kept")
    parser.add_argument("--multiprocessors", type=int, default=132, help="of this GPU")
    args = parser.parse_args()
    layers = {layer: None for model in args.model or MODELS for layer in MODELS[model]}
    jobs = {
        (layer, bucket): list(candidates(layer, bucket, args.multiprocessors))
        for bucket, layer in product(args.rows or BUCKETS, layers)
    }
    began = time.monotonic()
    kinds = {}  # what is compiled does not hang on the shape
    for (layer, _), configs in jobs.items():
        for config in configs:
            kind = replace(config, programs=0, ahead=0), layer.is_gated, is_even(layer, config)
            kinds[kind] = (layer, config)
    compiled = list(kinds.values())
    with multiprocessing.get_context("fork").Pool(max((os.cpu_count() or 2) - 1, 1)) as pool:  # before CUDA starts here
        for _ in pool.imap_unordered(_compile_quietly, compiled, chunksize=2):
            pass
    print(f"{len(compiled)} candidates compiled in {time.monotonic() - began:.0f} s", flush=True)
    torch.manual_seed(0)
    tuner = Tuner()
    for (layer, bucket), configs in jobs.items():
        tuner.tune(layer, bucket, configs)
        write_table(args.output, tuner.rows)  # whoever ends this program keeps what it has found
    print(f"wrote {args.output} after {time.monotonic() - began:.0f} s")
    return 0


def write_table(path: Path, found: list[dict[str, object]]) -> None:
    """One entry a line; those of other shapes that the file has are kept."""
    device = torch.cuda.get_device_name()
    content: dict[str, Any] = {"devices": [device], "measured_on": device, "entries": []}
    if path.exists():
        content = json.loads(path.read_text())
    new = {tuple(entry[field] for field in ("n", "k", "is_gated", "rows")) for entry in found}
    kept = [e for e in content["entries"] if (e["n"], e["k"], e["is_gated"], e["rows"]) not in new]
    lines = ",\n".join("  " + json.dumps(entry) for entry in (*kept, *found))
    heads = {"devices": content["devices"], "measured_on": device}
    path.write_text(json.dumps(heads, indent=1)[:-2] + f',\n "entries": [\n{lines}\n ]\n}}\n')


def _compile_quietly(job: tuple[Layer, SkinnyConfig]) -> None:
    try:
        compile_candidate(job)
    except Exception as error:
        print(f"{job}: {type(error).__name__} {str(error)[:200]}")


if __name__ == "__main__":
    sys.exit(main())
