"""Which logits a sampler asks of the other ranks: no more than what is drawn, or read by somebody else, needs."""

from __future__ import annotations

import pytest
import torch
from aphro_kernels.peer_columns import PeerColumns, join_peer_columns, peer_columns_bytes
from torch import Tensor

from aphro_core.request import SamplingParams
from aphro_core.worker.device_sampler import DeviceSampler
from aphro_core.worker.sampler import SamplingRow

CPU = torch.device("cpu")


def build_place(max_rows: int) -> PeerColumns:
    memory = torch.zeros(peer_columns_bytes(max_rows, 300, torch.float32), dtype=torch.uint8)
    return join_peer_columns(1, 2, memory, 0, max_rows, 300, torch.float32, None)


def row_at(temperature: float) -> SamplingRow:
    return SamplingRow(
        1, SamplingParams(temperature=temperature), seed=0, position=3, token_ids=[5, 6, 7], num_prompt_tokens=3
    )


def test_rows_are_whole_where_they_have_to_be() -> None:
    place = build_place(4)
    sampler = DeviceSampler(300, 4, CPU, place)
    assert place.is_whole.tolist() == [0, 0, 0, 0]
    rows = [row_at(0.0), row_at(0.7)]
    sampler.prepare(rows)
    assert place.is_whole.tolist() == [0, 1, 0, 0]
    sampler.prepare(rows, needs_logits=True)
    assert place.is_whole.tolist() == [1, 1, 1, 1]
    sampler.prepare(rows)
    assert place.is_whole.tolist() == [0, 1, 0, 0]
    sampler.prepare([row_at(0.0)])
    assert place.is_whole.tolist() == [0, 0, 0, 0]
    sampler.prepare([], needs_logits=True)  # the host draws
    assert place.is_whole.tolist() == [1, 1, 1, 1]
    sampler.prepare([])
    assert place.is_whole.tolist() == [0, 0, 0, 0]


def test_rows_that_say_the_same_are_sent_once() -> None:
    place = build_place(2)
    sampler = DeviceSampler(300, 2, CPU, place)
    rows = [row_at(0.7)]
    sampler.prepare(rows)
    place.is_whole.fill_(5)
    sampler.prepare(rows)
    sampler.prepare(rows)
    assert place.is_whole.tolist() == [5, 5]
    sampler.prepare([], needs_logits=True)
    place.is_whole.fill_(5)
    sampler.prepare([], needs_logits=True)
    assert place.is_whole.tolist() == [5, 5]


def test_what_was_not_sent_is_sent_by_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that fails for want of memory leaves no rows behind that later ones take for theirs."""
    place = build_place(2)
    sampler = DeviceSampler(300, 2, CPU, place)
    rows = [row_at(0.7)]

    def fail(values: Tensor) -> Tensor:
        raise MemoryError

    for later, expected in ((rows, [1, 0]), ([row_at(0.0)], [0, 0]), ([], [0, 0])):
        with monkeypatch.context() as patch:
            patch.setattr(sampler, "_pin", fail)
            with pytest.raises(MemoryError):
                sampler.prepare([row_at(0.9)])
        place.is_whole.fill_(7)
        sampler.prepare(later)
        assert place.is_whole.tolist() == expected
    with monkeypatch.context() as patch:
        patch.setattr(sampler, "_pin", fail)
        with pytest.raises(MemoryError):
            sampler.prepare(rows)
    sampler.prepare(rows)
    assert place.is_whole.tolist() == [1, 0]
