"""The variables that steer NCCL, Gloo and CUDA on a host, and where each comes from: the environment or a conf file."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Final

from aphro_core.remote.remote import Host

_SYSTEM_CONF: Final = "/etc/nccl.conf"


@dataclass(frozen=True)
class Variable:
    """``file`` and ``line`` say where it was set: "env" for the environment of a process started there."""

    name: str
    value: str
    file: str = "env"
    line: int = 0


async def read_variables(host: Host, *patterns: str) -> dict[str, Variable]:
    """Name -> variable, of those whose names match. NCCL reads its conf files for what the environment does not set."""
    output = await host.run("env", "-0")
    found = dict(
        (name, Variable(name, value))
        for name, _, value in (entry.partition("=") for entry in output.stdout.split("\0"))
        if name
    )
    home = found["HOME"].value if "HOME" in found else "/root"
    user_conf = found["NCCL_CONF_FILE"].value if "NCCL_CONF_FILE" in found else f"{home}/.nccl.conf"
    for path, text in (await host.files(user_conf, _SYSTEM_CONF)).items():
        for number, line in enumerate(text.splitlines(), 1):
            name, equals, value = line.partition("#")[0].strip().partition("=")
            if equals and name.strip() not in found:
                found[name.strip()] = Variable(name.strip(), value.strip(), path, number)
    return {name: found[name] for name in found if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}
