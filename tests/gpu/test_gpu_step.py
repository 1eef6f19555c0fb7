"""The step loop on a GPU: graphs on and off alike; while it serves nothing waits for the device or is compiled."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from aphro_core.llm import LLM
from aphro_core.messages.steps import NewSequence, ScheduledSequence, StartWorker, StepPlan, StepResult
from aphro_core.prepare import EngineOptions, prepare
from aphro_core.reporter import SilentReporter
from aphro_core.request import SamplingParams
from aphro_core.worker.device_runner import DeviceRunner
from aphro_core.worker.worker import Worker
from tests.tiny import write_tiny_checkpoint

NUM_GPUS = torch.cuda.device_count()

pytestmark = pytest.mark.skipif(NUM_GPUS == 0, reason="no CUDA device")


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_on_and_off_give_the_same_tokens(tmp_path: Path, dtype: str, tp: int) -> None:
    if tp > NUM_GPUS:
        pytest.skip(f"needs {tp} GPUs")
    write_tiny_checkpoint(tmp_path, "qwen2")
    source = random.Random(1)
    prompts = [[source.randrange(90) for _ in range(source.randint(1, 40))] for _ in range(19)]
    dials: list[dict[str, Any]] = [{"temperature": 0.0}, {"seed": 3}, {"seed": 4, "top_k": 5}, {"temperature": 0.0}]
    params = [SamplingParams(max_tokens=4 + i, **dials[i % 4]) for i in range(19)]
    tokens = []
    for enforce_eager in (False, True):
        with LLM(
            str(tmp_path),
            tensor_parallel_size=tp,
            device="cuda",
            dtype=dtype,
            num_blocks=128,
            max_model_len=128,
            max_num_batched_tokens=64,
            enforce_eager=enforce_eager,
            skip_tokenizer_init=True,
        ) as llm:
            outputs = llm.generate(prompts, params)
        tokens.append([list(output.outputs[0].token_ids) for output in outputs])
    assert tokens[0] == tokens[1]


class Serving:
    """A warm worker, and plans for it that run ahead of their tokens."""

    def __init__(self, folder: Path) -> None:
        write_tiny_checkpoint(folder, "llama")
        options = EngineOptions(
            model=str(folder), device="cuda", dtype="bfloat16", max_num_seqs=20, num_blocks=200, max_model_len=256
        )
        config = prepare(options, SilentReporter()).config
        self.worker = Worker(StartWorker(config, 0, 0, "", 0), lambda progress: None)
        self.worker.load()
        self.worker.allocate(200)
        self._step = 0
        self._free = list(range(200))
        self._positions: dict[int, int] = {}

    def launch(self, decode: list[int], prompts: dict[int, int], dials: SamplingParams) -> Any:
        """One row for each of ``decode``, and new sequences with prompts of these lengths."""
        scheduled = [self._row(seq_id, 1) for seq_id in decode]
        new = []
        for seed, (seq_id, length) in enumerate(prompts.items()):
            new.append(NewSequence(seq_id, [3] * length, length, dials, seed))
            scheduled.append(self._row(seq_id, length))
        self._step += 1
        return self.worker.launch(StepPlan(self._step, scheduled, new))

    def give_back(self) -> None:
        """All blocks: nobody decodes any more."""
        self._free = list(range(200))

    def _row(self, seq_id: int, count: int) -> ScheduledSequence:
        start = self._positions.get(seq_id, 0)
        self._positions[seq_id] = start + count
        blocks = -(-(start + count) // 16) - -(-start // 16)
        return ScheduledSequence(seq_id, start, count, [], [self._free.pop() for _ in range(blocks)], True)


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Serving:
    return Serving(tmp_path_factory.mktemp("tiny"))


@contextmanager
def no_waiting() -> Iterator[None]:
    """Any call that waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def no_compiling() -> Iterator[None]:
    import triton

    compiled: list[str] = []

    def note(*arguments: Any, **named: Any) -> None:
        compiled.append(str(named.get("repr", arguments)))

    before, triton.knobs.runtime.jit_post_compile_hook = triton.knobs.runtime.jit_post_compile_hook, note
    try:
        yield
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before
    assert compiled == []


DIALS = {
    "greedy": SamplingParams(temperature=0.0),
    "plain": SamplingParams(),
    "cut": SamplingParams(top_k=30, top_p=0.9, min_p=0.01),
}


@pytest.mark.parametrize("dials", DIALS.values(), ids=DIALS)
def test_a_step_waits_for_nothing_and_compiles_nothing(serving: Serving, dials: SamplingParams) -> None:
    first = max(serving._positions, default=-1) + 1
    ids = list(range(first, first + 6))
    steps = []
    with no_waiting(), no_compiling():
        steps.append(serving.launch([], {ids[0]: 33, ids[1]: 2}, dials))
        steps.append(serving.launch(ids[:2], {ids[2]: 17, ids[3]: 1}, dials))
        for _ in range(20):
            steps.append(serving.launch(ids[:4], {}, dials))
        steps.append(serving.launch(ids[:3], {ids[4]: 100}, dials))
        steps.append(serving.launch(ids[:5], {}, dials))
    results: list[StepResult] = [step.result() for step in steps]
    assert [len(result.token_ids) for result in results] == [2, 4, *[4] * 20, 4, 5]
    serving.worker.launch(StepPlan(serving._step + 1, [], [], ids))
    serving._step += 1


@pytest.mark.parametrize("dials", DIALS.values(), ids=DIALS)
def test_a_graph_gives_what_its_launches_give(serving: Serving, dials: SamplingParams) -> None:
    """Prompts alone, beside rows that decode, and many at once: the same tokens either way."""
    runner = serving.worker._runner
    assert isinstance(runner, DeviceRunner)
    padded = runner._padded
    replay = padded.run
    tokens = []
    for run in (replay, padded.launch):
        padded.run = run
        first = max(serving._positions, default=-1) + 1
        ids = list(range(first, first + 14))
        steps = [
            serving.launch([], {ids[0]: 33, ids[1]: 2}, dials),
            serving.launch(ids[:2], {ids[2]: 128, ids[3]: 1}, dials),
            serving.launch(ids[:4], dict.fromkeys(ids[4:13], 7), dials),
            *(serving.launch(ids[:13], {}, dials) for _ in range(3)),
            serving.launch(ids[:2], {ids[13]: 250}, dials),
            serving.launch(ids, {}, dials),
        ]
        tokens.append([step.result().token_ids for step in steps])
        serving.worker.launch(StepPlan(serving._step + 1, [], [], ids))
        serving._step += 1
        serving.give_back()
    padded.run = replay
    assert [len(drawn) for drawn in tokens[0]] == [2, 4, 13, 13, 13, 13, 3, 14]
    assert tokens[0] == tokens[1]
