"""GPUs as nvidia-smi describes them: visible ones only, reserved memory off, silence where it does not answer."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from aphro_core import host

ANSWER = """0, GPU-a, NVIDIA H100 80GB HBM3, 81559, 469, 80000
1, GPU-b, NVIDIA L4, 23034, [N/A], 22000
"""


@pytest.fixture
def smi(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[0] == "nvidia-smi"
        return subprocess.CompletedProcess(command, 0, ANSWER, "")

    monkeypatch.setattr(subprocess, "run", run)


@pytest.mark.parametrize(
    ("visible", "names"), [(["1"], ["NVIDIA L4"]), (["GPU-a"], ["NVIDIA H100 80GB HBM3"]), ([], [])]
)
def test_visible_gpus_only(smi: None, monkeypatch: pytest.MonkeyPatch, visible: list[str], names: list[str]) -> None:
    monkeypatch.setattr(host, "visible_gpus", lambda: visible)
    assert [gpu.name for gpu in host.gpu_memory()] == names


def test_what_the_driver_reserves_is_no_part_of_the_total(smi: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "visible_gpus", lambda: ["0", "1"])
    totals = [round(gpu.total_bytes / 2**30, 2) for gpu in host.gpu_memory()]
    assert totals == [79.19, 22.49]  # 79.19 is what servers print for this card


def test_no_answer_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> Any:
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(host, "visible_gpus", lambda: ["0"])
    assert host.gpu_memory() == []


def test_mps_shows_itself_by_its_pipe_or_a_share(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A directory without a daemon is how a process goes past MPS."""
    monkeypatch.delenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", raising=False)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    assert host.sign_of_mps() is None
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "50")
    assert host.sign_of_mps() == "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=50"
    os.mkfifo(tmp_path / "control")
    assert host.sign_of_mps() == str(tmp_path / "control")
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY")
    monkeypatch.setattr(host, "_MPS_PIPES", str(tmp_path))
    assert host.sign_of_mps() == str(tmp_path / "control")
