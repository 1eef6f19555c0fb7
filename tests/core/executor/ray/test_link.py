"""The process that speaks to Ray: refused before it starts, and its own end told to every rank."""

from __future__ import annotations

import sys
from pathlib import Path

import anyio
import pytest

from aphro_core.config import RayCluster
from aphro_core.errors import AphroError, PlacementError, UsageError
from aphro_core.executor.ray.link import RayLink, open_link
from aphro_core.remote import process


async def _open(where: RayCluster) -> None:
    async with open_link(where):
        pass


def test_refused_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(PlacementError, match=r"this host has left the cluster of 10\.0\.0\.1:1"):
        anyio.run(_open, RayCluster(address="10.0.0.1:1", token_path=str(tmp_path / "token")))
    with pytest.raises(UsageError, match="ray://head:1 is an address of Ray Client"):
        anyio.run(_open, RayCluster(address="ray://head:1"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="not installed here") as refused:
        anyio.run(_open, RayCluster(address="10.0.0.1:1"))
    assert refused.value.hint is not None
    assert "aphro[ray]" in refused.value.hint


def test_an_end_is_told() -> None:
    """Whoever waits for an answer, and the ranks, hear its last words."""
    lost: list[str] = []

    async def main() -> None:
        dying = [sys.executable, "-c", "import sys; sys.exit('GCS is gone')"]
        async with process.start(dying, None) as driver, anyio.create_task_group() as tasks:
            link = RayLink(driver, RayCluster(address="10.0.0.1:1"))
            link.on_lost = lost.append
            tasks.start_soon(link.read)
            tasks.start_soon(link.write)
            try:
                await link.look()
            finally:
                tasks.cancel_scope.cancel()

    with pytest.raises((AphroError, BaseExceptionGroup)) as failed:
        anyio.run(main)
    error = failed.value.exceptions[0] if isinstance(failed.value, BaseExceptionGroup) else failed.value
    assert str(error) == "the Ray cluster at 10.0.0.1:1: the process that speaks to Ray ended: GCS is gone"
    assert lost == ["the process that speaks to Ray ended: GCS is gone"]
