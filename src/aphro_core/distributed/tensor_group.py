"""The ranks of one stage: sums, logits and what one of them tells the others, as an object handed to layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from aphro_kernels.peer_columns import PeerColumns, peer_columns
from torch import Tensor

from aphro_core.distributed.peer_meeting import PeerMeeting
from aphro_core.peer_sums import PeerSums, Scattered, Summand


class TensorParallelGroup:
    """The ranks of one stage. With one rank every call is the identity.

    ``num_...`` count the collectives of a step that this rank has taken part in: when it fails, the peers wait for the
    others (worker/dues.py). So each is counted behind the call, which may find no memory for what it needs.
    """

    def __init__(self, rank: int, size: int, process_group: dist.ProcessGroup | None = None) -> None:
        self.rank = rank
        self.size = size
        self._group = process_group
        self._peers: PeerSums | None = None
        self._columns: PeerColumns | None = None
        self.adds_in_order = False  # of the ranks, whatever the number of rows: a library may take another one for each
        self.begin_step()

    def begin_step(self) -> None:
        self.num_sums = self.num_gathers = self.num_broadcasts = 0

    def connect(self, width: int, dtype: torch.dtype, device: torch.device, most_rows: int) -> None:
        """Let sums of ``[rows, width]``, up to ``most_rows``, go by peer memory, if all are GPUs of one host that reach
        each other: of few rows all by everybody, of many each by one rank.

        All ranks call it together; whatever forbids it on one of them leaves all with NCCL, and one line says what.
        """
        if self.size > 1 and device.type == "cuda":
            meeting = PeerMeeting(self.rank, self.size, self._group, device, "tensor-parallel sums all go by NCCL")
            self._peers = meeting.connect(width, dtype, most_rows)

    def connect_logits(self, max_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Let ranks whose sums go by peer memory write logits to where tp rank 0 draws from them, up to ``max_rows``.
        All call it together."""
        if self._peers is not None:
            meeting = PeerMeeting(self.rank, self.size, self._group, device, "logits go by NCCL")
            self._columns = meeting.connect_logits(max_rows, vocab_size, dtype)

    @property
    def logits(self) -> PeerColumns | None:
        """Whose ``rows``, the first ones, are the ``out`` of :meth:`gather_columns` for those that a step draws from,
        and whose ``is_whole`` says beforehand, on all ranks, which of them have to be whole; None: any other ``out`` is
        as good. Sums of the next step come before it is written again."""
        return self._columns

    def parts(self, num_rows: int) -> list[tuple[int, range]]:
        """In which order a summand of so many rows is best made: whose rows, and which, this rank's last. Empty: in one
        piece."""
        return [] if self._peers is None else self._peers.parts(num_rows)

    def send(self, x: Tensor, owner: int) -> None:
        """Of the summand ``x`` [rows, width] the part of one of :meth:`parts`, beside whatever is launched next."""
        assert self._peers is not None
        self._peers.send(x, owner)

    def can_share_out(self, num_rows: int) -> bool:
        """Whether :meth:`add_rms_norm_` of so many rows can leave each rank with its part of the residual."""
        return self._peers is not None and self._peers.can_share_out(num_rows)

    def all_reduce_(self, x: Summand) -> Tensor:
        """Sum ``x`` over the group, in place. Every rank gets the same bits: NCCL sums each element once and copies it,
        by peer memory all ranks add in the same order."""
        if (peers := self._peers_for(x)) is not None:
            x = peers.add(x)
        elif self.size > 1:
            assert isinstance(x, Tensor)
            if self.adds_in_order and self.size > 2:
                return self._add_in_order_(x)
            dist.all_reduce(x, group=self._group)
        assert isinstance(x, Tensor)
        self.num_sums += self.size > 1
        return x

    def _add_in_order_(self, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self._group)
        self.num_sums += 1
        x.copy_(parts[0])
        for part in parts[1:]:
            x += part
        return x

    def add_rms_norm_(
        self, residual: Tensor, x: Summand, weight: Tensor, eps: float, *, shares_out: bool = False
    ) -> Tensor | None:
        """``residual +=`` the sum of ``x`` over the group, and the RMSNorm of that, in one launch; None, and nothing
        done, where the sum does not go by peer memory.

        With ``shares_out`` a rank keeps up its own rows of ``residual`` alone (:meth:`can_share_out`), and the norm
        lasts until the next sum: the call that makes it whole again has it False.
        """
        if not residual.is_contiguous() or (peers := self._peers_for(x)) is None:
            assert not shares_out
            return None
        normed = peers.add(x, residual, weight, eps, shares_out=shares_out)
        self.num_sums += 1
        return normed

    def _peers_for(self, x: Summand) -> PeerSums | None:
        """Those by which ``x`` can be summed."""
        is_theirs = self._peers is not None and (isinstance(x, Scattered) or self._peers.takes(x))
        return self._peers if is_theirs else None

    def union(self, chosen: Sequence[int], count: int, device: torch.device) -> list[int]:
        """Numbers below ``count`` that any rank has chosen, in order. All ranks call it together."""
        if self.size == 1:
            return sorted(chosen)
        votes = torch.zeros(count, dtype=torch.int64)
        votes[list(chosen)] = 1
        votes = votes.to(device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._group)
        return [int(number) for number in votes.nonzero().flatten().tolist()]

    def broadcast_(self, x: Tensor) -> Tensor:
        """What tp rank 0 has in ``x``, on every rank, in place."""
        if self.size > 1:
            dist.broadcast(x, src=self._first_rank(), group=self._group)
            self.num_broadcasts += 1
        return x

    def gather_columns(self, x: Tensor, out: Tensor | None = None) -> Tensor | None:
        """``[rows, columns]`` of every rank side by side on tp rank 0, None on the others; equal shapes. Into ``out``
        if it is given, by all ranks or none, which may have fewer columns."""
        if self.size == 1:
            return x if out is None else out.copy_(x[:, : out.shape[1]])
        if out is not None and self._columns is not None:
            rows = peer_columns(x.contiguous(), self._columns, is_fatal=True)
            self.num_gathers += 1
            assert self.rank != 0 or rows.data_ptr() == out.data_ptr(), "not the place of logits"
            return rows if self.rank == 0 else None
        parts = self._gather(x.contiguous())
        self.num_gathers += 1
        if self.rank != 0:
            return None
        return torch.cat(list(parts), dim=-1) if out is None else _side_by_side(parts, out)

    def _gather(self, x: Tensor) -> Tensor:
        """``[size, rows, columns]`` of all, on tp rank 0. With NCCL on every rank: its gather is made of messages, and
        rank 0 would hold 0.3 GiB of buffers for those of each other rank."""
        if x.is_cuda:
            parts = x.new_empty(self.size, *x.shape)
            dist.all_gather_into_tensor(parts, x, group=self._group)
            return parts
        parts = x.new_empty(self.size if self.rank == 0 else 0, *x.shape)
        dist.gather(x, list(parts) or None, dst=self._first_rank(), group=self._group)
        return parts

    def _first_rank(self) -> int:
        return dist.get_global_rank(self._group, 0) if self._group is not None else 0


def _side_by_side(parts: Tensor, out: Tensor) -> Tensor:
    """``parts`` [ranks, rows, columns] into ``out`` [rows, at most as many columns as all have]."""
    num_ranks, num_rows, width = parts.shape
    if out.is_contiguous() and out.shape[1] == num_ranks * width:
        out.view(num_rows, num_ranks, width).copy_(parts.transpose(0, 1))
        return out
    for rank, part in enumerate(parts):  # the last ones may be padding
        place = out[:, rank * width : (rank + 1) * width]
        place.copy_(part[:, : place.shape[1]])
    return out
