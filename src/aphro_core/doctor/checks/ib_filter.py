"""Which RDMA ports NCCL_IB_HCA leaves over."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.hca_filter import MAX_DEVICES, surprises
from aphro_core.doctor.rdma import NO_RDMA, read_devices, read_selected
from aphro_core.remote.remote import Host

ID: Final = "ib.filter"
TITLE: Final = "NCCL_IB_HCA"
EXPLAIN: Final = """
Applies NCCL_IB_HCA as NCCL does: prefixes unless it begins with =, all but these with ^, :PORT optional. PASS when it
selects ACTIVE ports or is not set; WARN when a prefix takes more than was meant (mlx5_1 takes mlx5_10 too) or when more
than 32 devices remain; FAIL when it selects no ACTIVE port: NCCL then uses TCP.
"""


async def check(host: Host) -> Finding:
    devices = await read_devices(host)
    if not devices:
        return Finding(ID, Status.SKIP, NO_RDMA)
    ports, variable = await read_selected(host)
    names = [port.label for port in ports]
    active = [port.label for device in devices for port in device.ports if port.is_active]
    exact = f"export NCCL_IB_HCA=={','.join(active[:MAX_DEVICES])}"
    if len(ports) > MAX_DEVICES:
        return Finding(ID, Status.WARN, f"{len(ports)} ports, NCCL takes the first {MAX_DEVICES}", remedy=exact)
    if variable is None:
        return Finding(ID, Status.PASS, f"not set: NCCL takes {', '.join(names) or 'no port, none is ACTIVE'}")
    evidence = (Evidence(variable.file, variable.line, f"NCCL_IB_HCA={variable.value}"),)
    if not ports:
        title = f"NCCL_IB_HCA={variable.value} selects no ACTIVE port"
        return Finding(ID, Status.FAIL, title, True, evidence, exact if active else "unset NCCL_IB_HCA")
    more = surprises(variable.value, [device.name for device in devices])
    if more:
        title = f"NCCL_IB_HCA={variable.value} takes {', '.join(more)} too: it names prefixes"
        return Finding(ID, Status.WARN, title, False, evidence, f"export NCCL_IB_HCA=={variable.value}")
    return Finding(ID, Status.PASS, f"NCCL takes {', '.join(names)}", evidence=evidence)
