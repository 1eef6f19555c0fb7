"""The published logs beside the bench, which the estimate was not built on: it stays near them."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    script, cases = ROOT / "bench" / "estimate_cases.py", ROOT / "bench" / "estimate_held_out.json"
    done = subprocess.run([sys.executable, script, cases, "--json"], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_sizes_are_near_the_printed_ones(rows: list[dict[str, Any]]) -> None:
    errors = sorted(abs(row["error"]) for row in rows if row["error"] is not None)
    assert len(errors) >= 40
    assert statistics.median(errors) <= 0.02
    assert sum(error > 0.2 for error in errors) <= 4


def test_every_case_is_computed_or_says_why_not(rows: list[dict[str, Any]]) -> None:
    assert all(row["error"] is not None or row["why"] for row in rows)
