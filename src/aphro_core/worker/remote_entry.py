"""The door of a worker on another host: ``python -m aphro_core.worker.remote_entry [PARENT_PID]``, frames on its stdio.

ssh is its stdio, or a socket to the engine; PARENT_PID, if given, is the process that it ends with. Whatever it or a
library prints goes to the engine as lines, under the host's name and the rank.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from aphro_core.channel import ChannelClosedError
from aphro_core.environment import host_specific
from aphro_core.errors import AphroError, ExitCode
from aphro_core.interfaces import way_to
from aphro_core.lifeline import die_with_parent, name_process
from aphro_core.messages.steps import StartWorker, WorkerAlive, WorkerLog
from aphro_core.worker import entry
from aphro_core.worker.paths import check_interfaces, check_paths
from aphro_core.worker.stdio_channel import StdioChannel

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_ALIVE_SECONDS: Final = 2.0
LEASE_SECONDS: Final = 15.0
_MAX_LOG_BYTES: Final = 8 << 20  # at the start of a rank


def main() -> None:
    name_process("aphro-rank")
    if sys.argv[1:]:
        die_with_parent(int(sys.argv[1]))
    channel = StdioChannel(os.dup(0), os.dup(1), LEASE_SECONDS)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    log, write_end = os.pipe()
    os.dup2(write_end, 1)
    os.dup2(write_end, 2)
    exit_code = entry.run(channel, partial(_serve, channel, log))
    os._exit(exit_code)  # as the fork server's children: the teardown of process groups would wait for peers


def _serve(channel: StdioChannel, log: int, _: entry.WorkerChannel, start: StartWorker) -> None:
    threading.Thread(target=_forward_lines, args=(channel, log, start), name="log", daemon=True).start()
    has_come = threading.Event()
    threading.Thread(target=_say_alive, args=(channel, start.rank, has_come), name="alive", daemon=True).start()
    asked = dict(os.environ) | start.environment
    check_interfaces(asked)
    os.environ.update(_interfaces(start.peers) | host_specific(os.environ) | start.environment)

    def open_store() -> Store:
        from aphro_core.worker.relayed_store import RelayedStore

        has_come.set()
        store = RelayedStore(channel.ask, start.config.distributed_timeout_seconds)
        if start.peers and start.address and start.local_rank == 0:
            variable = "GLOO_SOCKET_IFNAME" if start.config.device == "cpu" else "NCCL_SOCKET_IFNAME"
            check_paths(store, start.address, start.peers, asked, variable)
        return store

    entry.serve(channel, start, open_store, channel.fetch)


def _say_alive(channel: StdioChannel, rank: int, has_come: threading.Event) -> None:
    """An import from a slow file system takes longer than anybody would wait for a rank that hangs."""
    with suppress(ChannelClosedError):
        while not has_come.wait(_ALIVE_SECONDS):
            channel.send(WorkerAlive(rank))


def _interfaces(peers: list[str]) -> dict[str, str]:
    """The interface by which the other hosts are reached, for the collectives of CPUs and GPUs."""
    try:
        names = sorted({way_to(peer).interface for peer in peers} - {""})
    except OSError as error:
        raise AphroError(
            f"{socket.gethostname()} has no route to {', '.join(peers)}: {error.strerror or error}",
            hint="`ip route get ADDRESS` there; the hosts must reach each other by the names given to --hosts",
            exit_code=ExitCode.PLACEMENT,
        ) from error
    return {"GLOO_SOCKET_IFNAME": names[0], "NCCL_SOCKET_IFNAME": f"={names[0]}"} if names else {}


def _forward_lines(channel: StdioChannel, log: int, start: StartWorker) -> None:
    with open(log, encoding="utf-8", errors="replace") as lines, _open_log(start.log_file) as kept:
        for line in lines:
            with suppress(OSError):  # a full disk must not stop the rank
                kept.write(line)
                kept.flush()
            try:
                channel.send(WorkerLog(start.rank, line.rstrip("\n")))
            except ChannelClosedError:
                return


def _open_log(path: str) -> IO[str]:
    """What this rank printed in earlier starts stays, unless it has become too much."""
    try:
        is_large = Path(path).is_file() and Path(path).stat().st_size > _MAX_LOG_BYTES
        return open(path or os.devnull, "w" if is_large else "a", encoding="utf-8")
    except OSError:
        return open(os.devnull, "w", encoding="utf-8")


if __name__ == "__main__":
    main()
