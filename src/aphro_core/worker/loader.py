"""A rank's weights: its slices of the checkpoint, cut, fused and cast; or dummy values of the same shapes."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor

from aphro_core.checkpoint.checkpoint import Checkpoint
from aphro_core.models.registry import family_of
from aphro_core.models.spec import DecoderSpec
from aphro_core.models.tensors import TensorPiece, parameter_shapes, rank_pieces, tied_parameters
from aphro_core.parallel.shard import RankShard

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
) -> dict[str, Tensor]:
    """This rank's parameters by their local names (ARCHITECTURE.md, "Weights of a rank"); only its slices are read.

    ``progress(done, total)`` counts bytes of finished parameters. Raises ModelError when a tensor is missing, of
    another shape than ``spec`` has it, or the file ends early.
    """

    def read(target: Tensor, piece: TensorPiece) -> None:
        dim, index = (piece.dim, piece.index) if piece.dim is not None else (None, range(0))
        checkpoint.read_into(target, piece.source, dim, index.start, index.stop if dim is not None else None)

    checkpoint.verify(spec)
    return _fill(spec, shard, dtype, device, read, progress)


def dummy_weights(
    spec: DecoderSpec, shard: RankShard, dtype: torch.dtype, device: torch.device, seed: int
) -> dict[str, Tensor]:
    """Parameters without a checkpoint, uniform in +-DUMMY_RANGE: the same model for every tp and pp.

    An element depends on the seed, its checkpoint tensor's name and its place there. Row i of a tensor is a window of
    one pool of random numbers whose start depends on (name, i): as cheap as a copy, also for billions of weights.
    """
    widest = max(spec.hidden_size, spec.intermediate_size, spec.num_heads * spec.head_dim)
    generator = torch.Generator().manual_seed(seed)
    pool = torch.rand(_DUMMY_STARTS + widest, generator=generator).sub_(0.5).mul_(2 * DUMMY_RANGE).to(device, dtype)

    def draw(target: Tensor, piece: TensorPiece) -> None:
        rows, columns = _as_matrix(piece)
        starts = torch.arange(rows.start, rows.stop, device=device).mul_(_DUMMY_STRIDE)
        starts.add_(zlib.crc32(piece.source.encode())).remainder_(_DUMMY_STARTS)
        windows = pool.as_strided((_DUMMY_STARTS, len(columns)), (1, 1), storage_offset=columns.start)
        torch.index_select(windows, 0, starts, out=target.view(len(rows), len(columns)))

    return _fill(spec, shard, dtype, device, draw, None)


def _fill(
    spec: DecoderSpec,
    shard: RankShard,
    dtype: torch.dtype,
    device: torch.device,
    fill: Callable[[Tensor, TensorPiece], None],
    progress: Callable[[int, int], None] | None,
) -> dict[str, Tensor]:
    """Allocate every parameter and ``fill`` it piece by piece; rows that no piece covers are zero."""
    rules = family_of(spec).tensors
    pieces: dict[str, list[TensorPiece]] = {}
    for piece in rank_pieces(rules, spec, shard):
        pieces.setdefault(piece.parameter, []).append(piece)
    shapes = parameter_shapes(rules, spec, shard)
    weights = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}

    def fill_parameter(name: str) -> int:
        weight, filled = weights[name], 0
        for piece in pieces.get(name, ()):
            rows = piece.shape[0]
            fill(weight.narrow(0, piece.offset, rows), piece)
            filled += rows
        weight[filled:].zero_()
        return weight.nbytes

    done, total = 0, sum(weight.nbytes for weight in weights.values())
    with _filling_threads(device) as threads:
        for job in as_completed([threads.submit(fill_parameter, name) for name in weights]):
            done += job.result()
            if progress is not None:
                progress(done, total)
    return weights | {name: weights[other] for name, other in tied_parameters(rules, spec, shard).items()}


@contextmanager
def _filling_threads(device: torch.device) -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch has, each working alone on one parameter; an error ends the others' queue.

    Torch's own parallel loops would split every small copy and meet at a barrier after it: milliseconds each when the
    cores have other work, and reading and dequantising would still be on one core.
    """
    num_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(num_threads if device.type == "cpu" else _DEVICE_THREADS, "load-weights")
    torch.set_num_threads(1)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(num_threads)


def _as_matrix(piece: TensorPiece) -> tuple[range, range]:
    """(rows, columns) of a piece within its checkpoint tensor; a vector is one row."""
    whole = [range(size) for size in piece.full_shape]
    if piece.dim is not None:
        whole[piece.dim] = piece.index
    return (range(1), whole[0]) if len(whole) == 1 else (whole[0], whole[1])
