"""One rank of the live check, a process of its own: joins groups as it is told, verifies the sums and times them."""

from __future__ import annotations

import os
import queue
import re
import socket
import sys
import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import msgspec

from aphro_core.doctor.live.protocol import (
    FromRank,
    Measure,
    Measured,
    Ping,
    Pong,
    RankFailed,
    RankLog,
    SendLog,
    Started,
    StartRank,
    ToRank,
)
from aphro_core.lifeline import die_with_parent

if TYPE_CHECKING:
    from aphro_core.doctor.live.collectives import Collectives

_MAX_LOG_BYTES: Final = 8 << 20
_SUBSYSTEMS: Final = "INIT,ENV,NET,GRAPH,BOOTSTRAP"


class Mouth:
    """The line to the driver, and what this rank is doing right now. Both threads speak through it."""

    def __init__(self) -> None:
        # whatever libraries print to standard output must not get between the lines
        self._fd = os.dup(1)
        os.dup2(2, 1)
        self._lock = threading.Lock()
        self.during = "starting"

    def say(self, message: FromRank) -> None:
        line = msgspec.json.encode(message) + b"\n"
        with self._lock:
            while line:
                line = line[os.write(self._fd, line) :]


def main() -> None:
    die_with_parent()
    mouth, inbox, log_fd = Mouth(), queue.Queue[ToRank](), _capture_nccl()
    threading.Thread(target=_listen, args=(mouth, inbox, log_fd), daemon=True).start()
    start = inbox.get()
    assert isinstance(start, StartRank)
    try:
        store = _listen_for_store(start.store_address)
        mouth.during = "importing torch"
        from aphro_core.doctor.live.collectives import Collectives  # torch: only here, and only now

        mouth.during = f"preparing {start.device}"
        _choose_interface(start.interface)
        collectives = Collectives(start.device, timedelta(seconds=start.limit_seconds), store)
        mouth.say(
            Started(
                store_port=collectives.store_port,
                torch=collectives.torch_version,
                nccl=collectives.nccl_version,
                device_name=collectives.device_name,
                socket_interface=_socket_interface(start.device),
            )
        )
        while True:
            message = inbox.get()
            if isinstance(message, Measure):
                mouth.say(_measure(collectives, message, mouth))
    except Exception as error:
        mouth.say(RankFailed(mouth.during, _first_words(error)))
        sys.stdin.buffer.read()  # the driver may still want the log


def _measure(collectives: Collectives, message: Measure, mouth: Mouth) -> Measured | RankFailed:
    mouth.during = f"reaching the store at {message.store_address} port {message.store_port}"
    try:
        collectives.reach(message.store_address, message.store_port)
        mouth.during = f"joining group {message.group}"
        with collectives.joined(message) as group:
            timings = []
            for work in message.works:
                mouth.during = f"in {work.kind.replace('_', '-')} of {work.num_bytes} bytes, group {message.group}"
                timings.append(group.measure(work))
            return Measured(timings)
    except Exception as error:
        return RankFailed(mouth.during, _first_words(error))
    finally:
        mouth.during = "waiting for work"


def _listen(mouth: Mouth, inbox: queue.Queue[ToRank], log_fd: int) -> None:
    """Take the driver's lines. When they end, so does this process, wherever its main thread is."""
    decoder = msgspec.json.Decoder(ToRank)
    for line in sys.stdin.buffer:
        message: ToRank = decoder.decode(line)
        if isinstance(message, Ping):
            mouth.say(Pong(mouth.during))
        elif isinstance(message, SendLog):
            size = os.fstat(log_fd).st_size
            text = os.pread(log_fd, _MAX_LOG_BYTES, max(0, size - _MAX_LOG_BYTES))
            mouth.say(RankLog(text.decode(errors="replace")))
        else:
            inbox.put(message)
    os._exit(0)


def _capture_nccl() -> int:
    """NCCL writes its log into memory that has no name: private, and gone with the process."""
    log_fd = os.memfd_create("aphro-nccl-log")
    os.environ |= {
        "NCCL_DEBUG": "INFO",
        "NCCL_DEBUG_SUBSYS": _SUBSYSTEMS,
        "NCCL_DEBUG_FILE": f"/proc/{os.getpid()}/fd/{log_fd}",
    }
    return log_fd


def _choose_interface(interface: str | None) -> None:
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")


def _socket_interface(device: str) -> str:
    return os.environ.get("GLOO_SOCKET_IFNAME" if device == "cpu" else "NCCL_SOCKET_IFNAME", "")


def _listen_for_store(address: str | None) -> socket.socket | None:
    """TCPStore by itself would listen on every interface: it gets a socket that is bound to the chosen address."""
    if address is None:
        return None
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind((address, 0))
    listener.listen(512)
    return listener


def _first_words(error: Exception) -> str:
    """The message without the C++ around it: gloo's source line and condition before, torch's stack behind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    words = re.sub(r"^\[(?:enforce fail at )?/[^]]*\] (?:[^.]*\. )?", "", lines[0]) if lines else ""
    return (words or type(error).__name__)[:500]


if __name__ == "__main__":
    main()
