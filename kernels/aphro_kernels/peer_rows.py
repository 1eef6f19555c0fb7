"""Memory in which the GPUs of one host write each other rows of a sum, for peer_two_shot.py, and the way there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

PROGRAMS: Final = 256  # of the kernel, always as many: each counts the calls
LINE: Final = 32  # int32 of a line of flags, one a rank


@dataclass(frozen=True, slots=True)
class PeerRows:
    """One rank's end of a group. Calls that share it must follow each other on one stream."""

    rank: int
    size: int
    max_rows: int
    width: int
    dtype: torch.dtype
    programs: int
    memory: Tensor  # [bytes] uint8, which the others write: flags, their summands of own rows, then rows that they own
    places: tuple[Tensor | None, ...]  # by owner: [most rows, width], for this rank's summand of its rows; no own one
    rows: Tensor  # [>= max_rows, width] in ``memory``: where the others put what they own
    peers: Tensor  # [size] int64: addresses of every rank's ``memory`` as this rank sees them
    calls: Tensor  # [programs] int32
    status: Tensor  # [1] int32: 0, or 1 once a wait has ended without its rank; the host may set it to end one
    handle: Any  # keeps the mapping of the others' memory alive


def shares(num_rows: int, size: int) -> list[range]:
    """The rows of each rank: equal numbers, but for the last ones."""
    most = -(-num_rows // size)
    return [range(min(rank * most, num_rows), min((rank + 1) * most, num_rows)) for rank in range(size)]


def peer_rows_bytes(size: int, max_rows: int, width: int, dtype: torch.dtype, programs: int = PROGRAMS) -> int:
    """What :func:`build_peer_rows` takes of each rank's memory."""
    return _flag_bytes(programs) + (2 * size - 1) * -(-max_rows // size) * width * dtype.itemsize


def _flag_bytes(programs: int) -> int:
    return 4 * LINE * (programs + 1)  # a line for each program, and one that says that summands are there


def allocate_shared(num_bytes: int, device: torch.device) -> Tensor:
    """``[num_bytes]`` uint8 that other ranks can be let write to, not cleared. RuntimeError where memory runs out."""
    from torch.distributed import _symmetric_memory as symmetric

    return symmetric.empty(num_bytes, dtype=torch.uint8, device=device)


def build_peer_rows(
    group: Any,
    max_rows: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    programs: int = PROGRAMS,
    memory: Tensor | None = None,
) -> PeerRows:
    """Map each rank's buffer into all ranks of ``group`` (a process group with NCCL). All ranks call it together, each
    with a ``memory`` of :func:`allocate_shared`, which is made here if it is not given. As in peer_all_reduce.py a
    barrier comes next."""
    import torch.distributed as dist
    from torch.distributed import _symmetric_memory as symmetric

    rank, size = dist.get_rank(group), dist.get_world_size(group)
    num_bytes = peer_rows_bytes(size, max_rows, width, dtype, programs)
    memory = allocate_shared(num_bytes, device) if memory is None else memory
    handle = symmetric.rendezvous(memory, group)
    memory.zero_()
    torch.cuda.synchronize(device)
    memories = [memory if peer == rank else handle.get_buffer(peer, (num_bytes,), torch.uint8) for peer in range(size)]
    return join_peer_rows(rank, memories, max_rows, width, dtype, handle, programs)


def join_peer_rows(
    rank: int,
    memories: Sequence[Tensor],
    max_rows: int,
    width: int,
    dtype: torch.dtype,
    handle: Any,
    programs: int = PROGRAMS,
) -> PeerRows:
    """``memories``: of every rank, as this one sees them."""
    memory, size = memories[rank], len(memories)
    most = -(-max_rows // size)
    slab, start = most * width * dtype.itemsize, _flag_bytes(programs)
    places: list[Tensor | None] = []
    for owner, one in enumerate(memories):
        at = start + (rank - (rank > owner)) * slab
        places.append(None if owner == rank else one[at : at + slab].view(dtype).view(most, width))
    addresses = torch.tensor([one.data_ptr() for one in memories], dtype=torch.int64, device=memory.device)
    return PeerRows(
        rank=rank,
        size=size,
        max_rows=max_rows,
        width=width,
        dtype=dtype,
        programs=programs,
        memory=memory,
        places=tuple(places),
        rows=memory[start + (size - 1) * slab :].view(dtype).view(size * most, width),
        peers=addresses,
        calls=torch.zeros(programs, dtype=torch.int32, device=memory.device),
        status=torch.zeros(1, dtype=torch.int32, device=memory.device),
        handle=handle,
    )


def send(x: Tensor, owner: int, peers: PeerRows) -> None:
    """Put that part of the summand ``x`` [rows, width] which another rank adds up into its memory."""
    place, rows = peers.places[owner], shares(len(x), peers.size)[owner]
    assert place is not None
    place[: len(rows)].copy_(x[rows.start : rows.stop])


def send_all(x: Tensor, peers: PeerRows) -> None:
    for step in range(1, peers.size):
        send(x, (peers.rank + step) % peers.size, peers)
