"""A rank's weights: its slices of the checkpoint, cut, fused and cast; or dummy values of the same shapes."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from aphro_core.checkpoint.checkpoint import Checkpoint
from aphro_core.models.packed import column_group, is_packed, module_of, parameter_bytes, source_group
from aphro_core.models.registry import family_of
from aphro_core.models.spec import DecoderSpec
from aphro_core.models.tensors import (
    Axis,
    TensorPiece,
    TensorRule,
    local_sizes,
    parameter_shapes,
    rank_pieces,
    rules_of_rank,
    tied_parameters,
)
from aphro_core.parallel.shard import RankShard
from aphro_core.quantization.linear import scale_dtype
from aphro_core.quantization.matrix import PackedMatrix, Weights, below_each_other, with_common_inputs
from aphro_core.quantization.online import quantise
from aphro_core.quantization.registry import READERS
from aphro_core.quantization.source import QuantSource
from aphro_core.worker.device import use_device

DUMMY_RANGE: Final = 1e-3  # dummy weights are uniform in plus or minus this
_DEVICE_THREADS: Final = 4  # that read for a GPU, where torch itself is given one

_DUMMY_STARTS: Final = 1_000_003  # a prime: places in the dummy pool where a row can start
_DUMMY_STRIDE: Final = 7919  # between the starts of neighbouring rows


def load_weights(
    checkpoint: Checkpoint,
    spec: DecoderSpec,
    shard: RankShard,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> Weights:
    """This rank's parameters by their local names (ARCHITECTURE.md, "Weights of a rank"); only its slices are read.

    ``progress(done, total)`` counts bytes of finished parameters. Raises ModelError when a tensor is missing, of
    another shape than ``spec`` has it, or the file ends early.
    """

    def read(target: Tensor, piece: TensorPiece) -> None:
        dim, index = (piece.dim, piece.index) if piece.dim is not None else (None, range(0))
        checkpoint.read_into(target, piece.source, dim, index.start, index.stop if dim is not None else None)

    def read_packed(piece: TensorPiece, group: int | None) -> PackedMatrix:
        assert spec.quantization is not None
        rows, columns = piece.ranges
        source = QuantSource(
            checkpoint=checkpoint,
            spec=spec.quantization,
            module=module_of(piece.source),
            shape=(piece.full_shape[0], piece.full_shape[1]),
            rows=rows,
            columns=columns,
            group=group,
            scale_dtype=scale_dtype(dtype, device),
            device=device,
        )
        return READERS[spec.quantization.layout](source)

    checkpoint.verify(spec)
    return _fill(spec, shard, dtype, device, Filling(read, read_packed), progress)


def dummy_weights(spec: DecoderSpec, shard: RankShard, dtype: torch.dtype, device: torch.device, seed: int) -> Weights:
    """Parameters without a checkpoint, uniform in +-DUMMY_RANGE: the same model for every tp and pp.

    An element depends on the seed, its checkpoint tensor's name and its place there. Row i of a tensor is a window of
    one pool of random numbers whose start depends on (name, i): as cheap as a copy, also for billions of weights.
    """
    widest = max(spec.hidden_size, spec.intermediate_size, spec.num_heads * spec.head_dim)
    generator = torch.Generator().manual_seed(seed)
    pool = torch.rand(_DUMMY_STARTS + widest, generator=generator).sub_(0.5).mul_(2 * DUMMY_RANGE).to(device, dtype)

    def draw(target: Tensor, piece: TensorPiece) -> None:
        rows, columns = piece.ranges
        starts = torch.arange(rows.start, rows.stop, device=device).mul_(_DUMMY_STRIDE)
        starts.add_(zlib.crc32(piece.source.encode())).remainder_(_DUMMY_STARTS)
        windows = pool.as_strided((_DUMMY_STARTS, len(columns)), (1, 1), storage_offset=columns.start)
        torch.index_select(windows, 0, starts, out=target.view(len(rows), len(columns)))

    def draw_packed(piece: TensorPiece, group: int | None) -> PackedMatrix:
        assert spec.quantization is not None
        dense = torch.empty(piece.shape, dtype=dtype, device=device)
        draw(dense, piece)
        return quantise(dense, spec.quantization.kind_of(module_of(piece.source)), group, scale_dtype(dtype, device))

    return _fill(spec, shard, dtype, device, Filling(draw, draw_packed), None)


@dataclass(frozen=True)
class Filling:
    """How a piece comes by its values: into a part of a parameter, or as a quantised matrix with groups of a size."""

    dense: Callable[[Tensor, TensorPiece], None]
    packed: Callable[[TensorPiece, int | None], PackedMatrix]


def _fill(
    spec: DecoderSpec,
    shard: RankShard,
    dtype: torch.dtype,
    device: torch.device,
    filling: Filling,
    progress: Callable[[int, int], None] | None,
) -> Weights:
    """Allocate every parameter and fill it piece by piece; rows that no piece covers are zero."""
    rules = family_of(spec).tensors
    pieces: dict[str, list[TensorPiece]] = {}
    for piece in rank_pieces(rules, spec, shard):
        pieces.setdefault(piece.parameter, []).append(piece)
    packed = {rule.parameter: rule for rule in rules_of_rank(rules, spec, shard) if is_packed(rule, spec)}
    shapes = parameter_shapes(rules, spec, shard)
    weights: Weights = {
        name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items() if name not in packed
    }

    def fill_dense(name: str, weight: Tensor) -> int:
        filled = 0
        for piece in pieces.get(name, ()):
            rows = piece.shape[0]
            filling.dense(weight.narrow(0, piece.offset, rows), piece)
            filled += rows
        weight[filled:].zero_()
        return weight.nbytes

    def group_of(source: str, axis: Axis) -> int | None:
        return source_group(spec, module_of(source), column_group(spec, axis))

    def fill_packed(rule: TensorRule, axis: Axis) -> int:
        name = rule.parameter
        parts = [filling.packed(piece, group_of(piece.source, axis)).to(device) for piece in pieces.get(name, ())]
        if ".moe." in name:
            parts = with_common_inputs(parts)
        padding = shapes[name][0] - sum(part.shape[0] for part in parts)  # of the vocabulary
        if padding:
            parts.append((parts[-1] if parts else one_row(rule.sources[0].name, axis)).zeros(padding))
        matrices = weights[name] = below_each_other(parts)
        return sum(matrix.nbytes for matrix in matrices)

    def one_row(source: str, axis: Axis) -> PackedMatrix:
        """As the source's rows are kept, where a rank has none of them."""
        assert spec.quantization is not None
        row = torch.zeros(1, local_sizes(spec, shard)[axis], dtype=dtype, device=device)
        kind = spec.quantization.kind_of(module_of(source))
        return quantise(row, kind, group_of(source, axis), scale_dtype(dtype, device))

    done, total = 0, parameter_bytes(rules, spec, shard, dtype.itemsize)
    with _filling_threads(device) as threads:
        jobs = [
            threads.submit(fill_dense, name, weight)
            for name, weight in list(weights.items())
            if isinstance(weight, Tensor)
        ]
        jobs += [threads.submit(fill_packed, rule, rule.columns) for rule in packed.values() if rule.columns]
        for job in as_completed(jobs):
            done += job.result()
            if progress is not None:
                progress(min(done, total), total)
    return weights | {name: weights[other] for name, other in tied_parameters(rules, spec, shard).items()}


@contextmanager
def _filling_threads(device: torch.device) -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch has, each working alone on one parameter; an error ends the others' queue.

    Torch's own parallel loops would split every small copy and meet at a barrier after it: milliseconds each when the
    cores have other work, and reading and dequantising would still be on one core.
    """
    num_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        num_threads if device.type == "cpu" else _DEVICE_THREADS, "load-weights", use_device, (device,)
    )
    torch.set_num_threads(1)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(num_threads)
