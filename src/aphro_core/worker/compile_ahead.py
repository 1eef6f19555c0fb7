"""What a warm-up compiles, compiled beforehand by many processes at once: one after the other it is most of a start."""

from __future__ import annotations

import inspect
import logging
import os
import select
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from aphro_kernels.language import triton

from aphro_core.lifeline import die_with_parent

_LOG: Final = logging.getLogger(__name__)
_SECONDS: Final = 120.0  # after which what is left is compiled here
_JOB_BYTES: Final = 2


@contextmanager
def compiling_ahead(num_processes: int) -> Iterator[None]:
    """Inside the block no Triton kernel is launched: each that is new is noted, and at the end all of them are made.

    Their outputs stay as they were allocated. Processes are forked from this one, with all that it has imported; they
    only fill Triton's cache on disk and touch no device. Whatever they do not get done is compiled here.
    """
    notes = _Notes()
    with _active(notes):
        yield
    if num_processes > 1 and len(notes.jobs) > 1:
        _run_forked(_longest_first([compile_ for compile_, _ in notes.jobs]), min(num_processes, len(notes.jobs)))
    for compile_, finish in notes.jobs:
        finish(compile_())


class _NotLaunched:
    """Stands where a compiled kernel will."""

    function = packed_metadata = None

    def launch_metadata(self, *arguments: object) -> None: ...

    def run(self, *arguments: object) -> None: ...


class _Notes:
    """Takes the place of ``triton.AsyncCompileMode``."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Callable[[], Any], Callable[[Any], None]]] = []

    def submit(
        self, key: str, compile_: Callable[[], Any], finish: Callable[[Any], None], *others: object
    ) -> _NotLaunched:
        self.jobs.append((compile_, finish))
        kernel = _NotLaunched()
        finish(kernel)  # so that its next launch does not come here again
        return kernel


def _longest_first(jobs: list[Callable[[], Any]]) -> list[Callable[[], Any]]:
    """What takes longest must not begin last. Which kernel a job is of stands in its closure; where a Triton has it
    elsewhere, jobs stay in the order of their launches."""
    sources = [inspect.getclosurevars(job).nonlocals.get("src") for job in jobs]
    lengths = [source_length(getattr(source, "fn", None)) for source in sources]
    return [jobs[number] for number in sorted(range(len(jobs)), key=lambda number: -lengths[number])]


def source_length(function: Any) -> int:
    """Characters of a kernel and of all that it calls: about what its compilation takes."""
    found: dict[int, int] = {}
    left = [function]
    while left:
        one = left.pop()
        if id(one) in found or not isinstance(getattr(one, "src", None), str):
            continue
        found[id(one)] = len(one.src)
        left += [one.fn.__globals__.get(name) for name in one.fn.__code__.co_names]
    return sum(found.values())


@contextmanager
def _active(notes: _Notes) -> Iterator[None]:
    from triton.runtime._async_compile import active_mode

    before = active_mode.set(notes)
    try:
        yield
    finally:
        active_mode.reset(before)


def can_compile_ahead() -> bool:
    """Whether this Triton hands out its compilations (3.4 and later)."""
    return triton is not None and hasattr(triton, "AsyncCompileMode")


def _run_forked(jobs: list[Callable[[], Any]], num_processes: int) -> None:
    """Each job once, by whichever process is free. Returns when all are done, or after ``_SECONDS``."""
    numbers, feed = os.pipe()  # job numbers, which processes take from it
    done, is_done = os.pipe()  # closed when the last process has ended
    os.write(feed, b"".join(number.to_bytes(_JOB_BYTES, "little") for number in range(len(jobs))))
    os.close(feed)
    parent, pids = os.getpid(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking where there are threads: these do not go on
        for _ in range(num_processes):
            if (pid := os.fork()) == 0:
                _serve_jobs(numbers, jobs, parent)
            pids.append(pid)
    os.close(numbers)
    os.close(is_done)
    started = time.monotonic()
    in_time, _, _ = select.select([done], [], [], _SECONDS)
    os.close(done)
    for pid in pids:
        if not in_time:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    _LOG.info("%d kernels by %d processes in %.1f s", len(jobs), num_processes, time.monotonic() - started)


def _build_launcher(kernel: Any) -> None:
    """What passes the arguments on is C, which Triton would compile when it first launches the kernel."""
    from triton.runtime.driver import driver

    try:
        driver.active.launcher_cls(kernel.src, kernel.metadata)
    except Exception:
        _LOG.debug("a launcher could not be built ahead:\n%s", traceback.format_exc())


def _serve_jobs(numbers: int, jobs: list[Callable[[], Any]], parent: int) -> None:
    """A forked process: it ends here, whatever happens."""
    try:
        die_with_parent(parent)
        while taken := os.read(numbers, _JOB_BYTES):
            _build_launcher(jobs[int.from_bytes(taken, "little")]())
    except BaseException:  # the same error comes again where it can be told
        _LOG.debug("a kernel could not be compiled ahead:\n%s", traceback.format_exc())
    finally:
        os._exit(0)
