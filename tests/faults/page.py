"""docs/reliability.md: what was measured, case by case."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.faults.case import Case, Outcome
from tests.faults.table import CASES

PAGE = Path(__file__).parent.parent.parent / "docs" / "reliability.md"
_BEGIN, _END = "<!-- table -->", "<!-- end of table -->"


def write_page(outcomes: Mapping[str, Outcome]) -> None:
    """Replace the rows of these cases in the table of the page, and nothing else of it."""
    before, rest = PAGE.read_text().split(_BEGIN)
    table, after = rest.split(_END)
    earlier = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("| ")}
    rows = ["| case | fault | measured | holds |", "| --- | --- | --- | --- |"]
    for case in CASES:
        if case.id in outcomes:
            rows.append(_row(case, outcomes[case.id]))
        elif case.id in earlier:
            rows.append(earlier[case.id])
    PAGE.write_text(f"{before}{_BEGIN}\n\n" + "\n".join(rows) + f"\n\n{_END}{after}")


def _row(case: Case, outcome: Outcome) -> str:
    figures = ", ".join(f"{name} {value}" for name, value in outcome.figures.items())
    holds = "yes" if outcome.passed else "no: " + "; ".join(outcome.failures)
    return f"| {case.id} | {case.fault} | {figures} | {holds} |"
