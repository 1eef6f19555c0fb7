"""One tokenizer of each kind for all tests of the frontend."""

from __future__ import annotations

import pytest

from aphro_core.frontend.tokenizer import Tokenizer
from tests.core.frontend.vocabularies import byte_level_metadata, open_with, sentencepiece_metadata


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return open_with(tmp_path_factory.mktemp("byte_level"), byte_level_metadata())


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return open_with(tmp_path_factory.mktemp("sentencepiece"), sentencepiece_metadata())
