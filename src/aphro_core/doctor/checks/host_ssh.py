"""Whether a host can be reached over ssh without a question."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.remote.local import LocalHost
from aphro_core.remote.remote import Host

ID: Final = "host.ssh"
TITLE: Final = "connection by ssh"
EXPLAIN: Final = """
Connects with the system's ssh client in batch mode, with your configuration, agent and known hosts, once a host; all
else goes over that connection. PASS when a command ran there; FAIL with ssh's own words when it did not: no key, an
unknown host key, no sshd, a wrong name, or a host that does not answer. SKIP for this host, which needs no ssh.
"""


async def check(host: Host) -> Finding:
    if isinstance(host, LocalHost):
        return Finding(ID, Status.SKIP, "this host needs no ssh")
    name = (await host.run("uname", "-n")).stdout.strip()
    evidence = (Evidence("uname -n", 0, name),)
    return Finding(ID, Status.PASS, f"connected to {name} at {host.address}", evidence=evidence)
