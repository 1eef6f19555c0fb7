"""The command's side of a start: the member process is begun apart from the terminal, and followed until it is in."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from aphro_core.cluster.membership import private_folder, state_folder
from aphro_core.cluster.plan import Failed, Plan, Progress, Ready, Said
from aphro_core.errors import AphroError, ClusterError, ExitCode, UsageError
from aphro_core.reporter import Reporter

_END_SECONDS: Final = 30.0


def start_member(plan: Plan, reporter: Reporter) -> None:
    """Returns when the node is in. Raises AphroError when it could not get in; nothing runs then."""
    logs = _empty_logs()
    with (logs / "member.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "aphro_core.cluster.entry"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd="/",
            start_new_session=True,  # no terminal's hang-up reaches it
        )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(msgspec.json.encode(plan))
    process.stdin.close()
    try:
        for line in process.stdout:
            if _report(msgspec.json.decode(line, type=Progress), reporter):
                return
    except AphroError:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_SECONDS)  # it has said why, and ends
        raise
    except KeyboardInterrupt:
        process.send_signal(signal.SIGTERM)
        process.wait(_END_SECONDS)  # it ends what it has started
        raise
    code = process.wait()
    raise ClusterError(f"the member process ended with code {code}", hint=f"look into {logs / 'member.log'}")


def _empty_logs() -> Path:
    try:
        logs = private_folder(state_folder() / "logs")
        for old in logs.glob("*.log"):
            old.unlink()
    except OSError as error:
        hint = "a folder that you may write to: export XDG_STATE_HOME=DIR"
        raise UsageError(f"{state_folder()}: {error.strerror}", hint=hint) from None
    return logs


def _report(progress: Progress, reporter: Reporter) -> bool:
    """Whether the node is in. Raises AphroError where it failed."""
    match progress:
        case Said(text=text, is_warning=is_warning):
            reporter.line(f"warning: {text}" if is_warning else text)
        case Failed(message=message, hint=hint, exit_code=code):
            raise AphroError(message, hint=hint or None, exit_code=ExitCode(code))
        case Ready():
            return True
    return False
