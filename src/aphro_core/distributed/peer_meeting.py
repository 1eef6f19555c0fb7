"""Ranks on their way to each other's memory: no step is taken that one of them cannot take.

A rank that fails alone would leave the others waiting for it, so each step is voted on, by a collective of its own: the
first rank that objects says why, in one line, and all go on by NCCL.
"""

from __future__ import annotations

import logging
import secrets
import socket
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from aphro_kernels.peer_columns import PeerColumns, build_peer_columns, peer_columns_bytes
from aphro_kernels.peer_rows import allocate_shared
from torch import Tensor

from aphro_core.distributed.mailbox import meet_neighbours
from aphro_core.peer_sums import PeerSums, allocate_peer_buffers, build_peer_sums

T = TypeVar("T")
_LOG: Final = logging.getLogger(__name__)
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class PeerMeeting:
    """All ranks of ``group`` make the same calls, each on its ``device``."""

    def __init__(
        self,
        rank: int,
        size: int,
        group: dist.ProcessGroup | None,
        device: torch.device,
        what: str,
    ) -> None:
        """``what`` says what happens where somebody objects."""
        self._rank, self._size, self._group, self._device, self._what = rank, size, group, device, what

    def connect(self, width: int, dtype: torch.dtype, most_rows: int) -> PeerSums | None:
        """For sums of ``[rows, width]``, up to ``most_rows``, over GPUs of one host that reach each other."""
        if not self.is_possible():
            return None
        shape = (width, dtype, self._device, most_rows)
        buffers = self.make(lambda: allocate_peer_buffers(self._size, *shape))
        return None if buffers is None else self.make(lambda: build_peer_sums(self._group, buffers, *shape))

    def connect_logits(self, max_rows: int, vocab_size: int, dtype: torch.dtype) -> PeerColumns | None:
        """For logits of up to ``max_rows`` rows, written to where tp rank 0 draws from them."""
        num_bytes = peer_columns_bytes(max_rows, vocab_size, dtype)
        memory = self.make(lambda: allocate_shared(num_bytes, self._device))
        if memory is None:
            return None
        return self.make(lambda: build_peer_columns(self._group, memory, max_rows, vocab_size, dtype))

    def share(self, num_bytes: int) -> tuple[Tensor, Any] | None:
        """Memory of each, ``[num_bytes]`` uint8, zeros, which all others reach, and what keeps theirs mapped."""
        memory = self.make(lambda: allocate_shared(num_bytes, self._device))
        handle = None if memory is None else self.make(lambda: self._show(memory))
        return None if memory is None or handle is None else (memory, handle)

    def _show(self, memory: Tensor) -> Any:
        from torch.distributed import _symmetric_memory as symmetric

        assert self._group is not None
        handle = symmetric.rendezvous(memory, self._group)
        memory.zero_()
        torch.cuda.synchronize(self._device)
        return handle

    def is_possible(self) -> bool:
        """Whether all are GPUs of one host that reach each other, and can show each other what they allocate next."""
        spread = None if self._is_on_one_host() else "its ranks are on several hosts"
        if self.is_refused(spread) or self.is_refused(self._unreached()) or not self._can_hand_over():
            return False
        torch.cuda.empty_cache()  # what is shared comes from the driver, which has nothing of what torch keeps unused
        return True

    def make(self, make: Callable[[], T]) -> T | None:
        """What each of them made; None for all where one could not. Also a barrier: ranks may write to each other
        behind it."""
        made, failure = None, None
        try:
            made = make()
        except RuntimeError as error:
            failure = f"no peer memory on {self._device} of {socket.gethostname()}: {error}"
        return None if self.is_refused(failure) else made

    def is_refused(self, objection: str | None) -> bool:
        """Whether some rank objects to peer memory. Returns when all have been asked, however late they come."""
        first = torch.tensor([self._size if objection is None else self._rank], dtype=torch.int64, device=self._device)
        dist.all_reduce(first, op=dist.ReduceOp.MIN, group=self._group)
        if objection is not None and first.item() == self._rank:
            _LOG.warning("%s: %s", self._what, objection)
        return bool(first.item() < self._size)

    def _is_on_one_host(self) -> bool:
        boot = zlib.crc32(_BOOT_ID.read_bytes()) if _BOOT_ID.exists() else self._rank  # no file: no two are equal
        return len({boot for (boot,) in self._numbers_of_all([boot])}) == 1

    def _unreached(self) -> str | None:
        """What to say where this rank's GPU does not reach that of another one."""
        device = self._device
        others = sorted(set(self._gpus_of_all()) - {device.index})
        count = torch.cuda.device_count()  # another container's processes may see more GPUs than this one's
        reaches = (other < count and torch.cuda.can_device_access_peer(device, other) for other in others)
        found = next((other for other, is_reached in zip(others, reaches, strict=True) if not is_reached), None)
        return None if found is None else f"GPU {device.index} does not reach the memory of GPU {found}"

    def _gpus_of_all(self) -> list[int]:
        return [index for (index,) in self._numbers_of_all([self._device.index])]

    def _can_hand_over(self) -> bool:
        """Whether what shows a GPU's memory to another process gets there: asked before torch waits for it for ever."""
        word = secrets.randbits(62)
        return meet_neighbours(self._rank, self._size, word, self._numbers_of_all, self.is_refused)

    def _numbers_of_all(self, numbers: list[int]) -> list[list[int]]:
        own = torch.tensor(numbers, dtype=torch.int64, device=self._device)
        every = [torch.empty_like(own) for _ in range(self._size)]
        dist.all_gather(every, own, group=self._group)
        return [each.tolist() for each in every]
