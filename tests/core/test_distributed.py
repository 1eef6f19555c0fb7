"""Collectives over Gloo in processes of their own: sums equal in every bit, gathered logits, hand-over of stages."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch
from aphro_kernels.peer_all_reduce import join_peer_memory, peer_bytes
from aphro_kernels.peer_columns import PeerColumns, join_peer_columns, peer_columns_bytes
from aphro_kernels.peer_rows import join_peer_rows, peer_rows_bytes

from aphro_core import peer_sums
from aphro_core.distributed import peer_meeting, tensor_group
from aphro_core.distributed.links import Links
from aphro_core.distributed.peer_meeting import PeerMeeting
from aphro_core.distributed.stage_lines import Messages, open_lines
from aphro_core.distributed.tensor_group import TensorParallelGroup
from aphro_core.parallel.shard import build_plan
from tests.core.ranks import run_ranks
from tests.core.worker.test_batch import SPEC


def test_alone_everything_is_the_identity() -> None:
    group, x = TensorParallelGroup(0, 1), torch.randn(3, 4)
    assert group.all_reduce_(x) is x
    assert group.gather_columns(x) is x
    assert group.gather_columns(x, torch.zeros(3, 2)).tolist() == x[:, :2].tolist()


def sums(links: Links, rank: int) -> dict[str, list[float]]:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (1, 7, 600):
            x = torch.randn(rows, 33, generator=torch.Generator().manual_seed(rank)).to(dtype)
            found[f"{dtype} {rows}"] = links.tensor.all_reduce_(x).float().flatten().tolist()
    return found


@pytest.mark.parametrize("tp", [2, 3])
def test_every_rank_gets_the_same_bits(tmp_path: Path, tp: int) -> None:
    answers = run_ranks(tmp_path, build_plan(SPEC, tp, 1), sums)
    assert all(answer == answers[0] for answer in answers)
    parts = [torch.randn(7, 33, generator=torch.Generator().manual_seed(rank)) for rank in range(tp)]
    torch.testing.assert_close(torch.tensor(answers[0]["torch.float32 7"]), sum(parts).flatten())
    torch.testing.assert_close(torch.tensor(answers[0]["torch.bfloat16 7"]), sum(parts).flatten(), rtol=0.02, atol=0.03)


def gather(links: Links, rank: int) -> Any:
    x = torch.arange(6.0).view(2, 3)[:, :2] + 10 * rank
    places = [None, *(torch.zeros(2, width, dtype=torch.float64) for width in (4, 3, 2))]
    gathered = [links.tensor.gather_columns(x, place) for place in places]
    return [[] if one is None else one.tolist() for one in gathered]


def test_what_any_rank_has_chosen(tmp_path: Path) -> None:
    def choose(links: Links, rank: int) -> list[int]:
        return links.tensor.union([0, 3 + rank, 6], 7, torch.device("cpu"))

    assert run_ranks(tmp_path, build_plan(SPEC, 2, 1), choose) == [[0, 3, 4, 6]] * 2
    assert TensorParallelGroup(0, 1).union([2, 0], 7, torch.device("cpu")) == [0, 2]


def test_columns_go_to_the_first_rank_of_their_stage(tmp_path: Path) -> None:
    """Of the whole, or as many as there is a place for: what pads the vocabulary stays behind."""
    first, second, third, fourth = run_ranks(tmp_path, build_plan(SPEC, 2, 2), gather)
    for answers, least in ((first, 0), (third, 20)):
        rows = [[least + column for column in (0.0, 1.0, 10.0, 11.0)], [least + column for column in (3, 4, 13, 14)]]
        assert answers == [[row[:width] for row in rows] for width in (4, 4, 3, 2)]
    assert second == fourth == [[]] * 4


def hand_over(links: Links, rank: int) -> Any:
    """40 hidden states in order, sent ahead of their receiver and bounded in number; strided ones too."""
    if rank == 0:
        for i in range(40):
            links.stage.send(torch.full((64, 6), float(i))[:, ::2])
        return len(links.stage._sending)
    if rank == 1:
        time.sleep(0.3)
        for _ in range(40):
            x = links.stage.receive((64, 3), torch.float32, torch.device("cpu"))
            links.stage.send(x + 100)
        return 0
    return [links.stage.receive((64, 3), torch.float32, torch.device("cpu")).unique().tolist() for _ in range(40)]


def test_hand_over_keeps_order_and_memory(tmp_path: Path) -> None:
    first, _, last = run_ranks(tmp_path, build_plan(SPEC, 1, 3), hand_over)
    assert last == [[100.0 + i] for i in range(40)]
    assert first <= 3  # as many as plans can be in flight, not one for every step


def run_ahead(links: Links, rank: int) -> float:
    started = time.monotonic()
    if rank == 0:
        for _ in range(3):
            links.stage.send(torch.zeros(1000))
        return time.monotonic() - started
    time.sleep(1.0)
    for _ in range(3):
        links.stage.receive((1000,), torch.float32, torch.device("cpu"))
    return time.monotonic() - started


def test_a_stage_goes_on_while_the_next_is_busy(tmp_path: Path) -> None:
    first, second, _ = run_ranks(
        tmp_path, build_plan(SPEC, 1, 3), lambda links, rank: run_ahead(links, rank) if rank < 2 else 0.0
    )
    assert first < 0.5 < second


def silence(links: Links, rank: int) -> Any:
    if rank == 0:
        return None
    with pytest.raises(RuntimeError, match="Timed out"):
        links.stage.receive((4,), torch.float32, torch.device("cpu"))
    return ["raised"]


def test_a_silent_peer_ends_in_an_error(tmp_path: Path) -> None:
    assert run_ranks(tmp_path, build_plan(SPEC, 1, 2), silence, timeout_seconds=2.0)[1] == ["raised"]


def test_sums_go_by_peer_memory_if_there_is_any(monkeypatch: pytest.MonkeyPatch) -> None:
    sums: list[str] = []

    def by_peers(name: str) -> Any:
        def add(x: torch.Tensor, peers: object, *, is_fatal: bool, out: torch.Tensor, **others: object) -> torch.Tensor:
            assert is_fatal, "a rank that is gone must not go unnoticed"
            sums.append(name)
            return out

        return add

    monkeypatch.setattr(peer_sums, "peer_all_reduce", by_peers("few"))
    monkeypatch.setattr(peer_sums, "peer_two_shot", by_peers("many"))
    monkeypatch.setattr(tensor_group.dist, "all_reduce", lambda x, group: sums.append("library"))
    group = TensorParallelGroup(0, 2)
    x = torch.zeros(4, 16)
    assert group.all_reduce_(x) is x
    memory = torch.zeros(peer_bytes(2, 4, 16, torch.float32), dtype=torch.uint8)
    few = join_peer_memory(0, memory, [0, 0], 4, 16, torch.float32, None)
    memories = [torch.zeros(peer_rows_bytes(2, 600, 16, torch.float32), dtype=torch.uint8) for _ in range(2)]
    many = join_peer_rows(0, memories, 600, 16, torch.float32, None)
    group._peers = peer_sums.PeerSums(few, many, None)
    assert group.all_reduce_(x) is x
    for num_rows in (512, 600, 601):
        group.all_reduce_(torch.ones(num_rows, 16))
    assert many.places[1] is not None
    assert many.places[1].sum() == 300 * 16  # what the other rank adds up is there
    for other in (torch.zeros(5, 16), torch.zeros(4, 15), torch.zeros(0, 16), x.half(), torch.zeros(16, 4).T, x[0]):
        group.all_reduce_(other)
    assert sums == ["library", "few", "many", "many"] + ["library"] * 7
    assert group.num_sums == len(sums)


class NamedStream:
    def __init__(self, name: str, order: list[str]) -> None:
        self._name, self._order = name, order

    def wait_stream(self, other: NamedStream) -> None:
        self._order.append(f"{self._name} waits for {other._name}")


def test_what_was_sent_of_a_step_that_failed_has_arrived_before_its_dues_are_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So no row of it, nor of what stands in its memory by now, comes behind the NaN that its rank owes."""
    order: list[str] = []
    copies, layers = (cast("torch.cuda.Stream", NamedStream(name, order)) for name in ("copies", "layers"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: layers)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(peer_sums, "send", lambda x, owner, peers: order.append("a part"))
    monkeypatch.setattr(peer_sums, "send_all", lambda x, peers: order.append("all rows"))
    monkeypatch.setattr(peer_sums, "peer_two_shot", lambda x, peers, **options: x)
    memories = [torch.zeros(peer_rows_bytes(2, 600, 16, torch.float32), dtype=torch.uint8) for _ in range(2)]
    sums = peer_sums.PeerSums(None, join_peer_rows(0, memories, 600, 16, torch.float32, None), copies)
    sums.send(torch.zeros(600, 16), 1)
    sums.add(torch.full((600, 16), torch.nan))
    assert order == ["copies waits for layers", "a part", "layers waits for copies", "all rows"]


@pytest.mark.parametrize("rank", [0, 1])
def test_logits_that_are_drawn_from_go_by_peer_memory_if_there_is_any(
    monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    written: list[int] = []

    def by_peers(x: torch.Tensor, peers: PeerColumns, *, is_fatal: bool) -> torch.Tensor:
        assert is_fatal, "a rank that is gone must not go unnoticed"
        written.append(len(x))
        return peers.rows[: len(x)]

    monkeypatch.setattr(tensor_group, "peer_columns", by_peers)
    group = TensorParallelGroup(rank, 2)
    assert group.logits is None
    memory = torch.zeros(peer_columns_bytes(4, 10, torch.float32), dtype=torch.uint8)
    group._columns = join_peer_columns(rank, 2, memory, 0, 4, 10, torch.float32, None)
    assert group.logits is not None
    assert group.logits.rows.shape == (4, 10)
    found = group.gather_columns(torch.zeros(3, 8), group.logits.rows[:3])
    assert (found is None) == (rank == 1)
    assert written == [3]
    assert group.num_gathers == 1
    monkeypatch.setattr(group, "_gather", lambda x: torch.stack([x, x]))
    found = group.gather_columns(torch.zeros(2, 8))  # other rows, which nobody draws from
    assert found is None if rank else found.shape == (2, 16)
    assert written == [3]


def connect(links: Links, rank: int) -> bool:
    links.tensor.connect(33, torch.float32, torch.device("cpu"), 2048)
    return links.tensor._peers is None


def test_cpus_have_no_peer_memory(tmp_path: Path) -> None:
    assert run_ranks(tmp_path, build_plan(SPEC, 2, 1), connect) == [True, True]


CPU = torch.device("cpu", 0)  # stands for a GPU where only votes travel
SHAPE = (33, torch.float32, 2048)


def meeting(links: Links) -> PeerMeeting:
    group = links.tensor
    return PeerMeeting(group.rank, group.size, group._group, CPU, "tensor-parallel sums all go by NCCL")


def refusals(links: Links, rank: int, caplog: pytest.LogCaptureFixture) -> tuple[bool, list[str]]:
    """Whether sums stay with the library, and what this rank says of it."""
    links.tensor._peers = meeting(links).connect(*SHAPE)
    return links.tensor._peers is None, [record.getMessage() for record in caplog.records]


def lose_memory(rank_without: int) -> Callable[..., object]:
    def allocate(*shape: object) -> object:
        if torch.distributed.get_rank() >= rank_without:
            raise torch.OutOfMemoryError("CUDA out of memory: 56 MiB")
        return object()

    return allocate


def test_a_rank_without_memory_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No rank goes to a rendezvous that another one will not come to; the first one without memory says so, alone."""
    monkeypatch.setattr(PeerMeeting, "_unreached", lambda self: None)
    monkeypatch.setattr(peer_meeting, "allocate_peer_buffers", lose_memory(1))
    monkeypatch.setattr(peer_meeting, "build_peer_sums", lambda *shape: torch.distributed.barrier())
    answers = run_ranks(tmp_path, build_plan(SPEC, 3, 1), lambda *place: refusals(*place, caplog), answer_seconds=20)
    assert [is_refused for is_refused, _ in answers] == [True] * 3
    (line,) = (line for _, lines in answers for line in lines)
    assert line.startswith("tensor-parallel sums all go by NCCL: no peer memory on cpu:0 of ")
    assert line.endswith(": CUDA out of memory: 56 MiB")
    assert answers[1][1] == [line]


def test_a_rank_that_fails_where_others_wait_for_it_is_not_waited_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in torch's rendezvous, which waits in the store. What all do next, all do again together."""
    monkeypatch.setattr(PeerMeeting, "_unreached", lambda self: None)
    monkeypatch.setattr(peer_meeting, "allocate_peer_buffers", lambda *shape: object())

    def connect(links: Links, rank: int) -> tuple[tuple[bool, list[str]], float, list[float]]:
        def build(*shape: object) -> object:
            if rank == 1:
                raise torch.OutOfMemoryError("CUDA out of memory: 2 MiB")
            links.store.wait(["what rank 1 has to show"])  # type: ignore[union-attr]
            return object()

        peer_meeting.build_peer_sums = build  # type: ignore[assignment]
        began = time.monotonic()
        with links.hurried(0.3, 30.0):
            answer = refusals(links, rank, caplog)
        assert links.store is not None
        assert links.store.timeout.total_seconds() == 30.0
        return answer, time.monotonic() - began, links.tensor.all_reduce_(torch.full((2,), rank + 1.0)).tolist()

    answers = run_ranks(tmp_path, build_plan(SPEC, 2, 1), connect, answer_seconds=20)
    assert all(is_refused and seconds < 8.0 for (is_refused, _), seconds, _ in answers)
    lines = [line for (_, lines), _, _ in answers for line in lines]
    assert len(lines) == 1, lines
    assert [total for _, _, total in answers] == [[3.0, 3.0]] * 2


@pytest.mark.parametrize("tp", [1, 2])
def test_stages_without_peer_memory_hand_on_by_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tp: int
) -> None:
    """One line says so, if it could have been otherwise; tokens have a way of their own past the hosts."""
    plan = build_plan(SPEC, tp, 3)
    monkeypatch.setattr(PeerMeeting, "_is_on_one_host", lambda self: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def hand_on(links: Links, rank: int) -> tuple[list[str], list[int], bool]:
        links = open_lines(links, plan, rank, Messages(4, 64, 4), CPU, nullcontext())
        shard, x, tokens = plan.ranks[rank], torch.zeros(2, 3), torch.full((2,), rank)
        if not shard.has_embedding:
            links.stage.receive_(x)
        if not shard.has_head:
            links.stage.send(x + 1)
        elif links.tokens is not None:
            links.tokens.send(tokens)
        drawn = links.tokens.receive(2, CPU).tolist() if links.tokens and shard.has_embedding else []
        assert (x == shard.pp_rank).all()
        links.meet(CPU)  # what is on its way lives as long as its link
        return [record.getMessage() for record in caplog.records], drawn, links.stage.is_alone

    answers = run_ranks(tmp_path, plan, hand_on)
    lines = [line for lines, *_ in answers for line in lines]
    assert lines == ["stages hand on all by NCCL: its ranks are on several hosts"] * (tp == 1)
    assert [drawn for _, drawn, _ in answers[:tp]] == [[rank + 2 * tp] * 2 for rank in range(tp)]
    assert not any(is_alone for *_, is_alone in answers)


def test_ranks_wait_for_a_late_one(tmp_path: Path) -> None:
    def meet(links: Links, rank: int) -> tuple[float, float]:
        time.sleep(0.5 * rank)
        came = time.monotonic()
        links.meet(CPU)
        return came, time.monotonic()

    times = run_ranks(tmp_path, build_plan(SPEC, 1, 3), meet)
    assert min(left for _, left in times) >= max(came for came, _ in times)


def fail_in_rendezvous(*shape: object) -> object:
    raise RuntimeError("pidfd_getfd: Operation not permitted")


@pytest.mark.parametrize("why", ["several hosts", "does not reach the memory of GPU 2", "not permitted", ""])
def test_what_forbids_peer_memory_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    """GPUs that no rank of the group has are not asked."""
    unreached = 2 if "GPU" in why else 1
    monkeypatch.setattr(PeerMeeting, "_is_on_one_host", lambda self: "hosts" not in why)
    monkeypatch.setattr(PeerMeeting, "_gpus_of_all", lambda self: [0, 2])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, other: other != unreached)
    monkeypatch.setattr(peer_meeting, "allocate_peer_buffers", lambda *shape: object())
    build = fail_in_rendezvous if "permitted" in why else lambda *shape: object()
    monkeypatch.setattr(peer_meeting, "build_peer_sums", build)
    answers = run_ranks(tmp_path, build_plan(SPEC, 2, 1), lambda *place: refusals(*place, caplog))
    assert [is_refused for is_refused, _ in answers] == [bool(why)] * 2
    lines = [line for _, lines in answers for line in lines]
    assert len(lines) == bool(why)
    assert all(line.startswith("tensor-parallel sums all go by NCCL: ") and line.endswith(why) for line in lines)


def test_a_gpu_that_a_rank_does_not_see_is_none_that_it_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in containers of one host with different numbers of GPUs: torch would raise on that rank alone."""
    met = PeerMeeting(1, 2, None, CPU, "sums go")
    monkeypatch.setattr(met, "_gpus_of_all", lambda: [3, 0])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", mock.Mock(side_effect=AssertionError("Invalid peer")))
    assert met._unreached() == "GPU 0 does not reach the memory of GPU 3"


def test_peers_buffers_come_when_all_agree_and_what_loading_left_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("emptied"))
    monkeypatch.setattr(peer_meeting, "allocate_peer_buffers", lambda *shape: done.append("allocated") or object())
    monkeypatch.setattr(peer_meeting, "build_peer_sums", lambda *shape: done.append("built"))

    def connect(links: Links, rank: int) -> list[str]:
        meeting(links).connect(*SHAPE)
        return done

    assert run_ranks(tmp_path, build_plan(SPEC, 2, 1), connect) == [["emptied", "allocated", "built"]] * 2
