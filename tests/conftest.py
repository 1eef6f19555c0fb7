"""Fixtures that more than one room's tests use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("busy", deadline=None)  # cores have other things to do, and a deadline tests only them
settings.load_profile("busy")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full-matrix", action="store_true", help="every family and format on every tp x pp")


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
