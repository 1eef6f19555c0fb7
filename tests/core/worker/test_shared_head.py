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
STEP: dict[type, list[str]] = {HeadOwner: ["rows", "columns"], HeadHelper: ["waited", "taken", "columns"]}


class Half:
    """Of a head of 600 outputs."""

    num_outputs = 384
    is_failing = False

    def of_outputs(self, stop: int) -> Half:
        assert stop == self.num_outputs
        return self

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        if self.is_failing:
            raise MemoryError("a fault of the allocator")
        return x.new_zeros(len(x), self.num_outputs)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    """What goes to the other stage or is taken from it, whatever comes of it."""
    found: Sent = []

    def take(x: torch.Tensor, line: Any, **options: object) -> torch.Tensor:
        found.append(("taken", x))
        return x

    def wait(stream: Any, counter: Any, count: int) -> None:
        if count:
            found.append(("waited", torch.tensor(count)))

    monkeypatch.setattr(shared_head, "put", lambda x, line, **options: found.append(("rows", x.clone())))
    monkeypatch.setattr(shared_head, "take_", take)
    monkeypatch.setattr(shared_head, "peer_columns", lambda x, peers, **options: found.append(("columns", x)))
    monkeypatch.setattr(shared_head, "wait_for_count", wait)
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
    assert [name for name, _ in sent] == STEP[kind]
    assert all(len(x) == 3 for name, x in sent if name != "waited")
    end.settle(3)
    assert len(sent) == len(STEP[kind])  # once a step
    end.begin_step()
    with end.closed():
        end.settle(3)
    assert len(sent) == len(STEP[kind])
    assert end.is_open


@pytest.mark.parametrize("kind", [HeadOwner, HeadHelper])
def test_a_step_that_fails_between_its_rows_and_their_logits_is_one_message_all_the_same(
    kind: type[HeadOwner] | type[HeadHelper], sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one would be the next step's, and all that follow would be a step behind."""
    end = end_of(kind)
    end.open()
    sent.clear()
    for _ in range(2):
        end.begin_step()
        monkeypatch.setattr(Half, "is_failing", True)
        with pytest.raises(MemoryError):
            make(end, 3)
        monkeypatch.setattr(Half, "is_failing", False)
        end.settle(3)
        end.begin_step()
        make(end, 2)
        end.settle(2)
    assert [name for name, _ in sent] == 4 * STEP[kind]
    assert [int(x) for name, x in sent if name == "waited"] == ([] if kind is HeadOwner else [4, 6, 8, 10])


def make(end: HeadOwner | HeadHelper, num_rows: int) -> None:
    """The end's part of a step, as a runner launches it where no graph is captured."""
    if isinstance(end, HeadOwner):
        end.logits(torch.zeros(num_rows, 16))
    else:
        end.help(num_rows)


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
