"""The collectives of the live check, by the engine's own groups: sums that are verified, and how long they take."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from statistics import median
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from aphro_core.distributed.stage_links import StageLink
from aphro_core.distributed.tensor_group import TensorParallelGroup
from aphro_core.doctor.live.protocol import Measure, Timing, Work

_PERIOD: Final = 251  # of the pattern that is summed: prime, so that a shifted or repeated piece shows
_LARGE_BYTES: Final = 64 << 10  # from here on bytes decide, not latency


class Collectives:
    """What stays between groups: the device, and the store if this rank keeps it."""

    def __init__(self, device: str, limit: timedelta, store_socket: socket.socket | None) -> None:
        torch.set_num_threads(1)
        self._device = torch.device(device)
        self._limit = limit
        self._store: TCPStore | None = None
        self.store_port = 0
        self.torch_version = str(torch.__version__)
        self.nccl_version: str | None = None
        self.device_name = "cpu"
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            self.device_name = torch.cuda.get_device_name(self._device)
            self.nccl_version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        if store_socket is not None:
            address, self.store_port = store_socket.getsockname()[:2]
            self._store = TCPStore(
                address,
                self.store_port,
                is_master=True,
                wait_for_workers=False,
                timeout=limit,
                master_listen_fd=store_socket.detach(),
            )

    def reach(self, address: str, port: int) -> None:
        """Connect to the store: a plain connection first, whose error says more than TCPStore's."""
        if self._store is None:
            socket.create_connection((address, port), timeout=self._limit.total_seconds()).close()
            self._store = TCPStore(address, port, is_master=False, timeout=self._limit)

    @contextmanager
    def joined(self, message: Measure) -> Iterator[Group]:
        """A group of its own for this one measurement, so that a failed one leaves nothing to the next."""
        assert self._store is not None
        is_cuda = self._device.type == "cuda"
        dist.init_process_group(
            "nccl" if is_cuda else "gloo",
            store=PrefixStore(message.group, self._store),
            rank=message.rank,
            world_size=message.size,
            timeout=self._limit,
            device_id=self._device if is_cuda else None,
        )
        try:
            yield Group(message.rank, message.size, self._device)
        finally:
            with suppress(RuntimeError):
                dist.destroy_process_group()


class Group:
    """One rank's view of a group that it has joined."""

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self._rank = rank
        self._size = size
        self._device = device
        self._tensor_parallel = TensorParallelGroup(rank, size)
        self._seconds_per_byte = 0.0  # of the last large collective, the same bits on every rank

    def measure(self, work: Work) -> Timing:
        """Do a work once and verify it, then repeat it for its time. Every rank comes to the same number of repeats."""
        predicted = self._seconds_per_byte * work.num_bytes
        if predicted > work.max_seconds:
            return Timing(work.kind, work.num_bytes, predicted, repeats=0, is_right=True)
        num_elements = max(1, work.num_bytes // 4)
        if work.kind == "hand_over":
            once, is_right = self._hand_over(num_elements)
        elif work.kind == "graph_all_reduce":
            once, is_right = self._graph_all_reduce(num_elements)
        else:
            once, is_right = self._all_reduce(num_elements)
        repeats, seconds = 1, self._time(once, 1)
        if seconds < work.seconds:
            repeats = max(1, min(work.max_repeats, int(work.seconds / seconds)))
            seconds = self._time(once, repeats)
        if work.kind == "hand_over":
            seconds /= 2  # there and back again
        if work.num_bytes >= _LARGE_BYTES:
            self._seconds_per_byte = seconds / work.num_bytes
        return Timing(work.kind, work.num_bytes, seconds, repeats, is_right)

    def _time(self, once: Callable[[], object], repeats: int) -> float:
        """Seconds of one, the mean over the group: the same bits on every rank.

        Of each rank the median on a CPU, whose cores others use too; on a GPU the mean of a row without a pause.
        """
        times = []
        self._synchronize()
        for batch in [repeats] if self._device.type == "cuda" else [1] * repeats:
            started = time.perf_counter()
            for _ in range(batch):
                once()
            self._synchronize()
            times.append((time.perf_counter() - started) / batch)
        took = torch.tensor([median(times)], device=self._device)
        return float(self._tensor_parallel.all_reduce_(took).item()) / self._size

    def _all_reduce(self, num_elements: int) -> tuple[Callable[[], object], bool]:
        x = self._pattern(num_elements)
        self._tensor_parallel.all_reduce_(x)
        is_right = self._is_sum(x)
        zeros = torch.zeros(num_elements, device=self._device)  # their sum is themselves, however often
        return lambda: self._tensor_parallel.all_reduce_(zeros), is_right

    def _graph_all_reduce(self, num_elements: int) -> tuple[Callable[[], object], bool]:
        """The same inside a CUDA graph, as a decode step replays it."""
        x = self._pattern(num_elements)
        self._tensor_parallel.all_reduce_(x.clone())
        self._synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x.clone()
            self._tensor_parallel.all_reduce_(y)
        graph.replay()
        self._synchronize()
        return graph.replay, self._is_sum(y)

    def _hand_over(self, num_elements: int) -> tuple[Callable[[], object], bool]:
        """Rank 0 sends to rank 1, which sends back what came, as stages of a pipeline do."""
        there, back = StageLink(None, 1), StageLink(1, None)
        if self._rank == 1:
            there, back = StageLink(0, None), StageLink(None, 0)
        shape, sent = (num_elements,), self._pattern(num_elements, rank=0)

        def round_trip() -> Tensor:
            if self._rank == 0:
                there.send(sent)
                return back.receive(shape, sent.dtype, self._device)
            came = there.receive(shape, sent.dtype, self._device)
            back.send(came)
            return came

        return round_trip, torch.equal(round_trip(), sent)

    def _pattern(self, num_elements: int, rank: int | None = None) -> Tensor:
        base = torch.arange(num_elements, device=self._device, dtype=torch.int32) % _PERIOD
        return base.to(torch.float32) + (self._rank if rank is None else rank) + 1

    def _is_sum(self, x: Tensor) -> bool:
        """Exact in float32: the sum over ranks r of (i mod 251) + r + 1."""
        base = self._pattern(x.numel(), rank=-1)
        return torch.equal(x, base * self._size + self._size * (self._size + 1) / 2)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
