"""Calls that follow each other, noted once and then made again in one go: nothing of Python between them.

A decode step of a small model is some hundred calls of tens of microseconds. Made one by one, Python's and OpenMP's
share is a tenth of the step and more. Here the threads begin once, and meet after each call by counting.
"""

from __future__ import annotations

import weakref
from functools import cache
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from aphro_kernels import openmp
from aphro_kernels.vector_blocks import SOURCE_DIGEST, add_to, pointer_to, read_counter

_BYTES: Final = ir.IntType(8).as_pointer()
_ALIGNED: Final = 64  # bytes
_NUM_ARGUMENTS: Final = 6
_LINE: Final = 8  # int64 of a line of the caches
_SPINS: Final = 2000  # looks at a counter before a waiting thread lets others run


class Recording:
    """Within this block calls are made, and noted. What they write stays in memory of its own, used again where nobody
    holds it any more: as much as one layer needs, not as all do."""

    def __init__(self) -> None:
        self._calls: list[tuple[int, tuple[int, ...]]] = []
        self._free: dict[int, list[np.ndarray]] = {}
        self._memory: list[np.ndarray] = []
        self._foreign = _ForeignOperations()

    def __enter__(self) -> Self:
        self._token = openmp.RECORDER.set(self)
        self._foreign.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: Any, error: Any, trace: TracebackType | None) -> None:
        self._foreign.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        openmp.RECORDER.reset(self._token)

    def note(self, address: int, arguments: tuple[int, ...]) -> None:
        self._calls.append((address, arguments))

    def empty(self, num_bytes: int) -> Tensor:
        free = self._free.setdefault(num_bytes, [])
        if not free:
            self._memory.append(np.empty(num_bytes + _ALIGNED, dtype=np.uint8))
            start = -self._memory[-1].ctypes.data % _ALIGNED
            free.append(self._memory[-1][start : start + num_bytes])
        memory = free.pop()
        held = memory[:]  # lives as long as the tensor, and any view of it
        weakref.finalize(held, free.append, memory).atexit = False
        return torch.from_numpy(held)

    @property
    def foreign(self) -> set[str]:
        """Operations of torch that were no views: what they do is not in the program."""
        return self._foreign.names

    def program(self) -> Program:
        """The calls, to be made again. Whatever they read must stay where it is, and so must :attr:`foreign` be
        empty."""
        assert not self.foreign
        return Program(self._calls, self._memory)


class _ForeignOperations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else torch imports its compiler when this is first called, which takes 1 to 3 s; nothing is compiled here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # contiguous, reshape and others call themselves views, and copy if they must
        if not func.is_view or not _share_memory(result, args[0]):
            self.names.add(str(func))
        return result


def _share_memory(one: Any, other: Any) -> bool:
    ones = [one] if isinstance(one, Tensor) else one
    return all(each.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() for each in ones)


class Program:
    """One thread at a time may call it."""

    def __init__(self, calls: list[tuple[int, tuple[int, ...]]], memory: list[np.ndarray]) -> None:
        self._memory = memory
        longest = max(len(arguments) for _, arguments in calls) + 1
        longest += -longest % _LINE
        self._fresh = np.zeros((len(calls), longest), dtype=np.int64)
        for row, (_, arguments) in zip(self._fresh, calls, strict=True):
            row[1 : len(arguments) + 1] = arguments
        self._numbers = self._fresh.copy()
        self._functions = np.array([address for address, _ in calls], dtype=np.int64)
        size = openmp.team_size_address()
        self._call = openmp.Call(_compile().address, _NUM_ARGUMENTS)
        self._arguments = (
            self._functions.ctypes.data,
            self._numbers.ctypes.data,
            len(calls),
            longest * 8,
            0 if size is None else size,
        )

    @property
    def num_bytes(self) -> int:
        """What it keeps: the calls, and the memory that they write."""
        held = sum(memory.nbytes for memory in self._memory)
        return held + self._fresh.nbytes + self._numbers.nbytes + self._functions.nbytes

    def __call__(self) -> None:
        np.copyto(self._numbers, self._fresh)
        self._call(openmp.num_threads(), *self._arguments)


@cache
def _compile() -> Any:
    """The C function that each thread runs, kept on disk between starts."""
    version = SOURCE_DIGEST

    @cfunc(types.void(types.voidptr), cache=True)
    def thread(pointer):  # type: ignore[no-untyped-def]
        assert version  # a closure's values are part of the cache's key
        a = carray(pointer, (_NUM_ARGUMENTS,), np.int64)
        numbers, num_calls, apart = a[2], a[3], a[4]
        functions = carray(pointer_to(a[1]), (num_calls,), np.int64)
        team = _team_size(a[5]) if a[5] != 0 else 1
        for at in range(num_calls):
            _call(functions[at], numbers + at * apart)
            add_to(a.ctypes.data, 1)
            looks = 0
            while read_counter(a.ctypes.data) < (at + 1) * team:
                looks += 1
                if looks % _SPINS == 0:
                    _let_others_run()

    return thread


@intrinsic
def _call(typingctx, function, numbers):  # type: ignore[no-untyped-def]
    """``void function(int64 *numbers)``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_BYTES])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [builder.inttoptr(args[1], _BYTES)])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@intrinsic
def _team_size(typingctx, function):  # type: ignore[no-untyped-def]
    """``int function()``: the threads that OpenMP gave, which may be fewer than were asked for."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        size = builder.call(builder.inttoptr(args[0], kind.as_pointer()), [])
        return builder.sext(size, ir.IntType(64))

    return types.int64(types.intp), generate


@intrinsic
def _let_others_run(typingctx):  # type: ignore[no-untyped-def]
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), generate
