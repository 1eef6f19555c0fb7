"""A runner against transformers in float32: chunks of any size, prefix hits, mixed batches, reused blocks."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from aphro_core.messages.steps import ScheduledSequence, StepPlan, StepResult
from aphro_core.request import SamplingParams
from aphro_core.worker import gathered_rows, prompt_logprobs
from aphro_core.worker.model_runner import ModelRunner
from tests.core.worker.one_rank import BLOCK_SIZE, Planner, build_runner, sharding_plan
from tests.tiny import FAMILIES, write_tiny_checkpoint

NEW_TOKENS = 10
PROMPT_LENGTHS = (1, 2, BLOCK_SIZE, 2 * BLOCK_SIZE - 1, 40, 33)


class Model:
    """A tiny checkpoint, and what transformers makes of it."""

    def __init__(self, family: str, folder: Path) -> None:
        self.folder = folder
        reference = write_tiny_checkpoint(folder, family)
        self._references = {torch.float32: reference}
        self.has_experts = "moe" in family or family == "mixtral"
        source = random.Random(family)
        vocab_size = reference.config.vocab_size
        self.prompts = [[source.randrange(vocab_size) for _ in range(length)] for length in PROMPT_LENGTHS]
        self.tokens = [self.greedy(prompt) for prompt in self.prompts]

    def greedy(self, prompt: list[int]) -> list[int]:
        tokens = list(prompt)
        for _ in range(NEW_TOKENS):
            tokens.append(int(self.logprobs(tokens)[-1].argmax()))
        return tokens

    @torch.inference_mode()
    def logprobs(self, tokens: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """``[tokens, vocab]``."""
        if dtype not in self._references:
            self._references[dtype] = copy.deepcopy(self._references[torch.float32]).to(dtype)
        return self._references[dtype](torch.tensor([tokens]), use_cache=False).logits[0].float().log_softmax(dim=-1)

    def runner(self, dtype: torch.dtype = torch.float32) -> ModelRunner:
        return build_runner(self.folder, sharding_plan(self.folder, 1, 1), dtype=dtype)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model("llama", tmp_path_factory.mktemp("llama"))


def check_logprobs(result: StepResult, planner: Planner, model: Model) -> None:
    assert list(result.logprobs) == list(range(len(planner.drawing)))
    for seq_id, entry in zip(planner.drawing, result.logprobs.values(), strict=True):
        expected = model.logprobs(planner.tokens[seq_id][:-1])[-1]
        torch.testing.assert_close(torch.tensor(entry.logprobs), expected[entry.token_ids], atol=1e-4, rtol=0)


# constants of the gathered attention: as they are, and such that tiny models meet all of its ways
LIMITS: dict[str, dict[str, Any]] = {
    "as built": {},
    "products only, small tiles": {"_SHORT_KEYS": 0, "_TILE_ROWS": range(2, 5), "_MAX_SCORES": 400},
}


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("seed", range(2))
def test_random_chunks_in_mixed_batches(model: Model, seed: int, limits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sequence gives transformers' tokens whatever rides beside it, however its prompt is cut."""
    for name, value in LIMITS[limits].items():
        monkeypatch.setattr(gathered_rows, name, value)
    source, planner, runner = random.Random(seed), Planner(seed), model.runner()
    waiting = list(range(len(model.prompts)))
    source.shuffle(waiting)
    live: list[int] = []
    while waiting or live:
        for seq_id in waiting[: source.randint(0, 2) if live else 1]:
            planner.add(seq_id, model.prompts[seq_id])
            waiting.remove(seq_id)
            live.append(seq_id)
        chosen = [seq_id for seq_id in live if source.random() < 0.8] or live[:1]
        shares = {seq_id: source.randint(1, planner.remaining(seq_id)) for seq_id in chosen}
        check_logprobs(planner.take(runner.execute(planner.plan(shares))), planner, model)
        for seq_id in list(live):
            if len(planner.tokens[seq_id]) == len(model.tokens[seq_id]):
                live.remove(seq_id)
                planner.release(seq_id)
    assert [planner.tokens[seq_id] for seq_id in range(len(model.prompts))] == model.tokens


def test_prefix_hit_and_shared_prefill(model: Model) -> None:
    """A sequence may start behind blocks of another, also behind those that the same plan fills."""
    planner, runner, prompt = Planner(), model.runner(), model.prompts[4]
    planner.add(0, prompt)
    runner.execute(planner.plan({0: BLOCK_SIZE}))
    filling = planner.plan({0: 2 * BLOCK_SIZE})
    planner.add(1, prompt, shared_blocks=planner.tables[0])
    sharing = planner.plan({1: planner.remaining(1)})
    both = StepPlan(sharing.step_id, sharing.scheduled + filling.scheduled, sharing.new)
    planner.take(runner.execute(both))
    for _ in range(NEW_TOKENS - 1):
        planner.take(runner.execute(planner.plan({seq_id: planner.remaining(seq_id) for seq_id in (0, 1)})))
    planner.take(runner.execute(planner.plan({0: 1})))
    assert planner.tokens[0] == planner.tokens[1] == model.tokens[4]


def test_blocks_of_a_sequence_that_ended_in_nan(llama: Model) -> None:
    """Its K and V stay in the blocks; the next owner, who fills them only in part, must not see them."""
    planner, runner = Planner(), llama.runner()
    planner.add(0, llama.prompts[4])
    runner.execute(planner.plan({0: 40}))
    for cache in runner._caches:
        cache[planner.tables[0]] = float("nan")
    planner.release(0)
    for seq_id in (3, 1):
        planner.add(seq_id, llama.prompts[seq_id])
    for _ in range(NEW_TOKENS):
        planner.take(runner.execute(planner.plan({seq_id: planner.remaining(seq_id) for seq_id in (3, 1)})))
    assert [planner.tokens[seq_id] for seq_id in (3, 1)] == [llama.tokens[seq_id] for seq_id in (3, 1)]


def test_a_sequence_comes_back_after_a_preemption(llama: Model) -> None:
    """Released, then new under the same id with its outputs so far: in one plan, in that order."""
    planner, runner, prompt = Planner(), llama.runner(), llama.prompts[3]
    planner.add(7, prompt)
    for _ in range(4):
        planner.take(runner.execute(planner.plan({7: planner.remaining(7)})))
    tokens = planner.tokens[7]
    planner.release(7)
    planner.add(7, tokens, num_prompt_tokens=len(prompt))
    for _ in range(NEW_TOKENS - 4):
        planner.take(runner.execute(planner.plan({7: planner.remaining(7)})))
    assert planner.tokens[7] == llama.tokens[3]


def test_plans_without_work(llama: Model) -> None:
    planner, runner = Planner(), llama.runner()
    planner.add(0, [3, 4, 5])
    assert planner.take(runner.execute(planner.plan({0: 2}))).token_ids == []
    planner.release(0)
    assert planner.take(runner.execute(planner.plan({}))) == StepResult(2, [])
    with pytest.raises(KeyError):  # it is forgotten
        runner.execute(StepPlan(3, [ScheduledSequence(0, 2, 1, [], [], True)]))


@pytest.mark.parametrize("cuts", [(40,), (1, 20, 19), (39, 1)])
def test_prompt_logprobs(llama: Model, cuts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """One entry for each prompt token but the first, whatever the chunks, also when logits come in slices."""
    monkeypatch.setattr(prompt_logprobs, "PROMPT_ROWS", 7)
    planner, runner, prompt = Planner(), llama.runner(), llama.prompts[4]
    planner.add(0, prompt, SamplingParams(temperature=0.0, prompt_logprobs=3, max_tokens=4))
    planner.add(1, llama.prompts[1])
    results = [planner.take(runner.execute(planner.plan({1: planner.remaining(1), 0: count}))) for count in cuts]
    results.append(planner.take(runner.execute(planner.plan({0: 1}))))
    entries = [entry for result in results for found in result.prompt_logprobs for entry in found.entries]
    assert {found.seq_id for result in results for found in result.prompt_logprobs} == {0}
    assert not results[-1].prompt_logprobs  # decode rows are no prompt
    expected = llama.logprobs(prompt)
    assert [entry.token_ids[0] for entry in entries] == prompt[1:]
    for row, entry in zip(expected, entries, strict=False):
        assert entry.token_ids[1:] == row.topk(3).indices.tolist()
        assert entry.rank == 1 + int((row > row[entry.token_ids[0]]).sum())
        torch.testing.assert_close(torch.tensor(entry.logprobs), row[entry.token_ids], atol=1e-4, rtol=0)


def test_bfloat16_is_as_near_to_float32_as_transformers(model: Model) -> None:
    """Mean error of the log-probabilities of all prompt tokens; with experts the median, and twice as much: a rounding
    that sends a token to another expert is no small error, and which of the two it hits is chance."""
    planner, runner = Planner(), model.runner(torch.bfloat16)
    for seq_id, prompt in enumerate(model.prompts):
        planner.add(seq_id, prompt, SamplingParams(temperature=0.0, prompt_logprobs=0))
    result = planner.take(runner.execute(planner.plan({i: len(p) for i, p in enumerate(model.prompts)})))
    ours, theirs = [], []
    for found in result.prompt_logprobs:
        prompt = model.prompts[found.seq_id]
        at = (torch.arange(len(prompt) - 1), torch.tensor(prompt[1:]))
        expected = model.logprobs(prompt)[at]
        ours.append(torch.tensor([entry.logprobs[0] for entry in found.entries]) - expected)
        theirs.append(model.logprobs(prompt, torch.bfloat16)[at] - expected)
    if model.has_experts:
        assert torch.cat(ours).abs().median() <= 2 * torch.cat(theirs).abs().median()
    else:
        assert torch.cat(ours).abs().mean() <= 1.25 * torch.cat(theirs).abs().mean()
