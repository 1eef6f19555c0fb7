"""The ways between the stages of a pipeline: hidden states to the next one, drawn tokens back to the first."""

from __future__ import annotations

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor


class StageLink:
    """The neighbours of a rank in the pipeline: the same tp rank, one stage before and one behind."""

    def __init__(self, previous_rank: int | None, next_rank: int | None, max_sends: int = 1) -> None:
        """``max_sends`` hand-overs may be under way at once: as many as plans are in flight, then none ever waits."""
        self._previous = previous_rank
        self._next = next_rank
        self._max_sends = max_sends
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()
        self.begin_step()

    def begin_step(self) -> None:
        self.has_received = self.has_sent = False

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """What the stage before sent, in its order. Raises RuntimeError when it is gone or silent too long."""
        x = torch.empty(shape, dtype=dtype, device=device)
        dist.recv(x, src=self._previous)
        self.has_received = True
        return x

    def send(self, x: Tensor) -> None:
        """Hand ``x`` on without waiting for its receiver; it must not be written again."""
        while len(self._sending) >= self._max_sends:
            # Gloo calls a send complete only when somebody has waited for it, and holds its tensor until then
            self._sending.popleft()[0].wait()
        x = x.contiguous()
        work = dist.isend(x, dst=self._next)
        self.has_sent = True
        assert work is not None
        self._sending.append((work, x))


class TokenLink:
    """The way of drawn tokens back, from the last stage of a pipeline to the first, past their hosts.

    It has a communicator of its own: on that of the hidden states a token and the next rows would wait for each other.
    """

    def __init__(self, peer: int, group: dist.ProcessGroup) -> None:
        self._peer = peer
        self._group = group
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()
        self.begin_step()

    def begin_step(self) -> None:
        self.has_passed = False  # this step's tokens have been sent, or are expected

    def send(self, tokens: Tensor) -> None:
        """Without waiting; ``tokens`` must not be written again. The first stage receives each in this order."""
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()
        work = dist.isend(tokens, dst=self._peer, group=self._group)
        self.has_passed = True
        assert work is not None
        self._sending.append((work, tokens))

    def receive(self, count: int, device: torch.device) -> Tensor:
        """The next tokens that come; on a GPU its stream waits for them, not the host.

        Not sooner than they are needed: a program of NCCL waits for them on a multiprocessor, which products that want
        all of these at once do not get, and then take a third longer.
        """
        tokens = torch.empty(count, dtype=torch.int64, device=device)
        dist.recv(tokens, src=self._peer, group=self._group)
        return tokens
