"""A membership is read back as it was written, by its owner alone, and only while its member process runs."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from aphro_core.cluster.membership import (
    Membership,
    is_running,
    read_membership,
    read_record,
    remove_membership,
    state_folder,
    with_process,
    write_membership,
)

HERE = Membership(
    id="c0ffee",
    role="head",
    head_address="198.18.0.1:22420",
    node_address="198.18.0.1",
    control_port=22421,
    token_path="/state/token",
    temp_dir="/tmp/aphro-c0ffee",
    log_dir="/state/logs",
    devices=2,
    resource="aphro_slot",
    environment={"NCCL_SOCKET_IFNAME": "eth0"},
    started_at=1.0,
    pid=0,
    pid_started=0,
    boot_id="",
)


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def test_what_is_written_is_read() -> None:
    assert read_membership() is None
    written = with_process(HERE, os.getpid())
    write_membership(written)
    assert read_membership() == written
    record = state_folder() / "member.json"
    assert stat.S_IMODE(record.stat().st_mode) == 0o600
    assert stat.S_IMODE(record.parent.stat().st_mode) == 0o700
    assert [path.name for path in record.parent.iterdir()] == ["member.json"]
    remove_membership()
    remove_membership()
    assert read_record() is None


def test_a_member_that_ended_is_none() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    membership = with_process(HERE, process.pid)
    write_membership(membership)
    assert read_membership() == membership
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert read_membership() is None  # a zombie does nothing
    process.wait()
    assert read_membership() is None
    assert read_record() == membership


@pytest.mark.parametrize("change", [{"pid_started": 1}, {"boot_id": "another"}, {"pid": 2**22 + 1}])
def test_another_process_of_the_same_number_is_not_it(change: dict[str, int | str]) -> None:
    assert not is_running(replace(with_process(HERE, os.getpid()), **change))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "{", "{}", '{"role": "king"}'])
def test_a_damaged_record_is_no_membership(text: str) -> None:
    state_folder().mkdir(parents=True)
    (state_folder() / "member.json").write_text(text)
    assert read_record() is None
