"""A head that the first and the last of two stages share: every way to draw gives what one GPU gives, and both stages
take part."""

from __future__ import annotations

from pathlib import Path

import pytest

from aphro_core.checkpoint.open import read_hf_config
from aphro_core.llm import LLM
from aphro_core.models.registry import load_spec
from aphro_core.parallel import memory
from aphro_core.request import RequestOutput, SamplingParams
from tests.gpu.all_gpus import needs_two
from tests.reference import Reference
from tests.tiny import write_tiny_checkpoint

pytestmark = needs_two
ALONE = "the last stage multiplies with the head alone"
BY_NCCL = "stages hand on all by NCCL"
WAYS = [
    SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True),
    SamplingParams(seed=1, max_tokens=24, ignore_eos=True),
    SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, logprobs=3),
    SamplingParams(seed=2, max_tokens=24, ignore_eos=True, top_k=20, top_p=0.8),
    SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, prompt_logprobs=2),
    SamplingParams(seed=3, max_tokens=24, ignore_eos=True, repetition_penalty=1.3, logit_bias={5: 3.0}),
    SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True),
]


def outputs_of(
    model: Path, prompts: list[list[int]], ways: list[SamplingParams], **options: object
) -> list[RequestOutput]:
    with LLM(
        str(model),
        device="cuda",
        dtype="float32",
        max_num_batched_tokens=24,
        max_num_seqs=8,
        num_blocks=128,
        max_model_len=128,
        skip_tokenizer_init=True,
        **options,
    ) as llm:
        return llm.generate(prompts, ways)


@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize("is_tied", [False, True])
def test_every_way_to_draw(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], *, is_tied: bool, enforce_eager: bool
) -> None:
    model = write_tiny_checkpoint(tmp_path, "llama", vocab_size=700, tie_word_embeddings=is_tied)
    reference = Reference(model, prompt_lengths=(1, 5, 17, 40, 33), new=12)
    prompts = [*reference.prompts, *reference.prompts[:2]]
    two = {"pipeline_parallel_size": 2, "enforce_eager": enforce_eager}
    greedy = outputs_of(tmp_path, reference.prompts, [WAYS[0]] * 5, **two)
    assert [list(output.outputs[0].token_ids)[:12] for output in greedy] == reference.tokens
    together = outputs_of(tmp_path, prompts, WAYS, **two)
    said = capfd.readouterr().err
    assert ALONE not in said
    assert BY_NCCL not in said
    assert memory.shares_head(load_spec(read_hf_config(tmp_path)), 1, 2)  # else nobody says a word
    one = outputs_of(tmp_path, prompts, WAYS)
    for found, expected in zip(together, one, strict=True):
        assert found.outputs[0].token_ids == expected.outputs[0].token_ids
        for of_found, of_expected in zip(
            (*(found.outputs[0].logprobs or []), *(found.prompt_logprobs or [])),
            (*(expected.outputs[0].logprobs or []), *(expected.prompt_logprobs or [])),
            strict=True,
        ):
            if of_expected is None:
                continue
            for token_id, entry in of_expected.items():
                assert of_found[token_id].logprob == pytest.approx(entry.logprob, abs=1e-4)
