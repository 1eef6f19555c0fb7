"""The checks of RDMA against recorded trees: InfiniBand, RoCE, several cards, ports that are down, wrong variables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aphro_core.doctor.check import Cluster, LiveOptions
from aphro_core.doctor.checks import (
    efa,
    gdr_distance,
    gdr_path,
    ib_devices,
    ib_disabled,
    ib_errors,
    ib_filter,
    ib_library,
    ib_link_layer,
    ib_nodes,
    ib_port,
    ib_rate,
    ib_sm,
    ib_symmetry,
    limit_memlock,
    roce_gid,
    roce_mtu,
)
from aphro_core.doctor.finding import Finding, Status
from aphro_core.doctor.hca_filter import selects, surprises
from tests.core.doctor.rdma_trees import dgx, roce_port
from tests.core.doctor.rdma_trees import ib_port as port
from tests.core.doctor.recorded import RecordedHost, write_tree

PASS, WARN, FAIL, SKIP = Status.PASS, Status.WARN, Status.FAIL, Status.SKIP
PROBE = "python -m aphro_core.doctor.probes.rdma"
TWO = port("mlx5_0") | port("mlx5_1")
ROCE = roce_port("mlx5_0", "eth2", "10.1.0.7")
DOWN = port("mlx5_1", state="1: DOWN", phys="3: Disabled", rate="10 Gb/sec (4X SDR)", sm_lid="0x0")
GPU = {"/proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release\n"}
CLOSED_GPU = {"/proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue\n"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def look(check: Any, tmp_path: Path, files: Mapping[str, str], env: str = "", **commands: Any) -> Finding:
    table = {
        "env -0": "\0".join(env.split()),
        "uname -r": "6.8.0-45-generic",
        VERSIONS: '{"NCCL": "2.21.5"}',
        **commands.get("commands", {}),
    }
    found: Finding = await check.check(RecordedHost(write_tree(tmp_path, files), table))
    assert found.id == check.ID
    assert found.remedy or found.status not in (WARN, FAIL)
    return found


SYMBOL_ERRORS = {"/sys/class/infiniband/mlx5_1/ports/1/counters/symbol_error": "77"}
LIMITED = {"/proc/self/limits": "Max locked memory    8388608   8388608   bytes\n"}
UNLIMITED = {"/proc/self/limits": "Max locked memory    unlimited   unlimited   bytes\n"}
VERSIONS = "python -m aphro_core.doctor.probes.versions"

CASES: list[tuple[ModuleType, Mapping[str, str], str, Status, str]] = [
    (ib_devices, TWO, "", PASS, "2 RDMA devices: mlx5_0, mlx5_1"),
    (ib_devices, TWO | {"/sys/class/infiniband/mlx5_1/fw_ver": "28.35.1000"}, "", WARN, "28.35.1000 and 28.39.2048"),
    (ib_port, TWO, "", PASS, "2 ports ACTIVE"),
    (ib_port, port("mlx5_0") | DOWN, "", PASS, "not in use: mlx5_1:1 DOWN/Disabled"),
    (ib_port, port("mlx5_0") | port("mlx5_1", state="2: INIT"), "", WARN, "mlx5_1:1 INIT/LinkUp"),
    (ib_port, port("mlx5_0", state="2: INIT", sm_lid="0x0"), "", FAIL, "no RDMA port is ACTIVE"),
    (ib_port, DOWN, "", FAIL, "mlx5_1:1 DOWN/Disabled"),
    (ib_sm, TWO, "", PASS, "2 ports have their LIDs"),
    (ib_sm, port("mlx5_0", state="2: INIT", lid="0x0", sm_lid="0x0"), "", FAIL, "no subnet manager for mlx5_0:1"),
    (ib_sm, ROCE, "", SKIP, "no RDMA device"),
    (ib_rate, TWO, "", PASS, "2 ports at 400 Gb/sec (4X NDR)"),
    (ib_rate, port("mlx5_0") | port("mlx5_1", rate="200 Gb/sec (4X HDR)"), "", WARN, "mlx5_1:1 only runs at 200"),
    (ib_rate, port("mlx5_0", rate="100 Gb/sec (1X NDR)"), "", FAIL, "mlx5_0:1 only runs at 100 Gb/sec (1X NDR)"),
    (ib_rate, port("mlx5_0") | DOWN, "", PASS, "1 ports"),  # a port that is down has no rate to speak of
    (ib_link_layer, TWO, "", PASS, "InfiniBand on all 2"),
    (ib_link_layer, ROCE, "", PASS, "RoCE on all 1"),
    (ib_link_layer, port("mlx5_1") | ROCE, "", WARN, "Ethernet and InfiniBand ports are mixed"),
    (ib_link_layer, port("mlx5_1") | ROCE, "NCCL_IB_HCA==mlx5_1", PASS, "InfiniBand on all 1"),
    (ib_filter, TWO, "", PASS, "not set: NCCL takes mlx5_0:1, mlx5_1:1"),
    (ib_filter, TWO, "NCCL_IB_HCA=mlx5_7", FAIL, "selects no ACTIVE port"),
    (ib_filter, port("mlx5_0") | DOWN, "NCCL_IB_HCA==mlx5_1", FAIL, "selects no ACTIVE port"),
    (ib_filter, TWO | port("mlx5_10"), "NCCL_IB_HCA=mlx5_1", WARN, "takes mlx5_10 too"),
    (ib_filter, TWO | port("mlx5_10"), "NCCL_IB_HCA==mlx5_1", PASS, "NCCL takes mlx5_1:1"),
    (ib_filter, TWO, "NCCL_IB_HCA=^mlx5_0:1", PASS, "NCCL takes mlx5_1:1"),
    (roce_gid, ROCE, "", PASS, "mlx5_0:1 index 3"),
    (roce_gid, TWO, "", SKIP, "no RoCE port"),
    (roce_gid, roce_port("mlx5_0", "eth2", None), "", FAIL, "no RoCE v2 address on mlx5_0:1"),
    (roce_gid, ROCE, "NCCL_IB_GID_INDEX=3", WARN, "NCCL_IB_GID_INDEX=3 is set"),
    (roce_gid, ROCE, "NCCL_IB_GID_INDEX=2", FAIL, "mlx5_0:1: RoCE v1"),
    (roce_gid, ROCE, "NCCL_IB_GID_INDEX=5", FAIL, "mlx5_0:1: empty"),
    (roce_mtu, ROCE, "", PASS, "4096"),
    (roce_mtu, roce_port("mlx5_0", "eth2", "10.1.0.7", mtu=1500), "", WARN, "packets of 1024 bytes"),
    (ib_errors, TWO, "", PASS, "4 error counters, all zero"),
    (ib_errors, TWO | SYMBOL_ERRORS, "", WARN, "symbol_error 77"),
    (ib_disabled, TWO, "NCCL_IB_DISABLE=1", FAIL, "NCCL_IB_DISABLE=1 switches RDMA off"),
    (ib_disabled, TWO | {"/etc/nccl.conf": "# ours\nNCCL_NET=Socket\n"}, "", FAIL, "(/etc/nccl.conf)"),
    (limit_memlock, TWO | LIMITED, "", FAIL, "8192 KiB"),
    (limit_memlock, LIMITED, "", SKIP, "8192 KiB"),
    (limit_memlock, TWO | UNLIMITED, "", PASS, "unl"),
    (gdr_path, TWO | GPU, "", PASS, "DMA-BUF is possible"),
    (gdr_path, TWO | CLOSED_GPU, "", FAIL, "neither nvidia_peermem nor DMA-BUF"),
    (gdr_path, TWO | CLOSED_GPU | {"/sys/kernel/mm/memory_peers/nv_mem/version": "1.1"}, "", PASS, "nvidia_peermem"),
    (gdr_path, TWO | CLOSED_GPU | {"/sys/module/nvidia_peermem/version": "535"}, "", WARN, "NCCL 2.21.5 does not look"),
    (gdr_path, TWO, "", SKIP, "no NVIDIA GPU"),
    (gdr_distance, dgx(), "", PASS, "each of 4 GPUs has a card near it"),
    (gdr_distance, dgx(), "NCCL_IB_HCA==mlx5_0,mlx5_1", WARN, "GPU 0000:22:00.0 (SYS), GPU 0000:32:00.0 (SYS)"),
    (efa, TWO, "", SKIP, "no EFA device"),
    (efa, port("efa_0"), "", WARN, "fi_info is not installed"),
]  # fmt: skip


@pytest.mark.anyio
@pytest.mark.parametrize(("check", "files", "env", "status", "words"), CASES)
async def test_recorded_hosts(
    check: ModuleType, files: Mapping[str, str], env: str, status: Status, words: str, tmp_path: Path
) -> None:
    found = await look(check, tmp_path, files, env)
    assert (found.status, words in found.title) == (status, True), found


@pytest.mark.anyio
@pytest.mark.parametrize("check", sorted({case[0].ID: case[0] for case in CASES}.values(), key=lambda row: row.ID))
async def test_without_rdma_every_check_is_skipped(check: ModuleType, tmp_path: Path) -> None:
    assert (await look(check, tmp_path, LIMITED)).status is SKIP


@pytest.mark.anyio
async def test_a_card_without_its_driver(tmp_path: Path) -> None:
    card = "/sys/bus/pci/devices/0000:17:00.0"
    files = {f"{card}/vendor": "0x15b3\n", f"{card}/class": "0x020700\n", f"{card}/device": "0x1021\n"}
    found = await look(ib_devices, tmp_path, files)
    assert (found.status, found.remedy.split(";")[0]) == (FAIL, "sudo modprobe mlx5_ib")


PROBED = {
    "fine": ('{"library_error":"","providers":["mlx5"],"nodes":{"uverbs0":"","uverbs1":""},'
             '"plugin":"libnccl-net.so","plugin_error":"no such file"}', PASS, PASS),
    "no library": ('{"library_error":"no such file","providers":[],"nodes":{"uverbs0":"EACCES","uverbs1":"EPERM"},'
                   '"plugin":"libnccl-net.so","plugin_error":"no such file"}', FAIL, FAIL),
    "half": ('{"library_error":"","providers":["efa"],"nodes":{"uverbs0":"","uverbs1":"ENOENT"},'
             '"plugin":"libnccl-net.so","plugin_error":""}', WARN, WARN),
}  # fmt: skip


@pytest.mark.anyio
@pytest.mark.parametrize("name", PROBED)
async def test_what_can_be_opened(name: str, tmp_path: Path) -> None:
    text, library, nodes = PROBED[name]
    commands = {PROBE: text}
    assert (await look(ib_library, tmp_path / "a", TWO, commands=commands)).status is library
    assert (await look(ib_nodes, tmp_path / "b", TWO, commands=commands)).status is nodes
    assert (await look(ib_disabled, tmp_path / "c", TWO, commands=commands)).status is PASS


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("first", "second", "status"),
    [
        (TWO, TWO, PASS),
        (TWO, port("mlx5_0"), FAIL),
        (port("mlx5_0"), ROCE, FAIL),
        (port("mlx5_0"), port("mlx5_1"), WARN),
        (port("mlx5_0"), port("mlx5_0", rate="200 Gb/sec (4X HDR)"), WARN),
        ({}, {}, SKIP),
    ],
)
async def test_hosts_are_compared(
    first: Mapping[str, str], second: Mapping[str, str], status: Status, tmp_path: Path
) -> None:
    hosts = [
        RecordedHost(write_tree(tmp_path / name, {"/etc/hostname": name, **files}), {"env -0": ""}, name=name)
        for name, files in (("a", first), ("b", second))
    ]
    assert (await ib_symmetry.check(Cluster(hosts, LiveOptions()))).status is status


@given(st.text("mlx5_0123", min_size=1), st.integers(1, 2), st.lists(st.text("mlx5_0123", min_size=1), min_size=1))
def test_exclusion_is_the_rest_and_exact_is_narrower(device: str, number: int, words: list[str]) -> None:
    text = ",".join(words)
    assert selects(f"^{text}", device, number) != selects(text, device, number)
    assert selects(text, device, number) or not selects(f"={text}", device, number)
    assert selects(f"={device}:{number}", device, number)
    assert not selects(f"={device}:{number + 1}", device, number)
    assert surprises(f"={text}", [device]) == []


def test_counters_that_grow_during_traffic_are_a_failure() -> None:
    path = "/sys/class/infiniband/mlx5_0/ports/1/hw_counters/local_ack_timeout_err"
    assert ib_errors.judge_growth({path: 5}, {path: 5}) is None
    found = ib_errors.judge_growth({path: 5}, {path: 9}, " during the traffic between hosts", "n2")
    assert found is not None
    assert (found.id, found.status, found.host, found.root_cause) == ("ib.errors", FAIL, "n2", True)
    assert found.title == "errors are being counted during the traffic between hosts: mlx5_0 local_ack_timeout_err 9"
