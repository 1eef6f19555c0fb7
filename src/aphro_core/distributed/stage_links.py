"""The ways between the stages of a pipeline: hidden states to the next one, drawn tokens back to the first."""

from __future__ import annotations

from collections import deque
from typing import Final

import torch
import torch.distributed as dist
from aphro_kernels.peer_line import PeerLine, put, take_
from torch import Tensor

MOST_DUE: Final = 7  # steps whose tokens wait for the first stage, which asks late: NCCL holds 8 messages


class StageLink:
    """The neighbours of a rank in the pipeline: the same tp rank, one stage before and one behind."""

    def __init__(self, previous_rank: int | None, next_rank: int | None, max_sends: int = 1) -> None:
        """``max_sends`` hand-overs may be under way at once: as many as plans are in flight, then none ever waits."""
        self._previous = previous_rank
        self._next = next_rank
        self._max_sends = max_sends
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()
        self._line: PeerLine | None = None
        self._line_behind: PeerLine | None = None
        self.begin_step()

    def begin_step(self) -> None:
        self.has_received = self.has_sent = False

    def go_by(self, line: PeerLine | None, line_behind: PeerLine | None) -> None:
        """By peer memory from here on, from the stage before and to the one behind."""
        self._line, self._line_behind = line, line_behind

    @property
    def is_alone(self) -> bool:
        """Whether no program of NCCL runs beside a step, for this stage's neighbours."""
        is_alone = self._previous is None or self._line is not None
        return is_alone and (self._next is None or self._line_behind is not None)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """What the stage before sent, in its order. Raises RuntimeError when it is gone or silent too long."""
        return self.receive_(torch.empty(shape, dtype=dtype, device=device))

    def receive_(self, x: Tensor) -> Tensor:
        """:meth:`receive` into ``x``."""
        if self._line is not None:
            take_(x, self._line, is_fatal=True)
        else:
            dist.recv(x, src=self._previous)
        self.has_received = True
        return x

    def send(self, x: Tensor) -> None:
        """Hand ``x`` on without waiting for its receiver; what comes next may write it again."""
        if self._line_behind is not None:
            put(x.contiguous(), self._line_behind, is_fatal=True)
            self.has_sent = True
            return
        while len(self._sending) >= self._max_sends:
            # Gloo calls a send complete only when somebody has waited for it, and holds its tensor until then
            self._sending.popleft()[0].wait()
        x = x.clone(memory_format=torch.contiguous_format)
        work = dist.isend(x, dst=self._next)
        self.has_sent = True
        assert work is not None
        self._sending.append((work, x))


class TokenLink:
    """The way of drawn tokens back, from the last stage of a pipeline to the first, past their hosts: a line by peer
    memory, or a communicator of its own, since on that of the hidden states a token and the next rows would wait for
    each other."""

    def __init__(self, peer: int, group: dist.ProcessGroup | None, line: PeerLine | None = None) -> None:
        self._peer = peer
        self._group = group
        self._line = line
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()
        self.begin_step()

    def begin_step(self) -> None:
        self.has_passed = False  # this step's tokens have been sent, or are expected

    def send(self, tokens: Tensor) -> None:
        """Without waiting; what comes next may write ``tokens`` again. The first stage receives each in this order."""
        if self._line is not None:
            put(tokens, self._line, is_fatal=True)
            self.has_passed = True
            return
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()
        tokens = tokens.clone()
        work = dist.isend(tokens, dst=self._peer, group=self._group)
        self.has_passed = True
        assert work is not None
        self._sending.append((work, tokens))

    def receive(self, count: int, device: torch.device) -> Tensor:
        """The next tokens that come; on a GPU its stream waits for them, not the host.

        Not sooner than they are needed: what waits for them takes a multiprocessor, which products that want all of
        these at once do not get, and then take a third longer.
        """
        tokens = torch.empty(count, dtype=torch.int64, device=device)
        if self._line is not None:
            return take_(tokens, self._line, is_fatal=True)
        dist.recv(tokens, src=self._peer, group=self._group)
        return tokens
