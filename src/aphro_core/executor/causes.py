"""Why a group ended, or does not begin: one error that names rank, host, process and the next step."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from aphro_core.errors import AphroError, EngineDeadError, ExitCode
from aphro_core.executor.rank import WorkerHandle


def first_cause(workers: Sequence[WorkerHandle], num_oom_kills: int) -> AphroError:
    """A rank that failed by itself, else one that was killed, else whoever went first; peers only echo it.

    ``num_oom_kills``: of the kernel here, since the group started.
    """
    gone = sorted((worker for worker in workers if worker.is_gone), key=lambda worker: worker.gone_at)
    own = [worker for worker in gone if worker.failed is not None and not worker.failed.secondary]
    silent = [worker for worker in gone if worker.failed is None]
    worker = (own or silent or gone)[0]
    worker.process.poll()
    failed = worker.failed
    pid = failed.pid if failed else worker.loaded.pid if worker.loaded else worker.process.pid
    where = f"rank {worker.rank} on {failed.host if failed else worker.host} (pid {pid})"
    if failed is None:
        was_short = not worker.is_remote and num_oom_kills > 0
        return _explain_end(where, worker, was_short=was_short or worker.process.was_short)
    error = EngineDeadError(f"{where}: {failed.message}", hint=failed.hint, exit_code=ExitCode(failed.exit_code))
    error.add_note(failed.traceback)
    return error


def late(
    workers: Sequence[WorkerHandle], what: str, seconds: float, remedy: str = "raise --start-timeout, or "
) -> EngineDeadError:
    """Of ``workers`` that did not do ``what`` in time."""
    ranks, hosts = (
        ", ".join(dict.fromkeys(words)) for words in zip(*((str(w.rank), w.host) for w in workers), strict=True)
    )
    first = workers[0]
    where = f"on {first.host}" if first.is_remote else f"pid {first.process.pid}"
    return EngineDeadError(
        f"rank {ranks} did not {what} within {seconds:g} s (on {hosts})",
        hint=f"{remedy}look at what that process waits for: {where}",
    )


def stopped(worker: WorkerHandle) -> EngineDeadError:
    """A rank that nobody lets run while it starts."""
    return EngineDeadError(
        f"rank {worker.rank} on {worker.host} (pid {worker.process.pid}) is stopped (SIGSTOP) while it starts",
        hint="find out who stopped it, and start again",
        is_external=True,
    )


def _explain_end(where: str, worker: WorkerHandle, *, was_short: bool) -> EngineDeadError:
    """``was_short``: the kernel there has killed something for want of memory since the group started."""
    process = worker.process
    is_killed = process.exit_code == -signal.SIGKILL
    if process.is_lost:
        hint = "look at that host and the network to it; it may take part again once it answers"
    elif is_killed and was_short:
        hint = "the kernel killed it because memory was short: lower --cpu-memory-utilization"
    elif is_killed:
        hint = "somebody killed it: the kernel has not run out of memory since the start"
    else:
        hint = "start again with `--log-level debug` and read that rank's lines"
    return EngineDeadError(
        f"{where} {process.describe_end()}",
        hint=hint,
        is_external=process.is_lost or (is_killed and not was_short),
        lost_host=worker.host if process.is_lost else "",
    )
