"""The checks of one host and of several, against recorded files and outputs."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from aphro_core.doctor.check import Cluster, LiveOptions
from aphro_core.doctor.checks import (
    gpu_busy,
    gpu_count,
    gpu_driver,
    gpu_enough,
    gpu_fabric,
    gpu_health,
    gpu_throttle,
    gpu_topology,
    host_acs,
    host_iommu,
    host_numa,
    imex,
    limit_cgroup,
    limit_nofile,
    limit_stack,
    name_loopback,
    name_unique,
    nccl_env,
    nodes_versions,
    shm_size,
    shm_stale,
)
from aphro_core.doctor.finding import Finding, Status
from aphro_core.doctor.probes import gpus
from aphro_core.doctor.probes.gpus import FabricInfo
from aphro_core.doctor.probes.network import interfaces, route
from aphro_core.doctor.socket_filter import default_choice, selects
from aphro_core.host import sign_of_mps
from aphro_core.remote.remote import Output
from tests.core.doctor.rdma_trees import dgx, pci_device
from tests.core.doctor.recorded import RecordedHost, write_tree

PASS, WARN, FAIL, SKIP = Status.PASS, Status.WARN, Status.FAIL, Status.SKIP
GPUS = "python -m aphro_core.doctor.probes.gpus"
VERSIONS = "python -m aphro_core.doctor.probes.versions"
GPU_FILES = {"/dev/nvidia0": "", "/dev/nvidia1": "", "/proc/driver/nvidia/version": "NVRM version: 570.86.15\n"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def recorded(
    tmp_path: Path, files: Mapping[str, str], commands: Mapping[str, str | Output] | None = None, name: str = ""
) -> RecordedHost:
    return RecordedHost(write_tree(tmp_path / (name or "host"), files), {"env -0": "", **(commands or {})}, name=name)


def gpu(index: int, **values: Any) -> dict[str, Any]:
    return {
        "index": index, "name": "NVIDIA H100 80GB HBM3", "uuid": f"GPU-{index}", "bus_id": f"00000000:0{index}:00.0",
        "capability": [9, 0], "total_bytes": 80 << 30, "used_bytes": 600 << 20, "persistence": 1, "throttling": [],
        "is_power_capped": False, "temperature": 31, "ecc": {"corrected_aggregate": 0, "uncorrected_volatile": 0},
        "remapped": [0, 0, 0, 0], "processes": [], "fabric": {"state": 3, "status": 0, "clique": 0, "uuid": "00"},
        "num_nvlinks": 18, **values,
    }  # fmt: skip


def nvml(*gpus: dict[str, Any], mps: str | None = None, **pair: Any) -> dict[str, str]:
    link = {"first": 0, "second": 1, "level": "SYS", "num_nvlinks": 0, "p2p": {"nvlink": True}, **pair}
    return {GPUS: json.dumps({"driver": "570.86.15", "cuda": 12080, "gpus": gpus, "mps": mps, "pairs": [link]})}


GPU_CASES: list[tuple[Any, dict[str, str | Output], Status, str]] = [
    (gpu_driver, nvml(gpu(0), gpu(1)), PASS, "driver 570.86.15, CUDA up to 12.8: 2 x NVIDIA H100 80GB HBM3"),
    (gpu_driver, {GPUS: '{"error": "Driver/library version mismatch"}'}, FAIL, "Driver/library version mismatch"),
    (gpu_count, nvml(gpu(0), gpu(1)), PASS, "2 of 2 GPUs visible"),
    (gpu_count, nvml(gpu(0), gpu(1)) | {"env -0": "CUDA_VISIBLE_DEVICES=0,5"}, FAIL, "names 5, but there are 2"),
    (gpu_count, nvml(gpu(0), gpu(1)) | {"env -0": "CUDA_VISIBLE_DEVICES=1,1"}, WARN, "twice"),
    (gpu_count, nvml(gpu(0), gpu(1)) | {"env -0": "CUDA_VISIBLE_DEVICES=GPU-1"}, PASS, "1 of 2"),
    (gpu_count, nvml(gpu(0), gpu(1, name="A100", capability=[8, 0])), WARN, "A100, NVIDIA H100"),
    (gpu_health, nvml(gpu(0), gpu(1)), PASS, "no ECC error"),
    (gpu_health, nvml(gpu(0), gpu(1, remapped=[0, 1, 1, 0])), FAIL, "GPU 1: a row remap is pending"),
    (gpu_health, nvml(gpu(0, ecc={"corrected_aggregate": 7})), WARN, "7 corrected ECC errors"),
    (gpu_health, nvml(gpu(0)) | {"dmesg": "[1.0] NVRM: Xid (PCI:0000:01:00): 79, GPU has fallen off\n"}, FAIL, "79"),
    (gpu_health, nvml(gpu(0)) | {"dmesg": Output(1, "", "Operation not permitted")}, PASS, "no ECC error"),
    (gpu_throttle, nvml(gpu(0), gpu(1)), PASS, "no GPU is held back"),
    (gpu_throttle, nvml(gpu(0), gpu(1, throttling=["power brake"])), WARN, "GPU 1 (power brake)"),
    (gpu_busy, nvml(gpu(0), gpu(1)), PASS, "all GPUs are free"),
    (gpu_busy, nvml(gpu(0, used_bytes=40 << 30, processes=[{"pid": 77, "bytes": 39 << 30}])), WARN, "pid 77"),
    (gpu_busy, nvml(gpu(0), mps="/tmp/nvidia-mps/control"), WARN, "shared by MPS (/tmp/nvidia-mps/control)"),
    (gpu_topology, nvml(gpu(0), gpu(1)), PASS, "NVLink between all 2 GPUs"),
    (gpu_topology, nvml(gpu(0), gpu(1), p2p={}), WARN, "the slowest is GPU 0 - GPU 1 by SYS"),
    (gpu_fabric, nvml(gpu(0), gpu(1)), PASS, "2 GPUs have joined"),
    (gpu_fabric, nvml(gpu(0, fabric={"state": 2, "status": 0, "clique": 0, "uuid": ""})), WARN, "waiting"),
    (gpu_fabric, nvml(gpu(0, fabric={"state": 3, "status": 9, "clique": 0, "uuid": ""})), FAIL, "error"),
    (gpu_fabric, nvml(gpu(0, fabric=None)), SKIP, "no GPU here belongs"),
]


@pytest.mark.anyio
@pytest.mark.parametrize(("check", "commands", "status", "words"), GPU_CASES)
async def test_gpus(check: Any, commands: dict[str, str | Output], status: Status, words: str, tmp_path: Path) -> None:
    found: Finding = await check.check(recorded(tmp_path, GPU_FILES, commands))
    assert (found.status, words in found.title) == (status, True), found
    assert found.remedy or status not in (WARN, FAIL)


@pytest.mark.anyio
async def test_mps_does_not_hide_who_holds_the_memory(tmp_path: Path) -> None:
    holders = [{"pid": 77, "bytes": 39 << 30}, {"pid": 88, "bytes": 30 << 20}]
    host = recorded(tmp_path, GPU_FILES, nvml(gpu(0, used_bytes=40 << 30, processes=holders), gpu(1), mps="a share"))
    found = await gpu_busy.check(host)
    assert "shared by MPS (a share)" in found.title
    assert "1 of 2 hold memory of others" in found.title
    assert any("pid 77" in line.text for line in found.evidence)


def test_mps_is_what_ranks_ask_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule of layers/chained.py, in the process that looks at the GPUs."""
    for name in ("nvmlInit", "nvmlDeviceGetCount", "nvmlSystemGetDriverVersion"):
        monkeypatch.setattr(gpus.pynvml, name, lambda name=name: "570" if "Driver" in name else 0)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    (tmp_path / "control").touch()
    assert gpus.everything()["mps"] == sign_of_mps() == str(tmp_path / "control")


SOFT = "Max {}    {}    unlimited    units\n"
ACS = "0000:00:01.0 PCI bridge: x\n\tACSCtl:\tSrcValid{} TransBlk- ReqRedir{} CmpltRedir{}\n"
TWO_GPUS = pci_device("/sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0", "0x10de", "0x030200", 0) | pci_device(
    "/sys/devices/pci0000:00/0000:00:02.0/0000:02:00.0", "0x10de", "0x030200", 0
)
DF = "Filesystem 1-blocks Used Available Capacity Mounted on\nshm {} 0 {} 0% /dev/shm\n"
HOST_CASES: list[tuple[Any, Mapping[str, str], dict[str, str | Output], Status, str]] = [
    (shm_size, {}, {"df": DF.format(17179869184, 17179869184)}, PASS, "16.00 of 16.00 GiB free"),
    (shm_size, {}, {"df": DF.format(67108864, 67108864)}, WARN, "0.06 of 0.06 GiB"),
    (shm_size, {}, {"df": DF.format(67108864, 4096)}, FAIL, "less than 1 GiB"),
    (shm_size, {}, {"df": Output(1, "", "df: /dev/shm: No such file")}, FAIL, "there is no /dev/shm"),
    (shm_stale, {}, {}, PASS, "no segments"),
    (shm_stale, {"/dev/shm/nccl-a1": "", "/dev/shm/nccl-b2": ""}, {"sh -c": "/dev/shm/nccl-a1\n"}, WARN, "1 segments"),
    (limit_nofile, {"/proc/self/limits": SOFT.format("open files", 1024)}, {}, SKIP, "without GPUs"),
    (limit_nofile, {"/proc/self/limits": SOFT.format("open files", 1024)} | GPU_FILES, {}, WARN, "only 1024"),
    (limit_nofile, {"/proc/self/limits": SOFT.format("open files", 256)} | GPU_FILES, {}, FAIL, "only 256"),
    (limit_nofile, {"/proc/self/limits": SOFT.format("open files", 1048576)}, {}, PASS, "1048576"),
    (limit_stack, {"/proc/self/limits": SOFT.format("stack size", 8388608)}, {}, PASS, "8192 KiB"),
    (limit_stack, {"/proc/self/limits": SOFT.format("stack size", "unlimited")},
     {VERSIONS: '{"NCCL": "2.27.3"}'}, WARN, "NCCL 2.27.3 may crash"),
    (limit_stack, {"/proc/self/limits": SOFT.format("stack size", "unlimited")},
     {VERSIONS: '{"NCCL": "2.28.9"}'}, PASS, "can bear"),
    (limit_cgroup, {"/sys/fs/cgroup/memory.max": "max\n", "/sys/fs/cgroup/cpu.max": "150000 100000\n"}, {},
     PASS, "1.5 cores"),
    (limit_cgroup, {"/sys/fs/cgroup/memory.max": "2147483648", "/sys/fs/cgroup/memory.current": "2000000000"}, {},
     WARN, "0.1 GiB of memory left"),
    (limit_cgroup, {}, {}, SKIP, "no limits"),
    (host_iommu, TWO_GPUS, {}, PASS, "no IOMMU is active"),
    (host_iommu, TWO_GPUS | {"/sys/class/iommu/dmar0": "", "/sys/kernel/iommu_groups/0/type": "DMA-FQ\n"}, {},
     WARN, "translates between 2"),
    (host_iommu, TWO_GPUS | {"/sys/class/iommu/dmar0": "", "/sys/kernel/iommu_groups/0/type": "identity\n"}, {},
     PASS, "passes through"),
    (host_acs, TWO_GPUS, {"lspci": ACS.format("+", "+", "+")}, FAIL, "0000:00:01.0"),
    (host_acs, TWO_GPUS, {"lspci": ACS.format("+", "-", "-")}, WARN, "without redirecting"),
    (host_acs, TWO_GPUS, {"lspci": ACS.format("-", "-", "-")}, PASS, "no redirection"),
    (host_acs, TWO_GPUS, {"lspci": "0000:00:01.0 PCI bridge: x\n"}, SKIP, "root may read"),
    (host_acs, TWO_GPUS, {}, SKIP, "lspci is not installed"),
    (host_acs, TWO_GPUS | {"/proc/cpuinfo": "flags\t: fpu hypervisor\n"}, {}, SKIP, "virtual machine"),
    (host_numa, dgx(), {}, PASS, "8 GPUs and RDMA devices"),
    (host_numa, {"/dev/kfd": "", "/proc/sys/kernel/numa_balancing": "1\n"}, {}, WARN, "beside AMD GPUs"),
]  # fmt: skip


@pytest.mark.anyio
@pytest.mark.parametrize(("check", "files", "commands", "status", "words"), HOST_CASES)
async def test_hosts(
    check: Any, files: Mapping[str, str], commands: dict[str, str | Output], status: Status, words: str, tmp_path: Path
) -> None:
    found: Finding = await check.check(recorded(tmp_path, files, commands))
    assert (found.status, words in found.title) == (status, True), found
    assert found.remedy or status not in (WARN, FAIL) or check is host_acs


def cluster(*hosts: RecordedHost, ib: bool = False) -> Cluster:
    return Cluster(hosts, LiveOptions(), ib)


@pytest.mark.anyio
async def test_a_name_that_leads_to_loopback_names_the_line_to_change(tmp_path: Path) -> None:
    files = {"/etc/hosts": "127.0.0.1 localhost\n# a comment\n127.0.1.1 gpu7.lan gpu7\n"}
    commands = {"uname -n": "gpu7\n", "getent ahosts gpu7": "127.0.1.1 STREAM gpu7\n127.0.1.1 DGRAM\n"}
    host, other = (recorded(tmp_path, files, commands, name=name) for name in ("a", "b"))
    found, _ = await name_loopback.check(cluster(host, other))
    assert found.status is FAIL
    assert found.remedy.startswith(
        "/etc/hosts line 3: replace `127.0.1.1 gpu7.lan gpu7` by `<address in the network> gpu7`"
    )
    (alone,) = await name_loopback.check(cluster(host))
    assert alone.status is SKIP


@pytest.mark.anyio
async def test_two_hosts_of_one_name(tmp_path: Path) -> None:
    one, two = (recorded(tmp_path, {"/x": ""}, {"uname -n": "gpu\n"}, name=name) for name in ("a", "b"))
    found = await name_unique.check(cluster(one, two))
    assert (found.status, found.title) == (FAIL, "a and b both call themselves gpu")


@pytest.mark.anyio
async def test_the_odd_version_is_marked(tmp_path: Path) -> None:
    texts = {"a": '{"torch": "2.11.0", "Python": "3.12.1"}', "b": '{"torch": "2.11.0", "Python": "3.12.1"}',
             "c": '{"torch": "2.10.0", "Python": "3.12.1"}'}  # fmt: skip
    hosts = [recorded(tmp_path, {"/x": ""}, {VERSIONS: text}, name=name) for name, text in texts.items()]
    (found,) = await nodes_versions.check(cluster(*hosts))
    assert (found.status, found.evidence[0].text) == (FAIL, "torch: a 2.11.0, b 2.11.0, c 2.10.0 (!)")
    missing = recorded(tmp_path, {"/x": ""}, {}, name="d")
    first, _ = await nodes_versions.check(cluster(hosts[0], missing))
    assert (first.status, first.host) == (FAIL, "d")
    assert "aphro is not installed" in first.title


@pytest.mark.anyio
async def test_variables_say_where_they_come_from(tmp_path: Path) -> None:
    conf = {"/etc/nccl.conf": "NCCL_P2P_DISABLE=1\n# NCCL_ALGO=Ring\n"}
    found = await nccl_env.check(cluster(recorded(tmp_path, conf)))
    assert (found.status, found.title) == (WARN, "left over from debugging: NCCL_P2P_DISABLE")
    assert (found.evidence[0].file, found.evidence[0].line) == ("/etc/nccl.conf", 1)
    one = recorded(tmp_path, {"/x": ""}, {"env -0": "NCCL_TIMEOUT=3\0NCCL_SOCKET_IFNAME=a"}, name="a")
    two = recorded(tmp_path, {"/x": ""}, {"env -0": "NCCL_TIMEOUT=4\0NCCL_SOCKET_IFNAME=b"}, name="b")
    assert (await nccl_env.check(cluster(one, two))).title == "not the same on all hosts: NCCL_TIMEOUT"
    off = recorded(tmp_path, {"/x": ""}, {"env -0": "NCCL_IB_DISABLE=1"}, name="c")
    assert (await nccl_env.check(cluster(off, ib=True))).status is FAIL


@pytest.mark.parametrize(
    ("pattern", "taken"),
    [("eth", ["eth0", "eth1"]), ("=eth0", ["eth0"]), ("^docker,lo", ["eth0", "eth1", "ib0"]), ("^=eth0", ["eth1", "ib0",
     "docker0", "lo"])],
)  # fmt: skip
def test_the_filter_of_sockets_is_nccls(pattern: str, taken: list[str]) -> None:
    names = ["eth0", "eth1", "ib0", "docker0", "lo"]
    assert [name for name in names if selects(pattern, name)] == taken


def test_what_nccl_takes_by_itself() -> None:
    assert default_choice(["lo", "docker0", "eth0", "ib0"]) == ["ib0"]
    assert default_choice(["lo", "docker0", "eth0", "virbr0"]) == ["eth0"]
    assert default_choice(["lo", "docker0"]) == ["docker0"]
    assert default_choice(["lo"]) == ["lo"]


def test_the_network_probe_knows_this_host() -> None:
    known = interfaces()
    loopback = next(entry for entry in known if entry["is_loopback"])
    assert "127.0.0.1" in loopback["addresses"]
    assert route("127.0.0.1") == {
        "peer": "127.0.0.1", "peer_address": "127.0.0.1", "address": "127.0.0.1", "interface": loopback["name"]
    }  # fmt: skip
    assert "error" in route("name.invalid")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("sizes", "counts", "status", "words", "remedy"),
    [
        ({}, (2, 2), SKIP, "neither", ""),
        ({"tp": 2, "pp": 2}, (2, 2), PASS, "4 GPUs, 4 of them needed", ""),
        ({"tp": 4}, (2, 2), WARN, "only 0 groups of 4", "-tp 2 -pp 2"),
        ({"tp": 2, "pp": 4}, (2, 3), FAIL, "needs 8 GPUs, and there are 5", "-tp 2 -pp 2"),
        ({"tp": 2}, (0, 0), SKIP, "no NVIDIA GPU", ""),
    ],
)
async def test_gpus_are_counted_over_all_hosts(
    tmp_path: Path, sizes: dict[str, int], counts: tuple[int, ...], status: Status, words: str, remedy: str
) -> None:
    hosts = [
        recorded(tmp_path, {f"/dev/nvidia{gpu}": "" for gpu in range(count)} or {"/etc/hosts": ""}, name=f"n{number}")
        for number, count in enumerate(counts)
    ]
    found = await gpu_enough.check(Cluster(hosts, LiveOptions(**sizes)))
    assert (found.status, remedy in found.remedy) == (status, True)
    assert words in found.title


@pytest.mark.anyio
@pytest.mark.parametrize(("num_hosts", "status"), [(1, SKIP), (2, FAIL)])
async def test_one_host_needs_no_channel_for_nvlink(tmp_path: Path, num_hosts: int, status: Status) -> None:
    rack = {"fabric": {"state": 3, "status": 0, "clique": 1, "uuid": "ab" * 16}}
    hosts = [recorded(tmp_path, GPU_FILES, nvml(gpu(0, **rack)), name=f"n{number}") for number in range(num_hosts)]
    assert (await imex.check(Cluster(hosts, LiveOptions()))).status is status


def test_the_fabrics_record_is_laid_out_as_in_nvml_h() -> None:
    assert ctypes.sizeof(FabricInfo) == 28
    assert (FabricInfo.status.offset, FabricInfo.cliqueId.offset, FabricInfo.state.offset) == (16, 20, 24)
