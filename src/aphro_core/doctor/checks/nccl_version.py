"""Whether one NCCL library is in use, of an age that fits."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.environment import Variable, read_variables
from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.versions import read_versions
from aphro_core.remote.remote import Host

ID: Final = "nccl.version"
TITLE: Final = "NCCL's library"
EXPLAIN: Final = """
Reads the version of the NCCL package beside torch, and looks for a second library that a process would load instead
(LD_PRELOAD, or a libnccl.so.2 in a folder of LD_LIBRARY_PATH). PASS for one library; WARN for two: versions then differ
between hosts without anybody noticing; SKIP where torch is a CPU build. The live check prints the version in use.
"""


async def check(host: Host) -> Finding:
    versions = await read_versions(host)
    nccl, torch = versions.get("NCCL", ""), versions.get("torch", "")
    if not torch or torch.endswith("+cpu"):
        return Finding(ID, Status.SKIP, f"torch {torch or 'is not installed'}: no CUDA build, no NCCL")
    variables = await read_variables(host, "LD_PRELOAD", "LD_LIBRARY_PATH")
    preloaded = [path for path in _words(variables, "LD_PRELOAD") if "libnccl" in path]
    folders = [folder for folder in _words(variables, "LD_LIBRARY_PATH") if folder]
    found = list(await host.links(*(f"{folder}/libnccl.so.2" for folder in folders))) if folders else []
    others = [*preloaded, *found]
    title = f"NCCL {nccl} beside torch {torch}" if nccl else f"torch {torch}, with an NCCL of its own"
    if others:
        evidence = tuple(Evidence(path, 0, "would be loaded instead") for path in others)
        remedy = "unset LD_PRELOAD, and take that folder out of LD_LIBRARY_PATH"
        return Finding(ID, Status.WARN, f"{title}, and another: {', '.join(others)}", False, evidence, remedy)
    return Finding(ID, Status.PASS, title)


def _words(variables: dict[str, Variable], name: str) -> list[str]:
    return variables[name].value.replace(" ", ":").split(":") if name in variables else []
