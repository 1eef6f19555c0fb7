"""What a warm-up compiles, compiled beforehand by many processes at once: one after the other it is most of a start."""

from __future__ import annotations

import hashlib
import logging
import os
import select
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FunctionType
from typing import Any, Final

from aphro_kernels.language import triton

from aphro_core.lifeline import die_with_parent

_LOG: Final = logging.getLogger(__name__)
_SECONDS: Final = 120.0  # after which what is left is compiled here
_JOB_BYTES: Final = 2
_NAME_BYTES: Final = 150  # of a kernel's name in the cache on disk
_LONG: Final = {  # seconds that a kernel takes, about; the others take 0.1 to 0.8
    "hopper_attention_kernel": 6.0,
    "packed_chain_kernel": 5.0,
    "chain_kernel": 4.0,
    "choose_kernel": 4.0,
    "attention_kernel": 1.6,
    "hopper_decode_kernel": 1.2,
    "gated_kernel": 1.0,
}


@contextmanager
def compiling_ahead(num_processes: int) -> Iterator[Callable[[], None]]:
    """Inside the block no Triton kernel is launched: each that is new is noted, and at the end all of them are made.
    Call what it gives to begin with those noted so far.

    Their outputs stay as they were allocated. Processes are forked from this one, with all that it has imported; they
    only fill Triton's cache on disk and touch no device. Whatever they do not get done is compiled here.
    """
    notes, processes, started = _Notes(), list[_Processes](), time.monotonic()

    def begin() -> None:
        jobs, notes.to_compile = notes.to_compile, []
        if num_processes > 1 and (jobs if processes else jobs[1:]):  # a single kernel is compiled here as fast
            processes.append(_Processes(_longest_first(jobs), min(num_processes, len(jobs))))

    try:
        with _active(notes):
            yield begin
        begin()
        if not all(group.wait(started + _SECONDS) for group in processes):
            _LOG.warning("not all kernels were compiled after %g s; the others follow, one after the other", _SECONDS)
    finally:
        for group in processes:
            group.end()
    if processes:
        num_jobs = sum(len(group.jobs) for group in processes)
        _LOG.info("%d kernels by %d processes in %.1f s", num_jobs, num_processes, time.monotonic() - started)
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
        self.to_compile: list[Callable[[], Any]] = []  # of them, what is not on disk and not begun

    def submit(
        self, key: str, compile_: Callable[[], Any], finish: Callable[[Any], None], *others: object
    ) -> _NotLaunched:
        self.jobs.append((compile_, finish))
        if not _is_on_disk(key, _kernel_of(compile_)):
            self.to_compile.append(compile_)
        kernel = _NotLaunched()
        finish(kernel)  # so that its next launch does not come here again
        return kernel


def _longest_first(jobs: list[Callable[[], Any]]) -> list[Callable[[], Any]]:
    """What takes longest must not begin last. Which kernel a job is of stands in its closure; where a Triton has it
    elsewhere, jobs stay in the order of their launches: a test asks the Triton that is there."""
    seconds = [_LONG.get(_kernel_of(job), 0.5) for job in jobs]
    return [jobs[number] for number in sorted(range(len(jobs)), key=lambda number: -seconds[number])]


def _kernel_of(job: Callable[[], Any]) -> str:
    if not isinstance(job, FunctionType):
        return ""
    for name, cell in zip(job.__code__.co_freevars, job.__closure__ or (), strict=True):
        with suppress(ValueError):  # an empty cell
            if name == "src":
                return str(getattr(cell.cell_contents, "name", ""))
    return ""


def _is_on_disk(key: str, kernel: str) -> bool:
    """Whether Triton's cache has it, and it need not be forked for. What a Triton keeps under another name is compiled
    all the same, which finds it there."""
    from triton.runtime.cache import get_cache_manager

    folder = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
    return folder.get_group(f"{kernel[:_NAME_BYTES]}.json") is not None


def read_compiler() -> None:
    """Triton hashes all of itself, half a GB, before its first kernel, and keeps that."""
    with suppress(ImportError):  # where another Triton has it
        from triton.runtime.cache import triton_key

        triton_key()


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


class _Processes:
    """Forked here: each job once, by whichever is free."""

    def __init__(self, jobs: list[Callable[[], Any]], num_processes: int) -> None:
        self.jobs, self._pids = jobs, list[int]()
        numbers, feed = os.pipe()  # job numbers, which processes take from it
        self._done, is_done = os.pipe()  # closed when the last process has ended
        os.write(feed, b"".join(number.to_bytes(_JOB_BYTES, "little") for number in range(len(jobs))))
        os.close(feed)
        parent = os.getpid()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking where there are threads: these end here
            for _ in range(num_processes):
                try:
                    pid = os.fork()
                except OSError as error:  # a limit of processes; those that are there do it all, or this one does
                    _LOG.warning("%d of %d processes compile kernels: %s", len(self._pids), num_processes, error)
                    break
                if pid == 0:
                    _serve_jobs(numbers, jobs, parent)
                self._pids.append(pid)
        os.close(numbers)
        os.close(is_done)

    def wait(self, deadline: float) -> bool:
        """For all to have ended, which they do when no job is left; whether they have."""
        return bool(select.select([self._done], [], [], max(deadline - time.monotonic(), 0.0))[0])

    def end(self) -> None:
        """Whatever they still do."""
        os.close(self._done)
        for pid in self._pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


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
