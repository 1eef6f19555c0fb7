"""A tiny model, its tokens in one process, and three hosts: once a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from aphro import LLM
from tests.netns.hosts import NetnsHost, hosts
from tests.netns.small import SMALL, tokens_of
from tests.tiny import write_tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    write_tiny_checkpoint(folder, "llama")
    return folder


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    with LLM(str(model), **SMALL) as llm:
        return tokens_of(llm)


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[NetnsHost]]:
    with hosts(3) as made:
        yield made
