"""What this host's member of an aphro cluster has written about itself: read by whoever wants to use the cluster."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import msgspec

Role = Literal["head", "member"]
Resource = Literal["GPU", "aphro_slot"]  # what a rank asks Ray for: a GPU, or one slot of a host without

_RECORD: Final = "member.json"
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, kw_only=True)
class Membership:
    """This host's place in a cluster.

    ``head_address`` is "IP:port" of Ray's GCS, what ``ray.init(address=...)`` takes; ``control_port`` is where the
    member process of each host listens. ``token_path`` holds the cluster's token: RAY_AUTH_TOKEN_PATH, with
    RAY_AUTH_MODE=token.
    ``environment``: what was typed as ``-e`` for this node, those of the head first; it may hold secrets.
    ``started_at``: seconds since the epoch, for people. ``pid`` and ``pid_started`` (clock ticks after ``boot_id``)
    name the member process, which ends when the node leaves.
    """

    id: str
    role: Role
    head_address: str
    node_address: str
    control_port: int
    token_path: str
    temp_dir: str
    log_dir: str
    devices: int
    resource: Resource
    environment: dict[str, str]
    started_at: float
    pid: int
    pid_started: int
    boot_id: str

    @property
    def head(self) -> tuple[str, int]:
        """Address and port of ``head_address``."""
        host, _, port = self.head_address.rpartition(":")
        return host.strip("[]"), int(port)


def join_port(address: str, port: int) -> str:
    """``10.0.0.1:22420``, ``[fd00::1]:22420``."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def state_folder() -> Path:
    """Where this host keeps what it knows of its cluster: ``$XDG_STATE_HOME/aphro/cluster``."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "aphro" / "cluster"


def read_membership() -> Membership | None:
    """This host's membership, None unless its member process runs."""
    record = read_record()
    return record if record is not None and is_running(record) else None


def read_record() -> Membership | None:
    """What was written last, whether or not that member still runs; None where nothing (readable) was."""
    try:
        return msgspec.json.decode((state_folder() / _RECORD).read_bytes(), type=Membership)
    except (OSError, msgspec.MsgspecError):
        return None


def write_membership(membership: Membership) -> None:
    """Whole or not at all, and for this user's eyes alone."""
    folder = private_folder(state_folder())
    write_private(folder / _RECORD, msgspec.json.format(msgspec.json.encode(membership)))


def remove_membership() -> None:
    (state_folder() / _RECORD).unlink(missing_ok=True)


def is_running(membership: Membership) -> bool:
    """Whether its member process is that process, and not another one that got its number later."""
    return membership.boot_id == boot_id() and process_start(membership.pid) == membership.pid_started


def with_process(membership: Membership, pid: int) -> Membership:
    """The same, held by the process ``pid`` of this host."""
    return replace(membership, pid=pid, pid_started=process_start(pid), boot_id=boot_id())


def boot_id() -> str:
    """Changes when the host starts anew; "" where the kernel does not say."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def process_start(pid: int) -> int:
    """When a process started, in clock ticks after the boot; 0 if there is none, or only a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[19])


def private_folder(path: Path) -> Path:
    """A folder that only this user may enter, made if it is not there."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.chmod(0o700)
    return path


def write_private(path: Path, content: bytes) -> None:
    """Replace a file by one that is readable by this user alone from its first byte on."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.unlink(missing_ok=True)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    part.replace(path)
