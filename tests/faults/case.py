"""One row of the table: a fault, when the system passes, and what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tests.faults.lab import Lab


@dataclass
class Outcome:
    """``checks`` name what had to hold and whether it did; ``figures`` are for the reader."""

    figures: dict[str, str] = field(default_factory=dict)
    checks: dict[str, bool] = field(default_factory=dict)

    def check(self, name: str, holds: bool) -> None:
        self.checks[name] = self.checks.get(name, True) and bool(holds)

    def at_most(self, name: str, seconds: float, limit: float) -> None:
        """A time, kept at its largest, with its limit."""
        earlier = float(self.figures[name].split()[0]) if name in self.figures else 0.0
        self.figures[name] = f"{max(seconds, earlier):.2f} s"
        self.check(f"{name} at most {limit:g} s", seconds <= limit)

    @property
    def passed(self) -> bool:
        return all(self.checks.values()) and bool(self.checks)

    @property
    def failures(self) -> list[str]:
        return [name for name, holds in self.checks.items() if not holds]


@dataclass(frozen=True)
class Case:
    """``is_fast``: a part of every run of the tests; the others run by ``python -m tests.faults``."""

    id: str
    fault: str
    run: Callable[[Lab], Outcome]
    is_fast: bool = False
