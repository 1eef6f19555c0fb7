"""Whether processes can load the verbs library and a provider for the cards."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.probe import probe
from aphro_core.doctor.rdma import NO_RDMA, natural, read_devices
from aphro_core.remote.remote import Host

ID: Final = "ib.library"
TITLE: Final = "verbs library"
EXPLAIN: Final = """
Loads libibverbs.so.1 as NCCL does, and looks for the provider of the cards (libmlx5, libefa, libirdma). PASS with both;
WARN when the provider is missing; FAIL when the library is: NCCL then says "Failed to open libibverbs.so" and uses TCP.
In a container it has to be in the image. SKIP without RDMA devices.
"""
_REMEDY: Final = (
    "in the image: apt-get install libibverbs1 ibverbs-providers rdma-core, or dnf install libibverbs rdma-core"
)


async def check(host: Host) -> Finding:
    devices = await read_devices(host)
    if not devices:
        return Finding(ID, Status.SKIP, NO_RDMA)
    said = await probe(host, "rdma")
    if said["library_error"]:
        evidence = (Evidence("dlopen libibverbs.so.1", 0, said["library_error"]),)
        return Finding(ID, Status.FAIL, "libibverbs.so.1 cannot be loaded", True, evidence, _REMEDY)
    kinds = sorted({natural(device.name)[0].rstrip("_") for device in devices})
    missing = [kind for kind in kinds if kind in ("mlx5", "efa", "irdma", "mlx4") and kind not in said["providers"]]
    evidence = (Evidence("libibverbs/", 0, f"providers: {', '.join(said['providers']) or 'none'}"),)
    if missing:
        return Finding(ID, Status.WARN, f"no provider for {', '.join(missing)} was found", False, evidence, _REMEDY)
    return Finding(ID, Status.PASS, "libibverbs.so.1 and its providers are there", evidence=evidence)
