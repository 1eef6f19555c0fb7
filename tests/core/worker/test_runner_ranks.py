"""Runners of a whole group, tp x pp, against transformers: uneven heads, copied KV heads, micro-batches in flight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from aphro_core.distributed.links import Links
from aphro_core.messages.steps import StepPlan
from aphro_core.request import SamplingParams
from tests.core.ranks import run_ranks
from tests.core.worker.one_rank import Planner, build_runner, sharding_plan
from tests.tiny import write_tiny_checkpoint

PROMPTS = [[7 * i * (seq_id + 2) % 97 for i in range(length)] for seq_id, length in enumerate((33, 5, 18))]


def plans() -> list[StepPlan]:
    """Sequences 0 and 1 ride together, 2 alone; each plan is sent before the one before it is answered."""
    planner = Planner()
    for seq_id, prompt in enumerate(PROMPTS):
        planner.add(seq_id, prompt, SamplingParams(temperature=0.0, prompt_logprobs=0, logprobs=2))
    shares = [{0: 10, 1: 2}, {2: 17}, {0: 22, 1: 3}, {2: 1}, {0: 1}]
    return [planner.plan(share) for share in shares]


@pytest.mark.parametrize(("family", "tp", "pp"), [("llama", 2, 2), ("llama", 4, 1), ("qwen3", 3, 1), ("mistral", 1, 3)])
def test_log_probabilities_of_a_group(tmp_path: Path, family: str, tp: int, pp: int) -> None:
    model = write_tiny_checkpoint(tmp_path, family)
    sharding, steps = sharding_plan(tmp_path, tp, pp), plans()

    def rank_of_group(links: Links, rank: int) -> Any:
        runner = build_runner(tmp_path, sharding, rank, links)
        return [runner.execute(step) for step in steps]

    answers = run_ranks(tmp_path, sharding, rank_of_group)
    speaker = tp * (pp - 1)
    assert all(answer == [None] * len(steps) for rank, answer in enumerate(answers) if rank != speaker)
    results = answers[speaker]
    assert [result.step_id for result in results] == [step.step_id for step in steps]
    found = [entries for result in results for entries in result.prompt_logprobs]
    sampled = {
        row.seq_id: token_id
        for step, result in zip(steps, results, strict=True)
        for row, token_id in zip((row for row in step.scheduled if row.samples), result.token_ids, strict=True)
    }
    for seq_id, prompt in enumerate(PROMPTS):
        with torch.inference_mode():
            rows = model(torch.tensor([prompt]), use_cache=False).logits[0].log_softmax(dim=-1)
        got = torch.tensor([e.logprobs[0] for part in found if part.seq_id == seq_id for e in part.entries])
        torch.testing.assert_close(got, rows[torch.arange(len(prompt) - 1), prompt[1:]], atol=1e-4, rtol=0)
        assert sampled[seq_id] == int(rows[-1].argmax())
