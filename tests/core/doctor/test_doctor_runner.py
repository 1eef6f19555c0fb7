"""The runner and its table: whatever a check does, the others go on, and every row is whole."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from aphro_core.doctor import doctor
from aphro_core.doctor.doctor import CHECKS, explain, run_checks, selected
from aphro_core.doctor.finding import Finding, Status
from aphro_core.errors import UsageError


@pytest.mark.parametrize("name", CHECKS)
def test_every_row_explains_itself(name: str) -> None:
    text = explain(name)
    assert text.startswith(f"{name}: ")
    assert len(CHECKS[name].EXPLAIN.split()) > 15
    assert any(word in text for word in ("PASS", "WARN", "FAIL", "SKIP"))


@pytest.mark.parametrize("names", [["nothing"], ["shm"], ["net.size*"]])
def test_unknown_ids_are_refused_by_name(names: list[str]) -> None:
    if names == ["shm"]:  # the start of ids stands for all of them
        assert "shm.size" in selected(names)
        return
    with pytest.raises(UsageError, match="no check is called"):
        selected(names)


def test_skip_wins_over_only() -> None:
    assert selected(["shm.*"], ["shm.size"]) == [name for name in selected(["shm.*"]) if name != "shm.size"]


def _row(name: str, check: Any) -> Any:
    return SimpleNamespace(ID=name, TITLE=name, EXPLAIN="", check=check)


@pytest.mark.anyio
async def test_a_hang_or_a_crash_is_a_finding_of_that_check_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hangs(host: Any) -> Finding:
        await anyio.sleep(60)
        raise AssertionError

    async def crashes(host: Any) -> Finding:
        raise KeyError("lost")

    async def works(host: Any) -> list[Finding]:
        return [Finding("c", Status.PASS, "fine")]

    rows = (_row("a", hangs), _row("b", crashes), _row("c", works))
    monkeypatch.setattr(doctor, "HOST_CHECKS", rows)
    monkeypatch.setattr(doctor, "CLUSTER_CHECKS", ())
    monkeypatch.setattr(doctor, "CHECKS", {row.ID: row for row in rows})
    monkeypatch.setattr(doctor, "_LIMIT_SECONDS", 0.2)
    first, second, third = await run_checks()
    assert (first.id, first.status) == ("a", Status.FAIL)
    assert "0.2 s" in first.title
    assert (second.id, second.status) == ("b", Status.WARN)
    assert "KeyError" in second.title
    assert second.evidence[0].file == __file__
    assert third == Finding("c", Status.PASS, "fine")


@pytest.mark.anyio
@pytest.mark.parametrize("target", ["-oProxyCommand=true", "a b", "a;b", "user@-x"])
async def test_what_could_be_an_option_of_ssh_is_refused(target: str) -> None:
    with pytest.raises(UsageError, match="is not"):
        await run_checks(only=["shm.size"], hosts=[target])


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
