"""The single file: built from this checkout, run by a Python that sees nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aphro_core.errors import ExitCode
from tests.core.estimate.configs import LLAMA_8B

ROOT = Path(__file__).parent.parent
pytest.importorskip("shiv", reason="shiv, of the development extra, is not installed")


@pytest.fixture(scope="module")
def zipapp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file: Path = tmp_path_factory.mktemp("zipapp") / "aphro.pyz"
    subprocess.run([sys.executable, str(ROOT / "tools" / "build_zipapp.py"), "-o", str(file)], check=True)
    return file


def aphro(zipapp: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """By this interpreter without its site-packages (-S) and without what the caller's environment adds."""
    environment = {"PATH": os.environ["PATH"], "SHIV_ROOT": str(zipapp.parent / "shiv"), "HOME": str(zipapp.parent)}
    command = [sys.executable, "-S", "-E", str(zipapp), *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=zipapp.parent)


def test_it_is_one_file_that_starts(zipapp: Path) -> None:
    assert os.access(zipapp, os.X_OK)
    assert zipapp.read_bytes().startswith(b"#!/usr/bin/env python3\n")
    first = aphro(zipapp, "--help")
    assert first.returncode == 0, first.stderr
    assert "estimate" in first.stdout
    start = time.perf_counter()
    aphro(zipapp, "--help")
    assert time.perf_counter() - start < 5  # unpacked already


def test_torch_is_not_there(zipapp: Path) -> None:
    assert "torch is not there" in aphro(zipapp, "version").stdout
    refused = aphro(zipapp, "run", "model")
    assert refused.returncode == ExitCode.USAGE
    assert "error: torch is not installed here" in refused.stderr
    assert "tensor-parallel-size: 2" in aphro(zipapp, "run", "model", "-tp", 2, "--print-config").stdout


def test_it_estimates(zipapp: Path) -> None:
    config = zipapp.parent / "config.json"
    config.write_text(json.dumps(LLAMA_8B))
    done = aphro(zipapp, "estimate", config, "--gpu", "H100", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fits"]


def test_it_reads_logs(zipapp: Path) -> None:
    log = zipapp.parent / "nccl.log"
    lines = [
        f"h:1:{rank} [{rank}] NCCL INFO Channel 00/0 : {rank}[{rank}] -> {1 - rank}[{1 - rank}] via P2P/IPC"
        for rank in (0, 1)
    ]
    log.write_text("\n".join(lines) + "\n")
    done = aphro(zipapp, "doctor", "--nccl-log", log, "--json")
    assert done.returncode == 0, done.stderr
    assert "log.p2p" in done.stdout


def test_it_talks_and_completes(zipapp: Path) -> None:
    asked = aphro(zipapp, "chat", "127.0.0.1:1", "-p", "Hello")
    assert (asked.returncode, "no server answers" in asked.stderr) == (ExitCode.SERVER, True)
    assert aphro(zipapp, "top", "127.0.0.1:1", "--count", 1).returncode == ExitCode.SERVER
    assert aphro(zipapp, "bench", "127.0.0.1:1").returncode == ExitCode.SERVER
    shown = aphro(zipapp, "completion", "show", "--shell", "fish")
    assert shown.stdout == (ROOT / "completions" / "aphro.fish").read_text()
