"""Every row of the table on a plain laptop, in a bare container, and on files that hold anything at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aphro_core.doctor.check import Cluster, HostCheck, LiveOptions
from aphro_core.doctor.doctor import CHECKS, CLUSTER_CHECKS, HOST_CHECKS, run_checks
from aphro_core.doctor.finding import Finding, Status
from aphro_core.errors import ModelError
from tests.core.doctor.rdma_trees import dgx, roce_port
from tests.core.doctor.recorded import RecordedHost, write_tree
from tests.core.doctor.test_checks_of_hosts import DF, nvml
from tests.core.doctor.test_checks_of_hosts import gpu as gpu_row

LIMITS = (
    "Max stack size            8388608              unlimited            bytes\n"
    "Max open files            1024                 524288               files\n"
    "Max locked memory         8388608              8388608              bytes\n"
)
VERSIONS = '{"aphro": "0.1.0", "torch": "2.11.0+cpu", "Python": "3.12.3"}'
COMMANDS = {
    "env -0": "HOME=/home/me\0PATH=/usr/bin\0",
    "uname -n": "laptop\n",
    "getent ahosts laptop": "127.0.1.1 STREAM laptop\n",
    "df": DF.format(8 << 30, 8 << 30),
    "python -m aphro_core.doctor.probes.versions": VERSIONS,
    "python -m aphro_core.doctor.probes.network": '{"interfaces": [{"name": "lo", "addresses": ["127.0.0.1"], '
    '"is_up": true, "is_loopback": true}], "routes": []}',
    "python -m aphro_core.doctor.probes.ras": '{"address": "localhost:28028", "error": "refused", "first": "", '
    '"second": ""}',
}  # fmt: skip
LAPTOP = {"/proc/self/limits": LIMITS, "/etc/hosts": "127.0.1.1 laptop\n", "/proc/cpuinfo": "flags : fpu\n"}
LIVE = ("comm.gloo",)  # starts processes


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def _run(check_id: str, host: RecordedHost) -> list[Finding]:
    check = CHECKS[check_id]
    if check in HOST_CHECKS:
        found = await check.check(host)  # type: ignore[arg-type]
    else:
        found = await check.check(Cluster([host], LiveOptions(), ib=True))  # type: ignore[arg-type]
    return [found] if isinstance(found, Finding) else found


@pytest.mark.anyio
@pytest.mark.parametrize("check_id", [name for name in CHECKS if name not in LIVE])
async def test_on_a_laptop_all_pass_or_are_skipped_with_a_reason(check_id: str, tmp_path: Path) -> None:
    found = await _run(check_id, RecordedHost(write_tree(tmp_path, LAPTOP), COMMANDS))
    assert found
    for finding in found:
        assert finding.status in (Status.PASS, Status.SKIP), finding
        assert len(finding.title.split()) >= 2, "a reason in words"
        assert finding.id == check_id


FULL = dgx(2) | roce_port("mlx5_8", "eth2", "10.1.0.7") | LAPTOP | {"/dev/nvidia0": "", "/dev/nvidia1": ""}
RDMA = '{"library_error":"","providers":["mlx5"],"nodes":{"uverbs0":""},"plugin":"libnccl-net.so","plugin_error":"no"}'
FULL_COMMANDS = COMMANDS | nvml(gpu_row(0), gpu_row(1)) | {"python -m aphro_core.doctor.probes.rdma": RDMA}
READERS = [check for check in HOST_CHECKS if check.ID not in ("gpu.p2p", "ib.errors")]  # start a process; wait a second


@given(st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_stands_in_the_files_no_check_raises(data: st.DataObject) -> None:
    words = st.sampled_from(
        ["", "\n", "-1", "0x", "4: ACTIVE", "99999999999999999999", "a b c", "::", "\ufffd\0", "max"]
    )
    names = data.draw(st.lists(st.sampled_from(sorted(FULL)), min_size=1, max_size=12, unique=True))
    files = dict(FULL)
    for name in names:
        if name != "/proc/self/limits" and not files[name].startswith("-> "):
            files[name] = data.draw(words)
    with TemporaryDirectory() as folder:
        host = RecordedHost(write_tree(Path(folder), files), FULL_COMMANDS)
        for check in READERS:
            anyio.run(_looks, check, host)


async def _looks(check: HostCheck, host: RecordedHost) -> None:
    found = await check.check(host)
    assert isinstance(found, Finding)


@pytest.mark.anyio
async def test_this_very_host_is_looked_at_in_seconds() -> None:
    skip = [check.ID for check in CLUSTER_CHECKS if check.ID in LIVE]
    found = await run_checks(ib=True, skip=skip)
    assert {finding.id for finding in found} >= set(CHECKS) - set(LIVE)
    assert [finding for finding in found if "failed itself" in finding.title] == []


@pytest.mark.anyio
async def test_a_model_that_is_not_there_is_refused_first() -> None:
    with pytest.raises(ModelError, match="neither a folder"):
        await run_checks(only=["shm.size"], live=LiveOptions(model="/no/such/model"))


def test_looking_needs_no_torch() -> None:
    """Only the ranks of the live check and the copies between GPUs load it, in processes of their own."""
    code = "import sys, aphro_core.doctor.doctor; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"
