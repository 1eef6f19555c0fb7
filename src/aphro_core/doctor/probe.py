"""Questions to a host that need Python there: a probe is a small program of ours that prints JSON and can be killed."""

from __future__ import annotations

from typing import Any

import msgspec

from aphro_core.errors import AphroError
from aphro_core.remote.remote import NOT_FOUND, Host
from aphro_core.remote.ssh import last_line


async def probe(host: Host, name: str, *arguments: str, timeout_seconds: float = 15.0) -> Any:
    """What ``probes/NAME.py`` prints on a host. Raises AphroError if aphro is not there, TimeoutError if it hangs."""
    argv = [host.python, "-m", f"aphro_core.doctor.probes.{name}", *arguments]
    output = await host.run(*argv, timeout_seconds=timeout_seconds)
    if output.returncode == NOT_FOUND or "No module named" in output.stderr:
        where = host.name or "this host"
        raise AphroError(
            f"aphro is not installed for {host.python} on {where}: {last_line(output.stderr)}",
            hint=f"make the same environment at the same path on {where}, or share it over a file system",
        )
    if output.returncode:
        raise AphroError(f"the probe {name} ended with code {output.returncode}: {last_line(output.stderr)}")
    return msgspec.json.decode(output.stdout)
