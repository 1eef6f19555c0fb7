"""Times cuBLAS's algorithms for the products of decode steps, and writes those that beat the library's own choice.

    python bench/tune_cublas.py --output kernels/aphro_kernels/tuned/cublas/NAME.json [--model NAME] [--rows 256 ...]

Run it on a new kind of GPU, with a new cuBLAS, or for new shapes, and commit the file: nothing is tuned while serving.
Each figure is microseconds a call in a CUDA graph of products back to back, weights rotating past the L2 cache. Tried
are what the library itself proposes, and the tiles that fill the multiprocessors best by a count of their waves. How
large a tile is, the names of the kernels say. Of the best few each result is compared with one in float32.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from ctypes import byref, c_int, c_size_t, c_uint32, c_uint64, c_void_p, sizeof
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from aphro_kernels.cublas_lt import (
    ATTRIBUTES,
    WORKSPACE_BYTES,
    Found,
    LtAlgorithm,
    LtProduct,
    RawAlgorithm,
    _handle,
    call,
    library_version,
    status,
)
from aphro_kernels.gated_gemm import gated_linear
from aphro_kernels.silu_and_mul import silu_and_mul
from torch import Tensor
from tune import MODELS, Layer

from aphro_core.worker.step_shapes import row_buckets

ROTATED_BYTES = 256 * 2**20
_WORTH = 0.985  # of the library's time: less would be noise
_TILE_NAME = re.compile(r"nvjet_sm90_\w+?_(\d+)x(\d+)_")
_NUMBER, _TILES, _STAGES_IDS = 0, 6, 13  # attributes of an algorithm, and what it is capable of
_CLUSTERS = (2, 3, 5, 4, 7)  # 1 x 1, 2 x 1, 1 x 2, 4 x 1, 4 x 2 programs
_OPTIONS = range(8)
_NO_CLUSTER = 2
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Tile:
    algorithm: LtAlgorithm
    outputs: int
    rows: int


def propose(shape: LtProduct, count: int = 24) -> list[LtAlgorithm]:
    """What the library would choose, the first one first. (Of those that split the inputs only the tile is tried.)"""
    preference = c_void_p()
    call("cublasLtMatmulPreferenceCreate", byref(preference))
    workspace = c_uint64(WORKSPACE_BYTES)
    call("cublasLtMatmulPreferenceSetAttribute", preference, c_int(1), byref(workspace), c_size_t(8))
    found, returned = (Found * count)(), c_int()
    asked = (_handle(), shape.desc, *shape.layouts, preference, c_int(count), found, byref(returned))
    failed = status("cublasLtMatmulAlgoGetHeuristic", *asked)
    call("cublasLtMatmulPreferenceDestroy", preference)
    return [] if failed else [described(one.algorithm) for one in found[: returned.value] if not one.status]


def described(raw: RawAlgorithm) -> LtAlgorithm:
    values = {}
    for name, (attribute, kind) in {"number": (_NUMBER, c_uint32), **ATTRIBUTES}.items():
        value, written = kind(), c_size_t()
        asked = ("cublasLtMatmulAlgoConfigGetAttribute", byref(raw), c_int(attribute), byref(value))
        call(*asked, c_size_t(sizeof(value)), byref(written))
        values[name] = value.value
    return LtAlgorithm(**values)


def learn_tiles() -> list[Tile]:
    """Every tile of the family of kernels that the library would choose from, by one launch each."""
    shape = LtProduct(512, 4096, 512, DTYPE, has_bias=False)
    first = propose(shape)[0]
    raw, written = shape.raw(first), c_size_t()
    assert raw is not None
    call("cublasLtMatmulAlgoCapGetAttribute", byref(raw), c_int(_TILES), None, c_size_t(0), byref(written))
    numbers = (c_uint32 * (written.value // 4))()
    call("cublasLtMatmulAlgoCapGetAttribute", byref(raw), c_int(_TILES), numbers, written, byref(written))
    x, weight = (torch.zeros(rows, 512, device="cuda", dtype=DTYPE) for rows in (512, 4096))
    workspace = torch.zeros(WORKSPACE_BYTES, device="cuda", dtype=torch.uint8)
    launched = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for number in numbers:
            wanted = replace(first, tile=number, cluster=_NO_CLUSTER, swizzle=0, option=0)
            if shape.choose(wanted):
                shape(x, weight, workspace=workspace)
                launched.append(wanted)
        torch.cuda.synchronize()
    events = [event for event in profile.events() if _TILE_NAME.search(event.name)]
    events.sort(key=lambda event: event.time_range.start)
    sizes = [tuple(map(int, found.groups())) for event in events if (found := _TILE_NAME.search(event.name))]
    if len(sizes) != len(launched):
        print(f"{len(launched)} launches, but {len(sizes)} kernels were seen: only what the library proposes is tried")
        return []
    return [Tile(wanted, *size) for wanted, size in zip(launched, sizes, strict=True)]


def cost(tile: Tile, layer: Layer, rows: int, multiprocessors: int) -> float:
    """Clock cycles: waves of tiles, each as long as its products, or its bytes from the second-level cache."""
    n = layer.n * (1 + layer.is_gated)
    waves = -(-(-(-n // tile.outputs) * -(-rows // tile.rows)) // multiprocessors)
    return waves * layer.k * max(tile.outputs * tile.rows / 2048, (tile.outputs + tile.rows) * 2 / 32)


class Tuner:
    def __init__(self, tiles_per_shape: int) -> None:
        self._tiles: list[Tile] | None = None
        self._tiles_per_shape = tiles_per_shape
        self._multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        self._workspace = torch.zeros(WORKSPACE_BYTES, device="cuda", dtype=torch.uint8)
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.entries: list[dict[str, object]] = []

    def tune(self, layer: Layer, rows: int) -> None:
        n, k = layer.n * (1 + layer.is_gated), layer.k
        weights = _rotation(n, k)
        x, out = (torch.randn(rows, width, device="cuda", dtype=DTYPE) for width in (k, n))
        shape = LtProduct(rows, n, k, DTYPE, has_bias=False)
        proposed = propose(shape)
        if self._tiles is None:
            self._tiles = learn_tiles()
            print(f"{len(self._tiles)} tiles", flush=True)
        timed: dict[LtAlgorithm, tuple[float, torch.cuda.CUDAGraph]] = {}
        calls = max(6, len(weights))

        def multiply(index: int) -> Tensor:
            return shape(x, weights[index], out=out, workspace=self._workspace)

        def try_all(algorithms: list[LtAlgorithm]) -> list[LtAlgorithm]:
            for wanted in dict.fromkeys(algorithms):
                if wanted not in timed and shape.choose(wanted):
                    graph = self._capture(multiply, calls, len(weights))
                    timed[wanted] = (min(seconds(graph) for _ in range(2)), graph)
            return sorted(timed, key=lambda wanted: timed[wanted][0])

        likely = sorted(self._tiles, key=lambda tile: cost(tile, layer, rows, self._multiprocessors))
        best = try_all(proposed + [tile.algorithm for tile in likely[: self._tiles_per_shape]])
        try_all([replace(one, cluster=cluster) for one, cluster in product(best[:4], _CLUSTERS)])
        best = try_all([replace(one, option=option) for one, option in product(best[:2], _OPTIONS)])
        expected = x.float() @ weights[0].float().T
        best = [one for one in best[:5] if self._is_right(shape, one, x, weights[0], expected)][:3]
        if not best:
            print(f"{n:6} x {k:6} {rows:4} rows: nothing but what the library chooses")
            return
        graphs: dict[str, torch.cuda.CUDAGraph] = {str(place): timed[one][1] for place, one in enumerate(best)}
        graphs["library"] = self._capture(lambda i: torch.mm(x, weights[i].t(), out=out), calls, len(weights))
        if layer.is_gated:
            gated = out[:, : layer.n].contiguous()
            graphs["SiLU"] = self._capture(lambda _: silu_and_mul(out), calls, 1)
            graphs["gated_linear"] = self._capture(lambda i: gated_linear(x, weights[i], gated), calls, len(weights))
        rounds = [{name: 1e6 * seconds(graph) / calls for name, graph in graphs.items()} for _ in range(7)]
        took = {name: statistics.median(round_[name] for round_ in rounds) for name in graphs}
        first = min(range(len(best)), key=lambda place: took[str(place)])
        self._note(layer, rows, best[first], took[str(first)], took, len(timed))

    def _note(self, layer: Layer, rows: int, best: LtAlgorithm, us: float, took: dict[str, float], tried: int) -> None:
        n, k = layer.n * (1 + layer.is_gated), layer.k
        sizes = [(tile.outputs, tile.rows) for tile in self._tiles or [] if tile.algorithm.tile == best.tile]
        others = "".join(f", {name} {took[name]:.1f}" for name in ("SiLU", "gated_linear") if name in took)
        print(
            f"{n:6} x {k:6} {rows:4} rows: {us:6.1f} us, library {took['library']:6.1f} "
            f"({100 * us / took['library'] - 100:+.0f} %){others}; "
            f"tile {sizes} {tuple(asdict(best).values())}, {tried} tried",
            flush=True,
        )
        if us < _WORTH * took["library"]:
            figures = {"us": round(us, 2), "library_us": round(took["library"], 2)}
            self.entries.append({"n": n, "k": k, "rows": rows, **figures, "algorithm": asdict(best)})

    def _is_right(self, shape: LtProduct, wanted: LtAlgorithm, x: Tensor, weight: Tensor, expected: Tensor) -> bool:
        assert shape.choose(wanted)
        out = torch.full_like(expected, float("nan"), dtype=DTYPE)
        shape(x, weight, out=out, workspace=self._workspace)
        error = float((out.float() - expected).norm() / expected.norm())
        if not error < 1e-2:
            print(f"WRONG {wanted}: error {error}")
        return error < 1e-2

    def _capture(self, run: Callable[[int], object], calls: int, num_sets: int) -> torch.cuda.CUDAGraph:
        """Without all that ``torch.cuda.graph`` does around it, which takes ten times as long."""
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run(0)
            self._stream.synchronize()
            graph.capture_begin(capture_error_mode="thread_local")
            for index in range(calls):
                run(index % num_sets)
            graph.capture_end()
        return graph


def seconds(graph: torch.cuda.CUDAGraph) -> float:
    """Of one replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _rotation(n: int, k: int) -> list[Tensor]:
    count = min(max(ROTATED_BYTES // (2 * n * k), 2), 24)
    return [torch.randn(n, k, device="cuda", dtype=DTYPE).mul_(k**-0.5) for _ in range(count)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append", help="whose layers; may be repeated (all)")
    parser.add_argument("--rows", type=int, nargs="+", help="numbers of rows (those that decode steps are padded to)")
    parser.add_argument("--tiles", type=int, default=48, help="that are tried besides what the library proposes")
    parser.add_argument("--seconds", type=float, default=1e9, help="after which no further shape is begun")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write; entries of other shapes are kept")
    args = parser.parse_args()
    layers = {layer: None for model in args.model or MODELS for layer in MODELS[model][:-1]}  # no head
    rows = args.rows or [size for size in row_buckets(512) if size >= 64]
    began = time.monotonic()
    torch.manual_seed(0)
    with torch.inference_mode():
        tuner = Tuner(args.tiles)
        done: set[tuple[int, int, int]] = set()
        for size, layer in product(rows, layers):
            if time.monotonic() - began > args.seconds:
                print(f"stopped before {layer}, {size} rows")
                break
            tuner.tune(layer, size)
            done.add((layer.n * (1 + layer.is_gated), layer.k, size))
    write_table(args.output, tuner.entries, done)
    print(f"wrote {args.output} after {time.monotonic() - began:.0f} s")
    return 0


def write_table(path: Path, entries: list[dict[str, object]], done: set[tuple[int, int, int]]) -> None:
    """One entry a line; those of shapes that were not measured now are kept."""
    device = torch.cuda.get_device_name()
    content: dict[str, Any] = {
        "devices": [device],
        "measured_on": device,
        "library_version": library_version(),
        "entries": [],
    }
    if path.exists():
        content |= json.loads(path.read_text())
    kept = [entry for entry in content["entries"] if (entry["n"], entry["k"], entry["rows"]) not in done]
    lines = ",\n".join("  " + json.dumps(entry) for entry in (*kept, *entries))
    heads = {"devices": content["devices"], "measured_on": device, "library_version": library_version()}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(heads, indent=1)[:-2] + f',\n "entries": [\n{lines}\n ]\n}}\n')


if __name__ == "__main__":
    sys.exit(main())
