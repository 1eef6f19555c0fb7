"""Sums of many rows that leave each rank with some rows of the residual stream: the tokens are the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from aphro_kernels.peer_rows import join_peer_rows, peer_rows_bytes, send_all, shares
from aphro_kernels.rms_norm import rms_norm_reference
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aphro_core.distributed.links import Links
from aphro_core.distributed.tensor_group import TensorParallelGroup
from aphro_core.parallel import memory
from aphro_core.peer_sums import PeerSums, Summand
from aphro_core.request import SamplingParams
from tests.core.ranks import run_ranks
from tests.core.worker.one_rank import Planner, sharding_plan
from tests.core.worker.test_device_runner import device_runner
from tests.core.worker.test_model_runner import Model


@given(st.integers(0, 500), st.integers(1, 9))
def test_shares_are_all_rows_once_and_none_is_larger_than_its_place(num_rows: int, size: int) -> None:
    found = shares(num_rows, size)
    assert [row for rows in found for row in rows] == list(range(num_rows))
    assert len(found) == size
    assert all(len(rows) <= -(-num_rows // size) for rows in found)


@given(st.integers(512, 700), st.integers(2, 5))
def test_a_summand_stands_with_those_who_add_it_up(num_rows: int, size: int) -> None:
    width = 3
    memories = [torch.zeros(peer_rows_bytes(size, 700, width, torch.float32), dtype=torch.uint8) for _ in range(size)]
    ends = [join_peer_rows(rank, memories, 700, width, torch.float32, None) for rank in range(size)]
    x = torch.randn(num_rows, width)
    for rank in range(size):
        send_all(x * (rank + 1), ends[rank])
    for rank in range(size):
        for owner, rows in enumerate(shares(num_rows, size)):  # none has written over another's
            place = ends[rank].places[owner]
            assert (place is None) == (owner == rank)
            assert place is None or torch.equal(place[: len(rows)], x[rows.start : rows.stop] * (rank + 1))
    assert 0 < memories[0].nbytes - memory.peer_bytes(width, size, 700, 4) < 2**16  # the flags


@given(st.integers(1, 5000), st.integers(2, 5))
def test_parts_are_all_rows_and_a_rank_makes_its_own_last(num_rows: int, size: int) -> None:
    memories = [torch.zeros(peer_rows_bytes(size, 4096, 1, torch.float32), dtype=torch.uint8) for _ in range(size)]
    for rank in range(size):
        parts = PeerSums(None, join_peer_rows(rank, memories, 4096, 1, torch.float32, None), None).parts(num_rows)
        assert bool(parts) == (512 * size <= num_rows <= 4096)
        if parts:
            assert dict(parts) == dict(enumerate(shares(num_rows, size)))
            assert parts[-1][0] == rank


class Sharing(TensorParallelGroup):
    """By Gloo what GPUs do by peer memory; rows of the residual that a rank does not own are spoilt."""

    def __init__(self, inner: TensorParallelGroup, *, shares_out: bool) -> None:
        super().__init__(inner.rank, inner.size, inner._group)
        self._shares_out = shares_out
        self.log: list[bool] = []

    def can_share_out(self, num_rows: int) -> bool:
        return self._shares_out

    def add_rms_norm_(
        self, residual: Tensor, x: Summand, weight: Tensor, eps: float, *, shares_out: bool = False
    ) -> Tensor | None:
        self.log.append(shares_out)
        if not self._shares_out:
            return None
        own = shares(len(residual), self.size)[self.rank]
        if self.log[-2:-1] == [True]:  # each rank knows its own rows
            residual[: own.start], residual[own.stop :] = 0.0, 0.0
            residual.copy_(super().all_reduce_(residual))
            self.num_sums -= 1
        residual.add_(self.all_reduce_(x))
        normed = rms_norm_reference(residual, weight, eps)
        if shares_out:
            residual[: own.start], residual[own.stop :] = math.nan, math.nan
        return normed


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3"])
def test_tokens_do_not_hang_on_who_has_the_residual(tmp_path: Path, family: str) -> None:
    model = Model(family, tmp_path)

    def rank_of_group(links: Links, rank: int) -> Any:
        tokens = []
        for shares_out in (False, True):
            group = Sharing(links.tensor, shares_out=shares_out)
            ours = Links(group, links.stage)
            runner, planner = device_runner(model, ours, tp=2, rank=rank), Planner()
            for seq_id in range(2):
                planner.add(seq_id, [3, 5, 8, 13, 21, 34], SamplingParams(temperature=0.0))
            steps = [runner.launch(planner.plan(share)) for share in ({0: 5, 1: 6}, {0: 1})]
            tokens.append([None if step is None else step.result().token_ids for step in steps])
            assert any(group.log) == (shares_out and family != "gemma3")  # it has norms behind the sums
            assert not any(group.log[-2:])  # the last layer has all of it
        return tokens

    (plain, shared), (nothing, _) = run_ranks(tmp_path, sharding_plan(tmp_path, 2, 1), rank_of_group)
    assert plain == shared
    assert nothing == [None] * 2
