"""The fast part of the fault suite; ``python -m tests.faults`` makes every fault and writes docs/reliability.md."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.case import Case
from tests.faults.lab import Lab, open_lab
from tests.faults.table import CASES


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with open_lab() as lab:
        yield lab


@pytest.mark.parametrize("case", [case for case in CASES if case.is_fast], ids=lambda case: case.id)
def test_fault(lab: Lab, case: Case) -> None:
    outcome = case.run(lab)
    assert outcome.passed, (outcome.failures, outcome.figures)
