"""The support bundle: findings, versions, settings and logs of all nodes in one file, and no secret in it."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final

from aphro_core.doctor.log_files import open_log
from aphro_core.errors import UsageError
from aphro_core.remote.remote import Host, HostUnreachableError
from aphro_core.remote.ssh import open_host

_MAX_LOG_BYTES: Final = 16 << 20  # of each log: its beginning holds the set-up, its end the failure
_COMMANDS: Final[Mapping[str, tuple[str, ...]]] = {
    "uname.txt": ("uname", "-a"),
    "nvidia-smi.txt": ("nvidia-smi",),
    "nvidia-smi-topo.txt": ("nvidia-smi", "topo", "-m"),
    "ip-addr.txt": ("ip", "-br", "addr"),
    "ibv_devinfo.txt": ("ibv_devinfo",),
    "df-shm.txt": ("df", "-h", "/dev/shm"),
    "devices.txt": ("ls", "-l", "/dev/shm", "/dev/infiniband"),
    "dmesg.txt": ("dmesg", "--level", "emerg,alert,crit,err,warn"),
    "ulimit.txt": ("cat", "/proc/self/limits"),
    "env.txt": ("env",),
}
_VERSIONS: Final = """
import json, platform, sys
from importlib import metadata
names = ("aphro", "torch", "triton", "transformers", "nvidia-nccl-cu12", "nvidia-nccl-cu13")
found = {d.metadata["Name"]: d.version for d in metadata.distributions() if d.metadata["Name"] in names}
print(json.dumps({"python": sys.version, "platform": platform.platform(), **found}))
"""
_SETTINGS: Final = re.compile(r"(?:NCCL|RCCL|GLOO|CUDA|TORCH|OMP|APHRO|FI|OFI|UCX|LD|MASTER|RANK|WORLD|LOCAL)(?:_|$)")
_SECRET_NAME: Final = re.compile(r"token|secret|passw|api_?key|access_?key|credential|auth", re.IGNORECASE)
_SECRETS: Final = (
    re.compile(r"(?i)\b((?:[\w-]{0,64}(?:token(?!s)|secret|passw(?:or)?d|api[_-]?key|access[_-]?key|credential)[\w-]{0,64})"
               r"[\"']?\s*[=:]\s*[\"']?)[^\s\"',;]+"),
    re.compile(r"(?i)(--[\w-]{0,64}(?:token(?!s)|secret|password|api-key)[\w-]{0,64}\s+)[^\s-]\S*"),
    re.compile(r"(?i)(authorization:\s*(?:bearer|basic)\s+)\S+"),
    re.compile(r"(://[^/\s:@]+:)[^/\s@]+(?=@)"),
    re.compile(r"()\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16})\b"),
)  # fmt: skip


def redact(text: str) -> str:
    """The text with every value that looks like a secret replaced."""
    for secret in _SECRETS:
        text = secret.sub(r"\1[removed]", text)
    return text


def _redact_strings(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: _redact_strings(entry) for key, entry in value.items()}
    return [_redact_strings(entry) for entry in value] if isinstance(value, (list, tuple)) else value


async def write_bundle(path: str, report: Mapping[str, Any], logs: Sequence[str], hosts: Sequence[str]) -> None:
    """Write a .tgz: report.json, a folder a host, logs/. Raises UsageError where it cannot be written."""
    try:
        with tarfile.open(path, "w:gz") as bundle:
            _add(bundle, "report.json", json.dumps(_redact_strings(report), indent=2))
            for name in hosts or [""]:
                async for file, text in _ask_host(name):
                    _add(bundle, f"hosts/{_safe(name) or 'this-host'}/{file}", redact(text))
            for number, log in enumerate(logs):
                with open_log(log) as (stream, _):
                    _add(bundle, f"logs/{number:02}-{_safe(Path(log).name)}", _read_redacted(stream))
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"--bundle: cannot write {path}: {reason}", hint="a file in a folder that exists") from error


async def _ask_host(name: str) -> AsyncIterator[tuple[str, str]]:
    """Files of one host: what its commands print; why, where it cannot be reached."""
    try:
        async with open_host(name) as host:
            yield "versions.json", (await _run(host, host.python, "-c", _VERSIONS))
            for file, command in _COMMANDS.items():
                text = await _run(host, *command)
                yield file, "\n".join(_settings(text.splitlines())) if file == "env.txt" else text
    except HostUnreachableError as error:
        yield "unreachable.txt", error.message


async def _run(host: Host, *command: str) -> str:
    try:
        output = await host.run(*command)
    except TimeoutError:
        return f"{command[0]}: no answer\n"
    return output.stdout + output.stderr


def _settings(lines: Iterable[str]) -> Iterator[str]:
    """Of the environment only what concerns communication, and of that no secret."""
    for line in lines:
        name = line.partition("=")[0]
        if _SETTINGS.match(name):
            yield f"{name}=[removed]" if _SECRET_NAME.search(name) else line


def _read_redacted(stream: IO[bytes]) -> str:
    """The whole log, or its first and last part."""
    half = _MAX_LOG_BYTES // 2
    first = stream.read(half)
    last, left_out = b"", 0
    while block := stream.read(1 << 20):
        last += block
        if len(last) > 2 * half:
            left_out += len(last) - half
            last = last[-half:]
    cut = f"\n[{left_out} bytes left out]\n".encode() if left_out else b""
    return redact((first + cut + last).decode("utf-8", "replace"))


def _add(bundle: tarfile.TarFile, name: str, text: str) -> None:
    data = text.encode()
    info = tarfile.TarInfo(f"aphro-doctor/{name}")
    info.size = len(data)
    info.mode = 0o600
    bundle.addfile(info, io.BytesIO(data))


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)
