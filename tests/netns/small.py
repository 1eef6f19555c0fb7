"""What the tests over several hosts run: a tiny model and three prompts, exact."""

from __future__ import annotations

from typing import Any

from aphro import LLM, SamplingParams

SMALL: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "max_model_len": 128, "num_blocks": 64, "skip_tokenizer_init": True,
}  # fmt: skip
PROMPTS = [[3, 4, 5], [7] * 40, [1]]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def tokens_of(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]
