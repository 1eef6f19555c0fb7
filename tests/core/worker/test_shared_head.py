"""What a first or last stage owes the other when a step with a shared head fails, and what it does not."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aphro_core.worker import shared_head
from aphro_core.worker.shared_head import HeadHelper, HeadOwner

Sent = list[tuple[str, torch.Tensor]]


class Half:
    """Of a head of 600 outputs."""

    num_outputs = 384

    def of_outputs(self, stop: int) -> Half:
        assert stop == self.num_outputs
        return self

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return x.new_zeros(len(x), self.num_outputs)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    """What goes to the other stage, whatever comes of it."""
    found: Sent = []
    monkeypatch.setattr(shared_head, "put", lambda x, line, **options: found.append(("rows", x.clone())))
    monkeypatch.setattr(shared_head, "take_", lambda x, line, **options: x)
    monkeypatch.setattr(shared_head, "peer_columns", lambda x, peers, **options: found.append(("columns", x)))
    monkeypatch.setattr(shared_head, "wait_for_count", lambda *arguments: None)
    monkeypatch.setattr(shared_head, "Linear", lambda *arguments, **options: Half())
    monkeypatch.setattr(torch.cuda, "Stream", lambda *arguments, **options: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    return found


def ends() -> Any:
    line = SimpleNamespace(words=16, programs=2, written=None)
    return SimpleNamespace(line=line, columns=SimpleNamespace(rows=torch.zeros(8, 600)))


def end_of(kind: type[HeadOwner] | type[HeadHelper]) -> HeadOwner | HeadHelper:
    if kind is HeadOwner:
        return HeadOwner(ends(), Half())  # type: ignore[arg-type]
    return HeadHelper(ends(), torch.device("cpu"))


@pytest.mark.parametrize("kind", [HeadOwner, HeadHelper])
def test_a_failed_step_owes_what_the_other_stage_waits_for(
    kind: type[HeadOwner] | type[HeadHelper], sent: Sent
) -> None:
    end = end_of(kind)
    end.settle(3)
    assert sent == []  # not shared yet
    end.open()
    sent.clear()
    end.begin_step()
    end.settle(3)
    assert [name for name, _ in sent] == (["rows", "columns"] if kind is HeadOwner else ["columns"])
    assert all(len(x) == 3 for _, x in sent)
    end.settle(3)
    assert len(sent) == (2 if kind is HeadOwner else 1)  # once a step
    end.begin_step()
    with end.closed():
        end.settle(3)
    assert len(sent) == (2 if kind is HeadOwner else 1)
    assert end.is_open


def test_nothing_is_drawn_of_a_step_that_has_failed_on_the_last_stage(sent: Sent) -> None:
    owner = end_of(HeadOwner)
    owner.is_open = True
    owner.settle(5)
    assert bool(sent[0][1].isnan().all())


def test_a_step_that_was_made_together_owes_nothing(sent: Sent) -> None:
    helper = end_of(HeadHelper)
    assert isinstance(helper, HeadHelper)
    helper.open()
    helper.begin_step()
    helper.help(2)
    sent.clear()
    helper.settle(2)
    assert sent == []
