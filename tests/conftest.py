"""Fixtures that more than one room's tests use."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.fork_servers import KeptForkServers

# several tests run beside each other: threads that spin at OpenMP's barriers would take the cores from one another.
# Said before torch is loaded, and inherited by every process that a test starts
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# a shell's background jobs ignore SIGINT, and so would every process that a test starts and interrupts
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# under nohup they would ignore SIGHUP; a handler is not inherited, and lets the tests themselves go on
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

settings.register_profile("busy", deadline=None)  # cores have other things to do, and a deadline tests only them
settings.load_profile("busy")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full-matrix", action="store_true", help="every family and format on every tp x pp")


# what takes long, in seconds a test, begins first, so that no process is left alone with it at the end
_FIRST = ("netns", "faults", "e2e", "kernels")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        room = item.nodeid.split("/")[1]
        return _FIRST.index(room) if room in _FIRST else len(_FIRST)

    items.sort(key=place)


def smollm2_path() -> Path:
    """Where ``python3 quickstart.py model`` keeps SmolLM2-135M-Instruct; APHRO_SMOLLM2 points elsewhere."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("APHRO_SMOLLM2") or cache / "aphro" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    path = smollm2_path()
    if not path.exists():
        pytest.skip("SmolLM2 is not in the cache: python3 quickstart.py model")
    return path


@pytest.fixture(scope="session")
def kept_fork_servers() -> Iterator[KeptForkServers]:
    from tests.fork_servers import KeptForkServers

    kept = KeptForkServers()
    yield kept
    kept.close()


@pytest.fixture
def warm_start(kept_fork_servers: KeptForkServers, monkeypatch: pytest.MonkeyPatch) -> None:
    """``LLM(...)`` forks its engine from a server that is there: for tests whose subject is not the start."""
    monkeypatch.setattr("aphro_core.session.open_fork_server", kept_fork_servers.open)
