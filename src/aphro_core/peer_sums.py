"""Sums over the GPUs of one host by each other's memory: which way a number of rows takes, what travels beside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import torch.distributed as dist
from aphro_kernels.peer_all_reduce import PeerMemory, build_peer_memory, peer_all_reduce, peer_bytes
from aphro_kernels.peer_rows import PeerRows, allocate_shared, build_peer_rows, peer_rows_bytes, send, send_all, shares
from aphro_kernels.peer_two_shot import peer_two_shot
from torch import Tensor

_FEW_PROGRAMS: Final = 512  # of a sum of few rows, at most: a row each is fastest, and all run at once
_FEW_BYTES: Final = 4 * 2**20  # that a rank sends in one sum of few rows, which everybody adds up
_MANY_ROWS: Final = 512  # from here on each rank adds up some of the rows (bench/all_reduce.py),
_PART_ROWS: Final = 512  # and the product that makes them is cut between the ranks' rows if each has so many


@dataclass(frozen=True, slots=True)
class Scattered:
    """A summand [rows, width] of which the other ranks have got, or are just getting, the rows that they add up."""

    rows: Tensor


Summand = Tensor | Scattered


class PeerSums:
    """One rank's end. All ranks make the same sums, in one order, on one stream."""

    def __init__(self, few: PeerMemory | None, many: PeerRows, copies: torch.cuda.Stream | None) -> None:
        """``copies``: a stream beside which the layers' own goes on."""
        self._few, self._many, self._copies = few, many, copies
        self._is_copying = False

    def takes(self, x: Tensor) -> bool:
        """Whether ``x`` [rows, width] can be summed like this."""
        if x.dim() != 2 or not x.is_contiguous() or (x.shape[1], x.dtype) != (self._many.width, self._many.dtype):
            return False
        return self._is_many(len(x)) or (self._few is not None and 0 < len(x) <= self._few.max_rows)

    def can_share_out(self, num_rows: int) -> bool:
        """Whether a sum of so many rows can leave each rank with its part of the residual."""
        return self._is_many(num_rows)

    def parts(self, num_rows: int) -> list[tuple[int, range]]:
        """In which order a summand of so many rows is best made: whose rows, and which, this rank's last. Empty: in one
        piece."""
        size, rank = self._many.size, self._many.rank
        if not self._is_many(num_rows) or num_rows < _PART_ROWS * size:
            return []
        owned = shares(num_rows, size)
        return [(owner, owned[owner]) for owner in (*range(rank + 1, size), *range(rank + 1))]

    def send(self, x: Tensor, owner: int) -> None:
        """Of the summand ``x`` [rows, width] the part of one of :meth:`parts`, beside whatever is launched next.

        What fails between this and :meth:`add` may let go of ``x`` while it is read, and another step write there. That
        is sent in vain: :meth:`add` waits for it, and then sends all rows of what it is called with instead.
        """
        if owner == self._many.rank:
            return
        assert self._copies is not None
        self._copies.wait_stream(torch.cuda.current_stream())
        self._is_copying = True
        with torch.cuda.stream(self._copies):
            send(x, owner, self._many)

    def add(
        self,
        x: Summand,
        residual: Tensor | None = None,
        gain: Tensor | None = None,
        eps: float = 0.0,
        *,
        shares_out: bool = False,
    ) -> Tensor:
        """The sum, in place where nothing follows it; with ``residual`` and ``gain`` as peer_all_reduce.py and
        peer_two_shot.py have them. Of what :meth:`takes` ``x``."""
        out = (x.rows if isinstance(x, Scattered) else x) if residual is None else None
        if isinstance(x, Tensor) and not self._is_many(len(x)):
            assert self._few is not None
            assert not shares_out
            return peer_all_reduce(x, self._few, residual=residual, gain=gain, eps=eps, is_fatal=True, out=out)
        self._end_copies()
        if isinstance(x, Tensor):
            send_all(x, self._many)
        rows = x.rows if isinstance(x, Scattered) else x
        options = {"is_shared_out": shares_out, "is_fatal": True}
        return peer_two_shot(rows, self._many, residual=residual, gain=gain, eps=eps, out=out, **options)

    def _end_copies(self) -> None:
        """Those of a step that failed here, too: they must not arrive behind what is sent next."""
        if self._is_copying:
            assert self._copies is not None
            torch.cuda.current_stream().wait_stream(self._copies)
            self._is_copying = False

    def _is_many(self, num_rows: int) -> bool:
        return _MANY_ROWS <= num_rows <= self._many.max_rows


@dataclass(frozen=True, slots=True)
class PeerBuffers:
    """What a rank lets the others write to, before they can: one for few rows, where any fit, and one for many."""

    few: Tensor | None
    many: Tensor


def _few_rows(size: int, width: int, dtype: torch.dtype) -> int:
    return _FEW_BYTES // (size - 1) // (width * dtype.itemsize)


def _few_programs(rows: int) -> int:
    return min(rows, _FEW_PROGRAMS)


def allocate_peer_buffers(
    size: int, width: int, dtype: torch.dtype, device: torch.device, most_rows: int
) -> PeerBuffers:
    """For sums of ``[rows, width]``, up to ``most_rows``, over ``size`` ranks. RuntimeError where memory runs out."""
    rows = _few_rows(size, width, dtype)
    few = allocate_shared(peer_bytes(size, rows, width, dtype, _few_programs(rows)), device) if rows else None
    return PeerBuffers(few, allocate_shared(peer_rows_bytes(size, most_rows, width, dtype), device))


def build_peer_sums(
    group: dist.ProcessGroup | None,
    buffers: PeerBuffers,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    most_rows: int,
) -> PeerSums:
    """Over the buffers of all ranks of ``group``, who call it together: a rank without any would leave the others
    waiting for it. Nothing is launched here that peers wait in: one that fails can go on to a vote, which comes next.
    Raises RuntimeError."""
    rows, few = _few_rows(dist.get_world_size(group), width, dtype), None
    if buffers.few is not None:
        few = build_peer_memory(group, rows, width, dtype, device, _few_programs(rows), memory=buffers.few)
    many = build_peer_rows(group, most_rows, width, dtype, device, memory=buffers.many)
    return PeerSums(few, many, torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
