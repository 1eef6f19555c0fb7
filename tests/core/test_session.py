"""What a start compares with: nothing that was asked too late, and one line says why there is nothing."""

from __future__ import annotations

from types import SimpleNamespace

import anyio
import pytest

from aphro_core import session
from aphro_core.session import Session


@pytest.mark.parametrize(
    ("answer", "has_ranks", "kept", "num_lines"),
    [(("a rank",), False, ("a rank",), 0), (("a rank",), True, None, 1), (None, True, None, 0)],
)
def test_an_estimate_counts_if_no_rank_has_begun(
    answer: tuple[str] | None,
    has_ranks: bool,
    kept: tuple[str] | None,
    num_lines: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who has no answer has said why."""
    monkeypatch.setattr(session, "expect_memory", lambda prepared, reporter: answer)
    said: list[str] = []
    ours = SimpleNamespace(
        prepared=None,
        _reporter=SimpleNamespace(line=said.append),
        _phases=SimpleNamespace(has_ranks=has_ranks),
        _expected=None,
    )
    anyio.run(Session.expect, ours)
    assert (ours._expected, len(said)) == (kept, num_lines)
