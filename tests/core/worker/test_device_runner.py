"""The GPU's way through a step, on CPU tensors with the kernels' references: slots, padding, tokens that stay there."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from aphro_kernels.peer_columns import join_peer_columns, peer_columns_bytes

from aphro_core.checkpoint.open import open_checkpoint
from aphro_core.distributed.links import Links
from aphro_core.distributed.stage_lines import token_link
from aphro_core.distributed.stage_links import StageLink
from aphro_core.distributed.tensor_group import TensorParallelGroup
from aphro_core.layers.decoder import Decoder
from aphro_core.messages.steps import RowsAgain, ScheduledSequence, StepPlan, StepResult
from aphro_core.models.registry import load_spec
from aphro_core.request import SamplingParams
from aphro_core.worker.device_runner import DeviceRunner
from aphro_core.worker.kv_cache import allocate_kv_cache
from aphro_core.worker.loader import load_weights
from aphro_core.worker.shared_head import SharedHead
from aphro_core.worker.step_shapes import row_buckets
from tests.core.ranks import run_ranks
from tests.core.worker.one_rank import BLOCK_SIZE, CPU, NUM_BLOCKS, Planner, sharding_plan
from tests.core.worker.test_model_runner import NEW_TOKENS, Model, check_logprobs
from tests.tiny import FAMILIES

PLAIN = SamplingParams(temperature=0.0)


def device_runner(
    model: Model,
    links: Links | None = None,
    tp: int = 1,
    pp: int = 1,
    rank: int = 0,
    graph_tokens: int = 32,
    head: SharedHead | None = None,
) -> DeviceRunner:
    links = links or Links(TensorParallelGroup(0, 1), StageLink(None, None))
    with open_checkpoint(model.folder) as checkpoint:
        spec = load_spec(checkpoint.hf_config)
        shard = sharding_plan(model.folder, tp, pp).ranks[rank]
        weights = load_weights(checkpoint, spec, shard, torch.float32, CPU)
    caches = allocate_kv_cache(shard, spec, NUM_BLOCKS, BLOCK_SIZE, torch.float32, CPU)
    decoder = Decoder(spec, shard, weights, links.tensor)
    return DeviceRunner(
        spec, shard, decoder, caches, links,
        block_size=BLOCK_SIZE, max_rows=11, max_model_len=128, dtype=torch.float32, device=CPU,
        graph_tokens=graph_tokens, head=head,
    )  # fmt: skip


def execute(runner: DeviceRunner, plan: StepPlan) -> StepResult:
    step = runner.launch(plan)
    assert step is not None
    return step.result()


# a cap on scores is computed by the CPU's attention alone so far
@pytest.fixture(scope="module", params=[family for family in FAMILIES if family != "gemma2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("with_logprobs", [False, True])
def test_random_chunks_in_mixed_batches(model: Model, with_logprobs: bool) -> None:
    """Every sequence gives transformers' tokens whatever rides beside it, however its prompt is cut."""
    source, planner, runner = random.Random(7), Planner(7), device_runner(model)
    waiting = list(range(len(model.prompts)))
    source.shuffle(waiting)
    live: list[int] = []
    while waiting or live:
        for seq_id in waiting[: source.randint(0, 2) if live else 1]:
            planner.add(seq_id, model.prompts[seq_id], *([] if with_logprobs else [PLAIN]))
            waiting.remove(seq_id)
            live.append(seq_id)
        chosen = [seq_id for seq_id in live if source.random() < 0.8] or live[:1]
        shares = {seq_id: source.randint(1, planner.remaining(seq_id)) for seq_id in chosen}
        result = planner.take(execute(runner, planner.plan(shares)))
        if with_logprobs:
            check_logprobs(result, planner, model)
        for seq_id in list(live):
            if len(planner.tokens[seq_id]) == len(model.tokens[seq_id]):
                live.remove(seq_id)
                planner.release(seq_id)
    assert [planner.tokens[seq_id] for seq_id in range(len(model.prompts))] == model.tokens


def ahead(planner: Planner, seq_ids: Sequence[int]) -> StepPlan:
    """The next row of each, whose token nobody has told the worker."""
    for seq_id in seq_ids:
        planner.tokens[seq_id].append(0)  # a place for it
        planner._known_tokens[seq_id] += 1
    return planner.plan(dict.fromkeys(seq_ids, 1))


def test_more_rows_to_draw_from_than_a_padded_number_of_them(llama: Model) -> None:
    """Six of seven tokens, of a step that no graph has: decode steps have six rows padded to eight."""
    planner, runner = Planner(3), device_runner(llama, graph_tokens=0)
    rows = range(5)
    for seq_id in rows:
        planner.add(seq_id, [3 + seq_id, 5, 8], PLAIN)
    planner.take(execute(runner, planner.plan(dict.fromkeys(rows, 3))))
    planner.add(5, [13, 21], PLAIN)
    together = planner.take(execute(runner, planner.plan({**dict.fromkeys(rows, 1), 5: 2})))
    alone = Planner(4)
    alone.add(5, [13, 21], PLAIN)
    expected = alone.take(execute(device_runner(llama), alone.plan({5: 2})))
    assert together.token_ids[5:] == expected.token_ids


def test_plans_run_ahead_of_their_tokens(llama: Model) -> None:
    """No result is read before the last plan is launched; rows join and leave on the way."""
    planner, runner = Planner(), device_runner(llama)
    for seq_id in (3, 4):
        planner.add(seq_id, llama.prompts[seq_id], PLAIN)
    steps = [runner.launch(planner.plan({3: planner.remaining(3), 4: planner.remaining(4)}))]
    steps += [runner.launch(ahead(planner, (3, 4))) for _ in range(3)]
    planner.add(5, llama.prompts[5], PLAIN)
    steps.append(runner.launch(planner.plan({5: planner.remaining(5)})))
    steps += [runner.launch(ahead(planner, (5, 4))) for _ in range(3)]
    drawn: dict[int, list[int]] = {3: [], 4: [], 5: []}
    for step, drawing in zip(steps, [*4 * [[3, 4]], [5], *3 * [[5, 4]]], strict=True):
        assert step is not None
        for seq_id, token_id in zip(drawing, step.result().token_ids, strict=True):
            drawn[seq_id].append(token_id)
    assert {seq_id: len(tokens) for seq_id, tokens in drawn.items()} == {3: 4, 4: 7, 5: 4}
    for seq_id, tokens in drawn.items():
        start = len(llama.prompts[seq_id])
        assert tokens == llama.tokens[seq_id][start : start + len(tokens)]


def again(plan: StepPlan, without: list[int]) -> StepPlan:
    """The same step, said of the rows of the one before."""
    blocks = [(i, block) for i, row in enumerate(plan.scheduled) for block in row.new_block_ids]
    return StepPlan(plan.step_id, released=plan.released, again=RowsAgain(plan.num_rows, without, blocks))


@pytest.mark.parametrize("dials", [PLAIN, SamplingParams(temperature=0.0, logprobs=1)], ids=["device", "host"])
def test_rows_come_again_until_they_leave(llama: Model, dials: SamplingParams) -> None:
    """A plan names no row of those that come again; two leave, then one, and another takes the freed place."""
    planner, runner = Planner(), device_runner(llama)
    ids = [3, 4, 5, 1]
    for seq_id in ids:
        planner.add(seq_id, llama.prompts[seq_id], dials if seq_id == 4 else PLAIN)
    plans = [planner.plan({seq_id: planner.remaining(seq_id) for seq_id in ids}), ahead(planner, ids)]
    drawing = [ids, ids]
    for leavers in ([], [5, 3], [], [1]):
        without = sorted(ids.index(seq_id) for seq_id in leavers)
        ids = [seq_id for seq_id in ids if seq_id not in leavers]
        drawing.append(ids)
        spelled = ahead(planner, ids)
        plans.append(again(spelled, without))
        for seq_id in leavers:
            planner.release(seq_id)
    planner.add(6, llama.prompts[3], PLAIN)
    plans.append(planner.plan({6: planner.remaining(6)}))
    drawing.append([6])
    steps = [runner.launch(plan) for plan in plans]
    drawn: dict[int, list[int]] = {}
    for seq_ids, step in zip(drawing, steps, strict=True):
        assert step is not None
        for seq_id, token_id in zip(seq_ids, step.result().token_ids, strict=True):
            drawn.setdefault(seq_id, []).append(token_id)
    assert {seq_id: len(tokens) for seq_id, tokens in drawn.items()} == {3: 3, 4: 6, 5: 3, 1: 5, 6: 1}
    for seq_id, tokens in drawn.items():
        prompt = 3 if seq_id == 6 else seq_id
        start = len(llama.prompts[prompt])
        assert tokens == llama.tokens[prompt][start : start + len(tokens)]


def test_tokens_that_the_host_draws_are_there_for_the_next_step(llama: Model) -> None:
    """Logprobs take the slow way; the row beside, which runs ahead, reads its own token all the same."""
    planner, runner = Planner(), device_runner(llama)
    planner.add(3, llama.prompts[3], PLAIN)
    planner.add(4, llama.prompts[4], SamplingParams(temperature=0.0, logprobs=1))
    steps = [runner.launch(planner.plan({3: planner.remaining(3), 4: planner.remaining(4)}))]
    steps += [runner.launch(ahead(planner, (3, 4))) for _ in range(4)]
    results = [step.result() for step in steps if step is not None]
    for index, seq_id in enumerate((3, 4)):
        tokens = [result.token_ids[index] for result in results]
        start = len(llama.prompts[seq_id])
        assert tokens == llama.tokens[seq_id][start : start + 5]


def test_sampled_rows_are_those_of_a_cpu(llama: Model) -> None:
    dials = [SamplingParams(seed=3), SamplingParams(temperature=0.6, top_k=7), PLAIN, SamplingParams(temperature=1.4)]
    drawn = []
    for way in ("cpu", "device"):
        planner = Planner()
        cpu_runner, gpu_runner = llama.runner(), device_runner(llama)
        for seq_id, params in enumerate(dials):
            planner.add(seq_id, llama.prompts[5][: 9 + seq_id], params)
        for _ in range(5):
            plan = planner.plan({seq_id: planner.remaining(seq_id) for seq_id in range(len(dials))})
            planner.take(cpu_runner.execute(plan) if way == "cpu" else execute(gpu_runner, plan))
        drawn.append(planner.tokens)
    assert drawn[0] == drawn[1]


def test_a_sequence_comes_back_after_a_preemption(llama: Model) -> None:
    planner, runner, prompt = Planner(), device_runner(llama), llama.prompts[3]
    planner.add(7, prompt, PLAIN)
    for _ in range(4):
        planner.take(execute(runner, planner.plan({7: planner.remaining(7)})))
    tokens = planner.tokens[7]
    planner.release(7)
    planner.add(7, tokens, PLAIN, num_prompt_tokens=len(prompt))
    for _ in range(NEW_TOKENS - 4):
        planner.take(execute(runner, planner.plan({7: planner.remaining(7)})))
    assert planner.tokens[7] == llama.tokens[3]


def test_a_prefix_hit_of_all_blocks_but_the_last_token(llama: Model) -> None:
    """One row of one token brings a whole block table with it."""
    planner, runner, prompt = Planner(), device_runner(llama), llama.prompts[4][: 4 * BLOCK_SIZE + 1]
    planner.add(0, prompt, PLAIN)
    planner.take(execute(runner, planner.plan({0: len(prompt)})))
    planner.add(1, prompt, PLAIN, shared_blocks=planner.tables[0][: len(prompt) // BLOCK_SIZE])
    for _ in range(4):
        planner.take(execute(runner, planner.plan({seq_id: planner.remaining(seq_id) for seq_id in (0, 1)})))
    assert planner.tokens[1][: len(prompt) + 4] == planner.tokens[0][: len(prompt) + 4]


def test_prompt_logprobs(llama: Model) -> None:
    planner, runner, prompt = Planner(), device_runner(llama), llama.prompts[4]
    planner.add(0, prompt, SamplingParams(temperature=0.0, prompt_logprobs=3, max_tokens=4))
    planner.add(1, llama.prompts[1])
    results = [planner.take(execute(runner, planner.plan({1: planner.remaining(1), 0: n}))) for n in (20, 20)]
    entries = [entry for result in results for found in result.prompt_logprobs for entry in found.entries]
    assert [entry.token_ids[0] for entry in entries] == prompt[1:]
    for row, entry in zip(llama.logprobs(prompt), entries, strict=False):
        torch.testing.assert_close(torch.tensor(entry.logprobs), row[entry.token_ids], atol=1e-4, rtol=0)


@pytest.mark.parametrize("with_prompt", [False, True])
def test_prompt_logprobs_of_a_token_alone(llama: Model, with_prompt: bool) -> None:
    """A full step may cut a prompt behind its first token, and so may one that is full of rows that decode."""
    planner, runner, prompt = Planner(), device_runner(llama), llama.prompts[4]
    planner.add(0, prompt, SamplingParams(temperature=0.0, prompt_logprobs=3, max_tokens=4))
    planner.add(1, llama.prompts[3], PLAIN)
    first = {1: planner.remaining(1), 0: 1} if with_prompt else {0: 1}
    shares = [first, {0: 1}, {0: len(prompt) - 2}]
    results = [planner.take(execute(runner, planner.plan(share))) for share in shares]
    entries = [entry for result in results for found in result.prompt_logprobs for entry in found.entries]
    assert [entry.token_ids[0] for entry in entries] == prompt[1:]
    for row, entry in zip(llama.logprobs(prompt), entries, strict=False):
        torch.testing.assert_close(torch.tensor(entry.logprobs), row[entry.token_ids], atol=1e-4, rtol=0)


def test_peers_are_asked_for_all_logits_where_the_host_reads_them(llama: Model) -> None:
    """Of other greedy rows they send what the largest is in."""
    links = Links(TensorParallelGroup(0, 1), StageLink(None, None))
    with open_checkpoint(llama.folder) as checkpoint:
        shape = (11, load_spec(checkpoint.hf_config).vocab_size, torch.float32)
    memory = torch.zeros(peer_columns_bytes(*shape), dtype=torch.uint8)
    place = join_peer_columns(0, 1, memory, 0, *shape, None)
    links.tensor._columns = place
    planner, runner, prompt = Planner(), device_runner(llama, links), llama.prompts[4]

    def whole_after(shares: dict[int, int]) -> list[int]:
        planner.take(execute(runner, planner.plan(shares)))
        return place.is_whole[:3].tolist()

    planner.add(0, prompt, PLAIN)
    assert whole_after({0: len(prompt)}) == [0, 0, 0]
    planner.add(1, prompt, SamplingParams(temperature=0.0, prompt_logprobs=1))
    assert whole_after({0: 1, 1: 1}) == [1, 1, 1]  # rows of one token alone: their logits are those of the prompt, too
    assert whole_after({0: 1}) == [0, 0, 0]
    assert whole_after({0: 1, 1: len(prompt) - 1})[0] == 1
    assert whole_after({0: 1, 1: 1}) == [0, 0, 0]
    planner.add(2, prompt, SamplingParams(temperature=0.7))
    assert whole_after({2: len(prompt)}) == [1, 0, 0]
    assert whole_after({0: 1, 2: 1}) == [0, 1, 0]
    for changes in ({"logprobs": 1}, {"presence_penalty": 1.0}):
        planner.add(3, prompt, SamplingParams(temperature=0.0, **changes))
        assert whole_after({0: 1, 3: len(prompt)}) == [1, 1, 1]
        assert whole_after({0: 1, 3: 1}) == [1, 1, 1]
        planner.release(3)
        assert whole_after({0: 1}) == [0, 0, 0]


def test_ranks_with_fewer_heads_have_the_same_shapes(llama: Model) -> None:
    """Each is a graph in which all ranks sum up: one that a rank alone captures would wait for the others for ever."""
    links = [Links(TensorParallelGroup(rank, 2), StageLink(None, None)) for rank in range(2)]
    heads = [len(shard.heads) for shard in sharding_plan(llama.folder, 2, 1).ranks]
    assert heads[0] > heads[1]
    runners = [device_runner(llama, links[rank], 2, 1, rank, graph_tokens=16384) for rank in range(2)]
    assert runners[0]._shapes.padded == runners[1]._shapes.padded
    assert runners[0]._shapes.kinds == runners[1]._shapes.kinds


def test_a_step_without_work_and_a_sequence_that_is_forgotten(llama: Model) -> None:
    planner, runner = Planner(), device_runner(llama)
    planner.add(0, [3, 4, 5], PLAIN)
    assert planner.take(execute(runner, planner.plan({0: 2}))).token_ids == []
    planner.release(0)
    assert execute(runner, planner.plan({})) == StepResult(2, [])
    with pytest.raises(KeyError):
        runner.launch(StepPlan(3, [ScheduledSequence(0, 2, 1, [], [], True)]))


@pytest.mark.parametrize("logprobs", [None, 1])
def test_logits_that_are_not_finite_name_their_sequence(llama: Model, logprobs: int | None) -> None:
    planner, runner = Planner(), device_runner(llama)
    dials = SamplingParams(temperature=0.0, logprobs=logprobs)
    planner.add(0, [3, 4, 5], dials)
    planner.add(9, [3, 4, 5, 6], dials)
    execute(runner, planner.plan({0: 3, 9: 4}))
    for cache in runner._padded._caches:
        cache[planner.tables[9]] = float("nan")
    failure = execute(runner, ahead(planner, (0, 9))).failure
    assert failure is not None
    assert failure.seq_ids == [9]
    assert "sequence 9 " in failure.message


@pytest.mark.parametrize("max_rows", [1, 3, 11, 32, 40, 256, 300, 512])
def test_row_buckets(max_rows: int) -> None:
    sizes = row_buckets(max_rows)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] == max_rows
    for before, size in pairwise(sizes):
        assert size <= max(2 * before, 8, before + 32), "padding costs a step of one row more than its half"


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 3)])
def test_plans_run_ahead_in_a_group(tmp_path: Path, tp: int, pp: int) -> None:
    """Tokens that one tp rank draws reach the others, and those of the last stage the first, past the host."""
    model = Model("llama", tmp_path)
    sharding = sharding_plan(tmp_path, tp, pp)

    def rank_of_group(links: Links, rank: int) -> list[tuple[int, int]]:
        if pp > 1:
            links = replace(links, tokens=token_link(sharding, rank))
        runner, planner = device_runner(model, links, tp, pp, rank), Planner()
        planner.add(0, model.prompts[4], PLAIN)
        planner.add(1, model.prompts[3], PLAIN)
        plans = [planner.plan({0: 40}), planner.plan({1: planner.remaining(1)})]
        plans += [ahead(planner, (0,)), ahead(planner, (1,)), *(ahead(planner, (0, 1)) for _ in range(3))]
        drawing = [[row.seq_id for row in plan.scheduled if row.samples] for plan in plans]
        if pp == 1:  # stages share the rows, so that none come again
            plans[-2:] = [again(plan, []) for plan in plans[-2:]]
        steps = [runner.launch(plan) for plan in plans]
        assert bool(runner._padded.sampler.rows) == any(steps), "dials are for the rank that draws"
        return [
            pair
            for seq_ids, step in zip(drawing, steps, strict=True)
            if step
            for pair in zip(seq_ids, step.result().token_ids, strict=True)
        ]

    drawn = run_ranks(tmp_path, sharding, rank_of_group)[tp * (pp - 1)]
    for seq_id, prompt in ((0, 4), (1, 3)):
        tokens = [token_id for drawn_for, token_id in drawn if drawn_for == seq_id]
        start = len(model.prompts[prompt])
        assert tokens == model.tokens[prompt][start : start + 5]
