"""Run on a host: what the driver's management library (NVML) says of its GPUs. JSON; may hang where the driver does."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from typing import Any, Final

import pynvml

from aphro_core.host import sign_of_mps
from aphro_core.lifeline import die_with_parent

# NVML_TOPOLOGY_*: what two GPUs have in common, as `nvidia-smi topo -m` writes it
_LEVELS: Final = {0: "SELF", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}
# nvmlClocksEventReasons: those that mean the hardware holds the GPU back
_THROTTLE: Final = {0x8: "hardware slowdown", 0x20: "software thermal slowdown", 0x40: "hardware thermal slowdown",
                    0x80: "power brake"}  # fmt: skip
_P2P: Final = {"read": 0, "write": 1, "nvlink": 2}  # NVML_P2P_CAPS_INDEX_*: in some bindings READ is a tuple
_POWER_CAP: Final = 0x4


def ask(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of NVML answers, None where this GPU or driver does not support the question."""
    try:
        return function(*arguments)
    except (pynvml.NVMLError, AttributeError, ctypes.ArgumentError):  # the latter: a binding of another age
        return None


def text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def processes(gpu: Any) -> list[dict[str, Any]]:
    found = ask(pynvml.nvmlDeviceGetComputeRunningProcesses, gpu) or []
    return [{"pid": entry.pid, "bytes": entry.usedGpuMemory or 0} for entry in found]


def ecc(gpu: Any) -> dict[str, int | None]:
    """Errors since the driver was loaded (volatile) and since ever (aggregate)."""
    kinds = {"corrected": pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED,
             "uncorrected": pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED}  # fmt: skip
    spans = {"volatile": pynvml.NVML_VOLATILE_ECC, "aggregate": pynvml.NVML_AGGREGATE_ECC}
    return {
        f"{kind}_{span}": ask(pynvml.nvmlDeviceGetTotalEccErrors, gpu, kind_value, span_value)
        for kind, kind_value in kinds.items()
        for span, span_value in spans.items()
    }


class FabricInfo(ctypes.Structure):
    """nvmlGpuFabricInfo_t as nvml.h has it: some releases of the binding give the UUID another size."""

    _fields_ = (
        ("clusterUuid", ctypes.c_ubyte * 16),
        ("status", ctypes.c_int),
        ("cliqueId", ctypes.c_uint),
        ("state", ctypes.c_ubyte),
    )


def fabric(gpu: Any) -> dict[str, Any] | None:
    """State 3 is completed, status 0 success; state 0 means that this GPU has no fabric."""
    info = FabricInfo()
    if ask(pynvml.nvmlDeviceGetGpuFabricInfo, gpu, ctypes.byref(info)) is None:
        return None
    return {"state": info.state, "status": info.status, "clique": info.cliqueId, "uuid": bytes(info.clusterUuid).hex()}


def num_links(gpu: Any, other_bus_id: str | None = None) -> int:
    """NVLinks that are up, to a GPU or to whatever they lead."""
    count = 0
    for link in range(getattr(pynvml, "NVML_NVLINK_MAX_LINKS", 18)):
        if not ask(pynvml.nvmlDeviceGetNvLinkState, gpu, link):
            continue
        remote = ask(pynvml.nvmlDeviceGetNvLinkRemotePciInfo, gpu, link)
        count += other_bus_id is None or (remote is not None and text(remote.busId).lower() == other_bus_id.lower())
    return count


def describe(index: int, gpu: Any) -> dict[str, Any]:
    memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
    reasons = ask(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, gpu) or 0
    remapped = ask(pynvml.nvmlDeviceGetRemappedRows, gpu)
    return {
        "index": index,
        "name": text(pynvml.nvmlDeviceGetName(gpu)),
        "uuid": text(pynvml.nvmlDeviceGetUUID(gpu)),
        "bus_id": text(pynvml.nvmlDeviceGetPciInfo(gpu).busId),
        "capability": list(ask(pynvml.nvmlDeviceGetCudaComputeCapability, gpu) or (0, 0)),
        "total_bytes": memory.total,
        "used_bytes": memory.used,
        "persistence": ask(pynvml.nvmlDeviceGetPersistenceMode, gpu),
        "throttling": [name for bit, name in _THROTTLE.items() if reasons & bit],
        "is_power_capped": bool(reasons & _POWER_CAP),
        "temperature": ask(pynvml.nvmlDeviceGetTemperature, gpu, pynvml.NVML_TEMPERATURE_GPU),
        "ecc": ecc(gpu),
        "remapped": list(remapped) if remapped is not None else None,  # corrected, uncorrected, pending, failed
        "processes": processes(gpu),
        "fabric": fabric(gpu),
        "num_nvlinks": num_links(gpu),
    }


def relate(first: Any, second: Any) -> dict[str, Any]:
    """How two GPUs are joined: PCIe level, direct NVLinks, and whether the driver allows peer reads and writes."""
    p2p = {name: ask(pynvml.nvmlDeviceGetP2PStatus, first, second, index) for name, index in _P2P.items()}
    level = ask(pynvml.nvmlDeviceGetTopologyCommonAncestor, first, second)
    links = num_links(first, text(pynvml.nvmlDeviceGetPciInfo(second).busId))
    return {"level": _LEVELS.get(level, "unknown"), "num_nvlinks": links,
            "p2p": {name: status == 0 for name, status in p2p.items() if status is not None}}  # fmt: skip


def everything() -> dict[str, Any]:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return {"error": str(error)}
    gpus = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    return {
        "driver": text(pynvml.nvmlSystemGetDriverVersion()),
        "cuda": ask(pynvml.nvmlSystemGetCudaDriverVersion_v2),
        "gpus": [describe(index, gpu) for index, gpu in enumerate(gpus)],
        "mps": sign_of_mps(),
        "pairs": [{"first": a, "second": b, **relate(gpus[a], gpus[b])} for b in range(len(gpus)) for a in range(b)],
    }


if __name__ == "__main__":
    die_with_parent()
    print(json.dumps(everything()))
