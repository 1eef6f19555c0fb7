"""The support bundle: whole, and without a secret."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from aphro_core.doctor import bundle
from aphro_core.doctor.bundle import redact
from aphro_core.doctor.diagnosis import Questions, diagnose
from aphro_core.errors import UsageError
from tests.core.doctor.logs import TIMEOUT

SECRETS = [
    "HF_TOKEN=hf_abcdefghijklmnopqrst",
    '"api_key": "sk-abcdefghijklmnopqrstu"',
    "Authorization: Bearer abc.def.ghi",
    "--api-key s3cr3t-value",
    "password: hunter2hunter2",
    "https://user:hunter2hunter2@host/x",
    "AWS_SECRET_ACCESS_KEY=abcd/efgh",
    "MY_ACCESS_KEY='zzzzzzzz'",
]


@pytest.mark.parametrize("text", SECRETS)
def test_secrets_are_removed(text: str) -> None:
    assert "[removed]" in redact(f"x {text} y")


@pytest.mark.parametrize(
    "text", ["max_tokens=5", "prompt_tokens: 7", "NCCL_DEBUG=INFO", "n1:10:11 [0] NCCL INFO x", "http://h:80/a"]
)
def test_the_rest_stays(text: str) -> None:
    assert redact(text) == text


def test_bundle_has_findings_host_and_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    monkeypatch.setenv("APHRO_API_KEY", "s3cr3t-value")
    monkeypatch.setenv("NCCL_MY_TOKEN", "s3cr3t-value")
    log, path = tmp_path / "train.log", tmp_path / "b.tgz"
    log.write_text(TIMEOUT + "HF_TOKEN=s3cr3t-value\n")
    diagnosis = diagnose(Questions(logs=(str(log),), bundle=str(path)))
    assert diagnosis.verdict == "fail"
    with tarfile.open(path) as packed:
        files = {name: packed.extractfile(name).read().decode() for name in packed.getnames()}  # type: ignore[union-attr]
    assert json.loads(files["aphro-doctor/report.json"])["verdict"] == "fail"
    assert "NCCL_SOCKET_IFNAME=eth7" in files["aphro-doctor/hosts/this-host/env.txt"]
    assert "status=12" in files["aphro-doctor/logs/00-train.log"]
    assert "torch" in json.loads(files["aphro-doctor/hosts/this-host/versions.json"])
    assert not [name for name, text in files.items() if "s3cr3t-value" in text]


def test_long_logs_keep_both_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "_MAX_LOG_BYTES", 1000)
    log, path = tmp_path / "train.log", tmp_path / "b.tgz"
    log.write_text("first\n" + "middle\n" * 500_000 + "last\n")
    diagnose(Questions(logs=(str(log),), bundle=str(path)))
    with tarfile.open(path) as packed:
        text = packed.extractfile("aphro-doctor/logs/00-train.log").read().decode()  # type: ignore[union-attr]
    assert text.startswith("first\n")
    assert text.endswith("last\n")
    assert "bytes left out" in text
    assert len(text) < 2_000


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("x\n")
    with pytest.raises(UsageError, match="--bundle"):
        diagnose(Questions(logs=(str(log),), bundle=str(tmp_path / "no" / "b.tgz")))
    with pytest.raises(UsageError, match="standard input"):
        diagnose(Questions(logs=("-",), bundle=str(tmp_path / "b.tgz")))
