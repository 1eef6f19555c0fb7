"""The member process from its first line: it takes a plan, gets the node in or says why not, and holds it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import traceback
import uuid
from contextlib import suppress
from typing import Final, NoReturn

import msgspec

from aphro_core.cluster.member import Member, clean_files
from aphro_core.cluster.membership import Membership, join_port, state_folder, with_process
from aphro_core.cluster.plan import Failed, Plan, Progress, Ready, Said
from aphro_core.cluster.ports import Layout
from aphro_core.cluster.processes import end_processes
from aphro_core.cluster.token import token_path
from aphro_core.errors import AphroError, ClusterError
from aphro_core.lifeline import name_process

_PR_SET_CHILD_SUBREAPER: Final = 36


def _interrupt(number: int, frame: object) -> NoReturn:
    raise ClusterError("interrupted before the node was in")


def _log(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _say(text: str, is_warning: bool) -> None:
    _log(text)
    _tell(Said(text, is_warning))


def _tell(progress: Progress) -> None:
    """The command that waits for us; where it is gone (Ctrl-C), so are we."""
    os.write(sys.stdout.fileno(), msgspec.json.encode(progress) + b"\n")


def membership_of(plan: Plan) -> Membership:
    id = uuid.uuid4().hex[:12]
    blank = Membership(
        id=id,
        role=plan.role,
        head_address=join_port(plan.head, plan.head_port),
        node_address=plan.address,
        control_port=Layout(plan.head_port).control,
        token_path=str(token_path()),
        temp_dir=f"/tmp/aphro-{id}",
        log_dir=str(state_folder() / "logs"),
        devices=plan.devices,
        resource=plan.resource,
        environment=plan.environment,
        started_at=time.time(),
        pid=0,
        pid_started=0,
        boot_id="",
    )
    return with_process(blank, os.getpid())


def main() -> None:
    """``python -m aphro_core.cluster.entry``: Plan on standard input, Progress on standard output, log on stderr."""
    started = time.monotonic()
    plan = msgspec.json.decode(sys.stdin.buffer.read(), type=Plan)
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # a closed terminal changes nothing; what we start has its own ways
    signal.signal(signal.SIGTERM, _interrupt)
    name_process("aphro-member")
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    membership = membership_of(plan)
    member = Member(plan, membership, _say, _log)
    try:
        member.start()
        _log(f"in after {time.monotonic() - started:.1f} s")
        _tell(Ready(time.monotonic() - started))
    except Exception as error:  # whatever it is, nothing of this node may be left
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this is the end already
        _log(f"not in: {error}" if isinstance(error, AphroError) else traceback.format_exc())
        end_processes(membership)
        clean_files(membership)
        code = error.exit_code if isinstance(error, AphroError) else 1
        with suppress(OSError):
            _tell(Failed(str(error) or type(error).__name__, getattr(error, "hint", None) or "", code))
        sys.exit(code)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(nothing, descriptor)
    member.run()


if __name__ == "__main__":
    main()
