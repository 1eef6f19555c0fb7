"""``aphro doctor``: what an operator sees and a script reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from aphro_cli.main import app
from aphro_core.doctor import doctor
from aphro_core.doctor.finding import Finding, Status
from tests.cli.test_estimate import nodes_of
from tests.core.doctor.logs import IB_GDR, LOGS, P2P


def run(*words: str, input: str | None = None) -> Result:
    return CliRunner().invoke(app, ["doctor", *words], input=input)


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    for name, text in LOGS.items():
        (tmp_path / f"{name}.log").write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "code"), [("ib", 0), ("p2p", 0), ("init", 0), ("sockets", 1), ("shm", 1), ("timeout", 2)]
)
def test_exit_codes(logs: Path, name: str, code: int) -> None:
    result = run("--nccl-log", str(logs / f"{name}.log"), "--json")
    assert result.exit_code == code
    assert json.loads(result.stdout)["exit_code"] == code


def test_json_contract(logs: Path) -> None:
    report: dict[str, Any] = json.loads(run("--nccl-log", str(logs / "timeout.log"), "--json").stdout)
    assert report["verdict"] == "fail"
    assert report["nccl_version"] is None
    pair = report["rank_pairs"][0]
    assert {key: pair[key] for key in ("src", "dst", "via", "gdr", "devs", "count")} == {
        "src": 0, "dst": 1, "via": "NET/IB", "gdr": True, "devs": [0], "count": 1,
    }  # fmt: skip
    first = report["findings"][0]
    assert set(first) >= {"id", "status", "title", "root_cause", "evidence", "remedy"}
    assert (first["id"], first["status"], first["root_cause"]) == ("log.ib-timeout", "fail", True)
    assert set(first["evidence"][0]) == {"file", "line", "text"}
    assert isinstance(first["evidence"][0]["line"], int)


def test_text_has_table_evidence_and_remedy(logs: Path) -> None:
    out = run("--nccl-log", str(logs / "sockets.log")).stdout
    assert out.startswith("WARN: ")
    assert "0 -> 1  NET/Socket" in out
    assert f"{logs / 'sockets.log'}:" in out
    assert "try: unset NCCL_IB_DISABLE" in out


def test_many_pairs_share_rows(tmp_path: Path) -> None:
    lines = [f"h:1:2 [0] NCCL INFO Channel 00/0 : {a}[0] -> {a + 1}[1] via P2P/IPC\n" for a in range(100)]
    (tmp_path / "a.log").write_text("".join(lines))
    out = run("--nccl-log", str(tmp_path / "a.log")).stdout
    assert "P2P/IPC" in out
    assert len(out.splitlines()) < 20


def test_further_files_and_ib(logs: Path) -> None:
    result = run("--nccl-log", str(logs / "ib.log"), str(logs / "sockets.log"), "--ib", "--json")
    assert result.exit_code == 2
    assert "log.sockets" in {finding["id"] for finding in json.loads(result.stdout)["findings"]}


def test_standard_input() -> None:
    result = run("--nccl-log", "-", "--json", input=P2P)
    assert json.loads(result.stdout)["nccl_version"] == "2.21.5+cuda12.4"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--nccl-log", "missing.log"), "missing.log"),
        (("train.log",), "--nccl-log"),
        (("explain", "log.ib-timeot"), "log.ib-timeout"),
        (("--only", "nothing"), "nothing"),
        (("--hosts", "-x"), "is not"),
    ],
)
def test_refusals_say_what_to_do(words: tuple[str, ...], text: str) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert text in result.stderr
    assert "try: " in result.stderr


def test_explain() -> None:
    assert "retries exceeded" in " ".join(run("explain", "log.ib-timeout").stdout.split())
    assert "/dev/shm" in run("explain", "shm.size").stdout
    ids = json.loads(run("explain", "--json").stdout)
    assert {"log.sockets", *doctor.CHECKS} <= set(ids)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run_checks(*, only: Any, skip: Any, ib: bool, hosts: Any, **others: Any) -> list[Finding]:
        found = [Finding("a", Status.PASS, "fine", host=host) for host in hosts or [""]]
        return [*found, Finding("b", Status.FAIL, "broken", True, remedy="mend it", host="n2")][: 3 if ib else -1]

    monkeypatch.setattr("aphro_core.doctor.diagnosis.run_checks", run_checks)


@pytest.mark.usefixtures("checks")
def test_checks_of_hosts() -> None:
    healthy = run("--hosts", "n1,n2")
    assert (healthy.exit_code, healthy.stdout.splitlines()[-1]) == (0, "PASS  a [n1, n2]: fine")
    broken = run("--hosts", "n1,n2", "--ib")
    assert broken.exit_code == 2
    assert "FAIL  b (root cause) [n2]: broken\n      try: mend it" in broken.stdout


@pytest.mark.usefixtures("checks")
def test_log_and_hosts_together(logs: Path) -> None:
    result = run("--nccl-log", str(logs / "ib.log"), "--hosts", "n1,n2", "--ib", "--json")
    report = json.loads(result.stdout)
    assert (result.exit_code, report["verdict"]) == (2, "fail")
    assert [finding["id"] for finding in report["findings"]][:2] == ["b", "log.gdrdma"]
    assert len(report["rank_pairs"]) == len({(0, 1), (1, 0)})
    assert IB_GDR


def test_nodes_of_the_cluster_are_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    async def run_checks(**options: Any) -> list[Finding]:
        asked.append(options["hosts"])
        return [Finding("host.ssh", Status.PASS, "reached")]

    monkeypatch.setattr("aphro_core.doctor.diagnosis.run_checks", run_checks)
    monkeypatch.setattr("aphro_core.cluster.asking.membership", lambda: None)
    monkeypatch.setattr("aphro_core.cluster.asking.read_status", lambda here: nodes_of([], [], []))
    assert run("--cluster").exit_code == 0
    assert asked == [("10.0.0.0", "10.0.0.1")]
    assert run("--cluster", "--hosts", "a").exit_code == 2
