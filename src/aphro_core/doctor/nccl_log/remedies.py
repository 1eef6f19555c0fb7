"""What to type: the topic's lines, led by what this log's own facts single out."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from aphro_core.doctor.nccl_log.facts import LogFacts
from aphro_core.doctor.nccl_log.reasons import forced_choices, rdma_switched_off
from aphro_core.doctor.nccl_log.topics import TOPICS

_VERSION_WITH_GDR_CHECK: Final = (2, 23, 4)
_VERSION_WITH_AUTO_GID: Final = (2, 21, 0)


_ON_AMD: Final = {  # instead of NVIDIA's tools
    "log.cuda": "amd-smi list; rocminfo   # driver and ROCm of one release, equal on all nodes\n"
    "# AMD_LOG_LEVEL=3 and HIP_LAUNCH_BLOCKING=1 find the program's own error",
    "log.cuda-memory": "amd-smi process   # who holds the memory; lower --gpu-memory-utilization, or NCCL_BUFFSIZE",
    "log.p2p-denied": "rocm-smi --showtopoaccess; grep -o iommu=pt /proc/cmdline\n"
    "export NCCL_P2P_DISABLE=1   # goes on through host memory; then look at containers (--ipc=host), ACS and IOMMU",
}


def remedy_for(id: str, facts: LogFacts) -> str:
    """Lines to paste; those that begin with # say when or why."""
    special = _SPECIAL.get(id)
    topic = TOPICS[id].remedy
    ports = _ib_ports(facts)
    named = next(iter(ports.values()), _blamed_hcas(facts, id))
    if named and id.startswith("log.ib-"):
        topic = topic.replace("mlx5_0,mlx5_1", ",".join(named[:8])).replace("mlx5_0", named[0])
    if id in _ON_AMD and is_rccl(facts):
        topic = _ON_AMD[id]
    lines = [*(special(facts) if special else ()), *topic.splitlines()]
    return "\n".join(dict.fromkeys(lines))


def _blamed_hcas(facts: LogFacts, id: str) -> list[str]:
    """The NICs that NCCL 2.22 on names in an error."""
    found = [re.search(r"\bhca (\w+)", note.first.record.text) for note in facts.all_notes(id)]
    return list(dict.fromkeys(match[1] for match in found if match))


def version_of(facts: LogFacts) -> tuple[int, ...]:
    """The oldest NCCL version that the log shows; () if none."""
    versions = [tuple(map(int, re.findall(r"\d+", note.value)[:3])) for note in facts.all_notes("version")]
    return min(versions, default=())


def _sockets(facts: LogFacts) -> list[str]:
    lines = [f"unset {name}" for name in rdma_switched_off(facts)]
    if facts.first("no-verbs"):
        lines += [
            "apt-get install -y libibverbs1 ibverbs-providers rdma-core   # in the image: the library is missing",
            "docker run --device /dev/infiniband --cap-add IPC_LOCK --ulimit memlock=-1 --network host ...",
        ]
    if facts.first("log.no-plugin-start", "platform", "provider"):
        lines += [
            "fi_info -p efa   # inside the container: lists the EFA devices",
            "docker run --device /dev/infiniband/uverbs0 ...   # one --device for each EFA device",
        ]
    elif (is_rccl(facts) and not lines) or any("hsn" in note.value for note in facts.all_notes("interfaces")):
        lines += ['export NCCL_NET="AWS Libfabric"   # Slingshot: with aws-ofi-nccl (aws-ofi-rccl) on LD_LIBRARY_PATH']
    if is_rccl(facts):
        lines += ["export NCCL_DMABUF_ENABLE=1   # RCCL: GPUDirect over DMA-BUF is off unless asked for"]
    if facts.first("no-device") and not lines:
        lines += ["ibv_devinfo | grep -e hca_id -e state   # an ACTIVE port; in containers --device /dev/infiniband"]
    return lines


def is_rccl(facts: LogFacts) -> bool:
    """RCCL says so, is built as it is, or puts the communicator behind its Channel lines."""
    causes = [note for id in _ON_AMD for note in facts.all_notes(id)]
    if facts.first("rccl") or any("HIP failure" in note.first.raw or "/hipify/" in note.first.raw for note in causes):
        return True
    return any(" nRanks " in pair.first.raw for pair in facts.pairs.values())


def _no_gdr(facts: LogFacts) -> list[str]:
    level = facts.environment("NCCL_NET_GDR_LEVEL")
    lines = (
        ["unset NCCL_NET_GDR_LEVEL   # LOC switches GPUDirect off"]
        if level and level.value.endswith(("=LOC", "=0"))
        else []
    )
    version = version_of(facts)
    if facts.first("gdr-off") and (not version or version < _VERSION_WITH_GDR_CHECK):
        lines += [
            "cat /sys/module/nvidia_peermem/version   # loaded? Then upgrade: NCCL before 2.23.4 does not see it there"
        ]
    if facts.first("ofi-no-gdr"):
        lines += [
            "fi_info --version   # EFA: update the EFA installer (libfabric); some instance types have no GPUDirect"
        ]
    if facts.first("gdr-far"):
        lines += [
            "nvidia-smi topo -m   # the GPU is far from the NIC: PIX or PXB is wanted; NCCL_NET_GDR_LEVEL=PHB to try"
        ]
    return lines


def _address(facts: LogFacts, *ids: str) -> str:
    for id in ids:
        for note in facts.all_notes(id):
            found = re.search(r"\b(\d{1,3}(?:\.\d{1,3}){3})\b(?:<(\d+)>)?", note.value)
            if found:
                return f"{found[1]} {found[2] or 'PORT'}"
    return ""


def _reach(facts: LogFacts) -> list[str]:
    peer = _address(facts, "log.no-route", "log.tcp-timeout", "log.refused", "log.connect")
    return [f"ip route get {peer.split()[0]}; nc -vz {peer}   # on the node that reports it"] if peer else []


def _interface(facts: LogFacts) -> list[str]:
    named = facts.environment("NCCL_SOCKET_IFNAME")
    return [f"ip -br addr   # {named.value} matches no interface of this host"] if named else []


def _ib_ports(facts: LogFacts) -> dict[str, list[str]]:
    ports: dict[str, list[str]] = {}
    for note in facts.all_notes("ports"):
        for name, layer in re.findall(r"\[\d+\](\S+?):\d+/(IB|RoCE)", note.value):
            if name not in ports.setdefault(layer, []):
                ports[layer].append(name)
    return ports


def _one_fabric(facts: LogFacts) -> list[str]:
    ports = _ib_ports(facts)
    if len(ports) < 2:
        return []
    return [
        f"export NCCL_IB_HCA=={','.join(ports['IB'][:16])}   # InfiniBand and RoCE ports are mixed: keep one fabric"
    ]


def _roce(facts: LogFacts) -> list[str]:
    """Peers that do not answer: one fabric, then the GID; the topic goes on with the path between them."""
    lines = _one_fabric(facts)
    texts = [note.first.record.text for id in ("log.ib-timeout", "log.ib-rail") for note in facts.all_notes(id)]
    if any(re.search(r"local ?Gid:? fe80:", text, re.IGNORECASE) for text in texts):
        hca = next(iter(_blamed_hcas(facts, "log.ib-timeout")), "HCA")
        lines += [f"export NCCL_IB_HCA=^={hca}   # its GID is link-local: give the port an address, or leave it out"]
    gid = facts.environment("NCCL_IB_GID_INDEX")
    version = version_of(facts)
    if gid and version >= _VERSION_WITH_AUTO_GID:
        lines += [f"unset NCCL_IB_GID_INDEX   # {gid.value}; NCCL 2.21 and later choose it themselves"]
    elif any(re.search(r"local ?Gid:? ::ffff:", text, re.IGNORECASE) for text in texts):
        return lines  # RoCE with an IPv4 address already
    elif "RoCE" in _ib_ports(facts) or not _ib_ports(facts):
        lines += ["show_gids; export NCCL_IB_GID_INDEX=3   # RoCE: the RoCE v2 IPv4 index; NCCL 2.21 chooses it"]
    return lines


def _shm(facts: LogFacts) -> list[str]:
    disabled, level = facts.environment("NCCL_P2P_DISABLE"), facts.environment("NCCL_P2P_LEVEL")
    lines = ["unset NCCL_P2P_DISABLE"] if disabled and disabled.value.endswith("=1") else []
    return lines + ([f"unset NCCL_P2P_LEVEL   # {level.value} forbids P2P over PCIe"] if level else [])


def _p2p_denied(facts: LogFacts) -> list[str]:
    is_in_shm = any("shm" in note.first.record.where for note in facts.all_notes("log.p2p-denied"))
    return ["export NCCL_CUMEM_HOST_ENABLE=0   # host memory is shared through /dev/shm instead"] if is_in_shm else []


def _wrong_peer(facts: LogFacts) -> list[str]:
    if not any("it says" in note.value for note in facts.all_notes("log.wrong-peer")):
        return []
    return [
        "sysctl net.ipv4.ip_local_port_range   # keep monitors, scanners and proxies off these ports of the nodes",
    ]


def _register(facts: LogFacts) -> list[str]:
    is_dmabuf = any("dmabuf" in note.first.record.text.lower() for note in facts.all_notes("log.ib-register"))
    return ["export NCCL_DMABUF_ENABLE=0   # the NIC's driver cannot: nvidia_peermem is used"] if is_dmabuf else []


_OF_CUDA: Final = (
    ("version is insufficient|not supported in the installed|unsupported PTX|forward compat",
     "# the driver is older than the CUDA of this NCCL: update it, or install torch for an older CUDA"),
    ("named symbol not found|no kernel image|invalid device function",
     "# this NCCL was not built for this GPU: a newer one, or build it with NVCC_GENCODE for the GPU's capability"),
    ("busy or unavailable",
     "nvidia-smi -q -d COMPUTE   # Exclusive_Process: one process a GPU; MIG: an instance for each process"),
    ("invalid device ordinal",
     "echo $CUDA_VISIBLE_DEVICES   # fewer GPUs are visible than local ranks; containers: --gpus all"),
    ("unsupported display driver",
     "# libcuda.so is of another driver: take cuda-compat out of LD_LIBRARY_PATH, or reboot after an update"),
    ("initialization error", "# CUDA was used before a fork: start workers by spawn; does nvidia-smi answer?"),
    ("stub library", "# libcuda.so is the stub for linking: take .../stubs out of LD_LIBRARY_PATH"),
    ("illegal memory access|launch failure|misaligned|device-side assert",
     "CUDA_LAUNCH_BLOCKING=1 ...   # the program's own kernel failed before; NCCL only met the error"),
)  # fmt: skip


def _cuda(facts: LogFacts) -> list[str]:
    said = " ".join(note.value for note in facts.all_notes("log.cuda"))
    return [line for words, line in _OF_CUDA if re.search(words, said, re.IGNORECASE)]


def _nvls(facts: LogFacts) -> list[str]:
    if not any("out of memory" in note.value for note in facts.all_notes("log.nvls")):
        return []
    return [
        "# the switches have no multicast group left: fewer communicators at a time, or"
        " NCCL_NVLS_ENABLE=0; the fabric manager may be well",
    ]


def _environment(facts: LogFacts) -> list[str]:
    return [f"unset {name}" for name in forced_choices(facts)]


_SPECIAL: Final[dict[str, Callable[[LogFacts], list[str]]]] = {
    "log.sockets": _sockets,
    "log.rdma-no-gdr": _no_gdr,
    "log.gdr-mixed": _no_gdr,
    "log.gdr-off": _no_gdr,
    "log.shm": _shm,
    "log.env": _environment,
    "log.cuda": _cuda,
    "log.nvls": _nvls,
    "log.wrong-peer": _wrong_peer,
    "log.p2p-denied": _p2p_denied,
    "log.ib-register": _register,
    "log.no-route": _reach,
    "log.tcp-timeout": _reach,
    "log.refused": _reach,
    "log.connect": _reach,
    "log.no-interface": _interface,
    "log.ib-timeout": _roce,
    "log.ib-rail": _roce,
    "log.ib-mixed": _one_fabric,
    "log.ib-unreachable": _one_fabric,
}
