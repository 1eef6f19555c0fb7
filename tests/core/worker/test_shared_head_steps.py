"""Two stages that share a head, step after step: runners on two threads, which wait for each other as two GPUs do.

Nothing is where no end has written it: of each row there is -inf but for what is drawn from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from aphro_kernels.peer_columns import PeerColumns, join_peer_columns, peer_columns_bytes
from torch.utils._python_dispatch import _disable_current_modes

from aphro_core.checkpoint.open import open_checkpoint
from aphro_core.distributed.links import HeadLine, Links
from aphro_core.distributed.stage_links import StageLink, TokenLink
from aphro_core.distributed.tensor_group import TensorParallelGroup
from aphro_core.messages.steps import StepPlan, StepResult
from aphro_core.models.registry import load_spec
from aphro_core.parallel.shard import head_halves
from aphro_core.request import SamplingParams
from aphro_core.worker import shared_head
from aphro_core.worker.device_runner import DeviceRunner
from aphro_core.worker.loader import load_weights
from aphro_core.worker.shared_head import HeadHelper, HeadOwner
from tests.core.worker.one_rank import CPU, Planner, sharding_plan
from tests.core.worker.product import Product
from tests.core.worker.test_device_runner import device_runner
from tests.core.worker.test_failed_steps import FailAt
from tests.tiny import write_tiny_checkpoint

SECONDS = 20.0  # after which an end waits in vain
VOCAB, MAX_ROWS = 700, 11
PROMPTS = [[7 * i * (seq_id + 2) % 690 for i in range(length)] for seq_id, length in enumerate((9, 5, 21, 14, 6))]
GREEDY = SamplingParams(temperature=0.0)


class Wires:
    """What two GPUs of one host have between them."""

    def __init__(self) -> None:
        self.hidden, self.tokens, self.rows, self.parts = (Queue[Any]() for _ in range(4))
        self.messages: list[int] = []  # rows of each
        self.of_owner: PeerColumns | None = None

    def put(self, x: torch.Tensor, line: Any, **options: object) -> None:
        with _disable_current_modes():
            assert self.of_owner is not None
            self.of_owner.rows.fill_(-torch.inf)  # the helper writes behind this
            self.messages.append(len(x))
            self.rows.put(x.clone())

    def take_(self, x: torch.Tensor, line: Any, **options: object) -> torch.Tensor:
        with _disable_current_modes():
            return x.copy_(self.rows.get(timeout=SECONDS))

    def peer_columns(self, x: torch.Tensor, peers: PeerColumns, **options: object) -> None:
        with _disable_current_modes():
            assert self.of_owner is not None
            start, columns = peers.rank * x.shape[1], peers.rows.shape[1]
            for row, logits in enumerate(x[:, : columns - start]):
                best = int(logits.argmax()) // 128 * 128
                kept = slice(None) if peers.is_whole[row] else slice(best, best + 128)
                self.of_owner.rows[row, start : start + x.shape[1]][kept] = logits[kept]
            if peers.rank:
                self.parts.put(len(x))
            else:
                assert self.parts.get(timeout=SECONDS) == len(x)


class WiredStage(StageLink):
    def __init__(self, wires: Wires, rank: int) -> None:
        super().__init__(0 if rank else None, None if rank else 1)
        self._wires = wires

    def receive_(self, x: torch.Tensor) -> torch.Tensor:
        with _disable_current_modes():
            x.copy_(self._wires.hidden.get(timeout=SECONDS))
        self.has_received = True
        return x

    def send(self, x: torch.Tensor) -> None:
        with _disable_current_modes():
            self._wires.hidden.put(x.clone())
        self.has_sent = True


class WiredTokens(TokenLink):
    def __init__(self, wires: Wires) -> None:
        super().__init__(0, None)
        self._wires = wires

    def send(self, tokens: torch.Tensor) -> None:
        with _disable_current_modes():
            self._wires.tokens.put(tokens.clone())
        self.has_passed = True

    def receive(self, count: int, device: torch.device) -> torch.Tensor:
        tokens: torch.Tensor = self._wires.tokens.get(timeout=SECONDS)
        assert len(tokens) == count
        return tokens


class Stage:
    """One of both, as a worker leads it: a step that fails is settled, and so are those behind it."""

    def __init__(self, model: Any, wires: Wires, rank: int) -> None:
        with open_checkpoint(model.folder) as checkpoint:
            spec, shard = load_spec(checkpoint.hf_config), sharding_plan(model.folder, 1, 2).ranks[1]
            weight = load_weights(checkpoint, spec, shard, torch.float32, CPU)["lm_head.weight"]
        assert isinstance(weight, torch.Tensor)
        shape = (MAX_ROWS, VOCAB, torch.float32)
        memory = torch.zeros(peer_columns_bytes(*shape), dtype=torch.uint8)
        columns = join_peer_columns(1 - rank, 2, memory, 0, *shape, None)
        line: Any = SimpleNamespace(words=spec.hidden_size, programs=1, written=None)
        self.head: HeadOwner | HeadHelper
        if rank:
            wires.of_owner = columns
            self.head = HeadOwner(HeadLine(line, columns), Product(weight))  # type: ignore[arg-type]
        else:
            self.head = HeadHelper(HeadLine(line, columns), CPU)
            self.head._weight[: self.head._num_outputs] = weight[head_halves(VOCAB)[1].start : VOCAB]
        self.links = Links(TensorParallelGroup(0, 1), WiredStage(wires, rank), WiredTokens(wires))
        self.runner: DeviceRunner = device_runner(model, self.links, 1, 2, rank, head=self.head)
        self.head.is_open = True
        self.has_failed = False

    def step(self, plan: StepPlan, fault: FailAt | None = None) -> StepResult | None:
        self.links.begin_step()
        self.head.begin_step()
        self.has_failed &= not plan.forgets_all
        if not self.has_failed:
            try:
                with fault or nullcontext():
                    step = self.runner.launch(plan)
                return None if step is None else step.result()
            except MemoryError:
                self.has_failed = True
        self.runner.settle(plan)
        return None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("model")
    write_tiny_checkpoint(folder, "llama", vocab_size=VOCAB)
    return SimpleNamespace(folder=folder)


@pytest.fixture
def wires(monkeypatch: pytest.MonkeyPatch) -> Wires:
    found = Wires()
    for name in ("put", "take_", "peer_columns"):
        monkeypatch.setattr(shared_head, name, getattr(found, name))
    monkeypatch.setattr(shared_head, "wait_for_count", lambda *arguments: None)
    monkeypatch.setattr(shared_head, "Linear", Product)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *arguments, **options: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    return found


@pytest.fixture
def both(model: Any, wires: Wires) -> Iterator[Callable[..., StepResult]]:
    """Make a step of a plan on both stages, one of which may have a fault in it."""
    stages = [Stage(model, wires, rank) for rank in range(2)]
    with ThreadPoolExecutor(2) as threads:

        def step(plan: StepPlan, faults: Sequence[FailAt | None] = (None, None)) -> StepResult:
            made = [threads.submit(stage.step, plan, fault) for stage, fault in zip(stages, faults, strict=True)]
            _, result = [one.result(2 * SECONDS) for one in made]
            assert wires.rows.empty()
            assert wires.parts.empty()
            assert wires.hidden.empty()
            return result or StepResult(plan.step_id, [])

        yield step


def test_rows_of_every_kind_get_what_one_gpu_gives_them(model: Any, wires: Wires, both: Any) -> None:
    """Greedy, drawn, and those that the host draws or looks at, which come and go: alone, beside chunks, and where a
    prompt is cut so that one of its tokens stands alone."""
    dials = [
        GREEDY,
        SamplingParams(temperature=0.8),
        SamplingParams(temperature=0.0, prompt_logprobs=2),
        SamplingParams(temperature=0.0, logprobs=2),
        SamplingParams(temperature=0.0, repetition_penalty=1.3, logit_bias={5: 3.0}),
    ]
    shares: list[dict[int, int]] = [
        {0: 9, 1: 5}, {0: 1, 1: 1}, {0: 1}, {1: 1, 0: 1}, {0: 1, 2: 1}, {2: 1}, {2: 10, 1: 1}, {0: 1, 2: 1}, {2: 8},
        {0: 1, 1: 1, 2: 1}, {3: 14}, {0: 1, 3: 1}, {0: 1, 1: 1}, {4: 6, 0: 1}, {4: 1, 1: 1, 0: 1}, {0: 1}, {1: 1},
    ]  # fmt: skip
    alone, planners = device_runner(model), (Planner(), Planner())
    for planner in planners:
        for seq_id, prompt in enumerate(PROMPTS):
            planner.add(seq_id, prompt, dials[seq_id])
    for share in shares:
        step = alone.launch(planners[0].plan(share))
        assert step is not None
        expected, found = planners[0].take(step.result()), planners[1].take(both(planners[1].plan(share)))
        assert found.token_ids == expected.token_ids, share
        for one, other in zip(found.prompt_logprobs, expected.prompt_logprobs, strict=True):
            assert [entry.token_ids for entry in one.entries] == [entry.token_ids for entry in other.entries]
    decode = [len(share) for share in shares if all(count == 1 for count in share.values())]
    assert wires.messages == [{1: 1, 2: 2, 3: 4}[rows] for rows in decode]  # no other step, and padded


@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_that_fails_anywhere_leaves_both_at_the_same_message(rank: int, wires: Wires, both: Any) -> None:
    """At operations of a decode step, with steps of both kinds behind it; then all is forgotten, and tokens are
    right."""
    count = FailAt(None)
    expected = round_of_steps(both, wires, rank, count)
    for number in sorted({*range(0, count.count, 7), *range(count.count - 20, count.count)}):
        fault = FailAt(number)
        assert round_of_steps(both, wires, rank, fault) == expected
        assert fault.count == number + 1


def round_of_steps(both: Any, wires: Wires, rank: int, fault: FailAt) -> list[int]:
    """Tokens of two steps; the fault is in the one behind them."""
    planner, dials = Planner(), (GREEDY, SamplingParams(temperature=0.8))
    for seq_id in (0, 1):
        planner.add(seq_id, PROMPTS[seq_id], dials[seq_id])
    begun = planner.plan({0: 9, 1: 5})
    begun = StepPlan(begun.step_id, begun.scheduled, begun.new, forgets_all=True)
    tokens = [*planner.take(both(begun)).token_ids, *planner.take(both(planner.plan({0: 1, 1: 1}))).token_ids]
    sent = len(wires.messages)
    planner.add(2, PROMPTS[2])
    for shares in ({0: 1, 1: 1}, {0: 1, 1: 1, 2: 21}, {0: 1, 1: 1, 2: 1}):
        both(planner.plan(shares), (fault, None) if rank == 0 else (None, fault))
        fault = FailAt(None)
        for seq_id in shares:  # what was drawn does not matter
            planner.tokens[seq_id].append(0)
    assert wires.messages[sent:] == [2, 4]
    return tokens
