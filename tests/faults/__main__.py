"""``python -m tests.faults``: makes every fault, prints a table, and writes it into docs/reliability.md.

``python -m tests.faults P-01 P-06`` makes some of them and writes nothing, with ``--write`` their rows; ``--list``
names them.
"""

from __future__ import annotations

import sys
import time
import traceback

from tests.faults.case import Case, Outcome
from tests.faults.lab import Lab, open_lab
from tests.faults.page import write_page
from tests.faults.table import CASES


def run(case: Case, lab: Lab) -> tuple[Outcome, float]:
    """A case that raises has failed, with the reason as what did not hold."""
    began = time.monotonic()
    try:
        outcome = case.run(lab)
    except Exception as error:
        traceback.print_exc()
        outcome = Outcome(checks={f"{type(error).__name__}: {str(error)[-200:]}": False})
    return outcome, time.monotonic() - began


def main(words: list[str]) -> int:
    known = {"--list", "--write", *(case.id for case in CASES)}
    if unknown := [word for word in words if word not in known]:
        print(__doc__)
        return 0 if unknown == ["--help"] else 2
    if "--list" in words:
        for case in CASES:
            print(f"{case.id:6} {'fast' if case.is_fast else '    '} {case.fault}")
        return 0
    names = [word for word in words if not word.startswith("-")]
    chosen = [case for case in CASES if not names or case.id in names]
    outcomes = {}
    with open_lab() as lab:
        for case in chosen:
            outcome, seconds = run(case, lab)
            outcomes[case.id] = outcome
            figures = ", ".join(f"{name} {value}" for name, value in outcome.figures.items())
            print(f"{case.id:6} {'ok  ' if outcome.passed else 'FAIL'} {seconds:5.1f} s  {case.fault}: {figures}")
            for failure in outcome.failures:
                print(f"       not so: {failure}")
            sys.stdout.flush()
    if not names or "--write" in words:
        write_page(outcomes)
    return 0 if all(outcome.passed for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
