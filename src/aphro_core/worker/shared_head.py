"""The product with the head in decode steps of a pipeline of GPUs of one host: two stages make it together.

The last stage has a head more than the others, which wait for it: it hands the rows that the head multiplies to the
first one, which waits for their tokens meanwhile, and has the second half of the head's outputs as well. That writes
what is drawn from of them into the last stage's memory (aphro_kernels/peer_columns.py). Steps with chunks stay with the
last stage, which is the shorter one there, as is whatever is not a row to draw from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from aphro_kernels.peer_columns import peer_columns
from aphro_kernels.peer_line import put, take_
from aphro_kernels.skinny_linear import build_skinny_workspace
from aphro_kernels.stream_wait import wait_for_count
from torch import Tensor

from aphro_core.distributed.links import HeadLine, Links
from aphro_core.distributed.peer_meeting import PeerMeeting
from aphro_core.layers.decoder import Decoder
from aphro_core.layers.linear import Linear
from aphro_core.parallel.shard import head_halves


class _End:
    """What both stages do. ``is_open``: decode steps are made together from here on."""

    def __init__(self, ends: HeadLine) -> None:
        self._line, self.columns = ends.line, ends.columns
        self.is_open = False
        self._is_half_done = False  # this step's rows have been sent or taken, and their logits have failed
        self.begin_step()

    def begin_step(self) -> None:
        self.has_met = False  # this step's logits are launched, or sure to come

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Inside the block the other stage takes no part."""
        was_open, self.is_open = self.is_open, False
        try:
            yield
        finally:
            self.is_open = was_open

    def _nothing(self, num_rows: int) -> Tensor:
        """Rows to multiply, of zeros."""
        rows = self.columns.rows
        width = self._line.words * 4 // rows.itemsize
        return torch.zeros(num_rows, width, dtype=rows.dtype, device=rows.device)


class HeadOwner(_End):
    """On the last stage. ``num_bytes``: what it holds besides the head."""

    num_bytes = 0

    def __init__(self, ends: HeadLine, head: Linear) -> None:
        super().__init__(ends)
        self._head = head
        self._product = head.of_outputs(len(head_halves(self.columns.rows.shape[1])[0]))

    def send_weight(self) -> None:
        """The second half of the head, which the first stage receives."""
        assert self._head.plain is not None
        weight = self._head.plain[0][: self.columns.rows.shape[1]]  # without padding
        for rows in torch.split(weight[self._product.num_outputs :], len(self.columns.rows)):
            put(rows, self._line, is_fatal=True)

    def open(self) -> None:
        """Both ends call it together, which also loads what it launches."""
        self.is_open = True
        self.logits(self._nothing(1))

    def logits(self, normed: Tensor) -> None:
        """Of ``normed`` rows into ``columns``. Fit for a CUDA graph. Where it has failed, another call ends it."""
        if not self._is_half_done:
            put(normed, self._line, is_fatal=True)
        self._is_half_done = True
        self.write(normed)
        self._is_half_done, self.has_met = False, True

    def write(self, normed: Tensor) -> None:
        """The own half of them, which waits for the other one."""
        peer_columns(self._product(normed), self.columns, is_fatal=True)

    def rehearse(self, num_rows: int) -> None:
        """Launch the product of a step of so many rows, for the library to load it."""
        self._product(self._nothing(num_rows))

    def compile(self) -> None:
        """Launch what is compiled, where nothing is launched."""
        self.write(self._nothing(1))

    def settle(self, num_rows: int) -> None:
        """A step of so many rows has failed here, and the first stage does not know."""
        if self.is_open and not self.has_met:
            self.logits(self._nothing(num_rows).fill_(torch.nan))


class HeadHelper(_End):
    """On the first stage, which helps on a stream of its own: whether another step comes before is not known when one
    has been launched. Nothing there waits on a multiprocessor: the layers beside it may be a chain, which wants all."""

    def __init__(self, ends: HeadLine, device: torch.device) -> None:
        """Raises RuntimeError where the driver cannot wait as this does, or memory runs out."""
        super().__init__(ends)
        max_rows, vocab_size = self.columns.rows.shape
        self._rows, half = self._nothing(max_rows), head_halves(vocab_size)[1]
        self._num_outputs = vocab_size - half.start  # behind which is padding
        self._weight = self._rows.new_zeros(len(half), self._rows.shape[1])
        workspace = build_skinny_workspace(device)
        self._product = Linear(self._weight, workspace=workspace)
        self._num_messages = 0
        self.stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        held = (self._weight, self._rows, workspace.parts, workspace.arrivals)
        self.num_bytes = sum(tensor.nbytes for tensor in held)
        wait_for_count(self.stream, self._line.written, 0)

    def send_weight(self) -> None:
        """The other end of it."""
        for rows in torch.split(self._weight[: self._num_outputs], len(self._rows)):
            take_(rows, self._line, is_fatal=True)
            self._num_messages += 1

    def open(self) -> None:
        self.is_open = True
        self.help(1)

    def help(self, num_rows: int) -> None:
        """In the step that has just been launched, of so many rows. Where it has failed, another call ends it."""
        rows = self._rows[:num_rows]
        with torch.cuda.stream(self.stream):
            if not self._is_half_done:
                wait_for_count(self.stream, self._line.written, (self._num_messages + 1) * self._line.programs)
                take_(rows, self._line, is_fatal=True)
                self._num_messages += 1
            self._is_half_done = True
            self.write(rows)
        self._is_half_done, self.has_met = False, True

    def write(self, normed: Tensor) -> None:
        """Its half of the logits into the last stage's memory."""
        peer_columns(self._multiply(normed), self.columns, is_fatal=True)

    def _multiply(self, normed: Tensor) -> Tensor:
        """Into this stage's own memory for logits, of as many, which nobody else uses."""
        width = len(self._weight)
        part = self.columns.rows.view(-1)[: len(normed) * width].view(-1, width)
        return self._product(normed, part)

    def rehearse(self, num_rows: int) -> None:
        with torch.cuda.stream(self.stream):
            self._multiply(self._rows[:num_rows])

    def compile(self) -> None:
        self.write(self._rows[:1])

    def settle(self, num_rows: int) -> None:
        """A step of so many rows has failed here, and the last stage asks all the same."""
        if self.is_open and not self.has_met:
            self.help(num_rows)


SharedHead = HeadOwner | HeadHelper


def share_head(links: Links, decoder: Decoder, rank: int, world_size: int, device: torch.device) -> SharedHead | None:
    """All ranks of a pipeline whose stages have memory of each other's call it together. None: of a middle stage, or
    where somebody objects, as one line says; then the last stage has the head to itself."""
    what = "the last stage multiplies with the head alone"
    meeting = PeerMeeting(rank, world_size, torch.distributed.group.WORLD, device, what)
    is_last = rank == world_size - 1
    head = decoder.plain_head if is_last else None
    if meeting.is_refused("its weight is quantised, or split" if is_last and head is None else None):
        return None
    shared = meeting.make(lambda: _end(links.head, head, device))
    if shared is not None:
        shared.send_weight()
        torch.cuda.synchronize(device)
    return shared


def _end(ends: HeadLine | None, head: Linear | None, device: torch.device) -> SharedHead | None:
    if ends is None:
        return None
    return HeadHelper(ends, device) if head is None else HeadOwner(ends, head)
