"""The reference for correctness: transformers in float32, greedy, one prompt at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from aphro_core.checkpoint.open import open_checkpoint
from aphro_core.request import SamplingParams


def load_reference(path: Path) -> PreTrainedModel:
    """A transformers model with the weights of a GGUF file, dequantised to float32."""
    with open_checkpoint(path) as checkpoint:
        settings = dict(checkpoint.hf_config)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(settings.pop("model_type"), **settings), dtype=torch.float32
        )
        state = {name: checkpoint.read(name).float() for name in checkpoint.tensor_names}
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


class Reference:
    """Seeded prompts with the greedy tokens that transformers gives, and the log-softmax rows they were taken from."""

    def __init__(self, model: PreTrainedModel, *, prompt_lengths: Sequence[int], new: int) -> None:
        source = random.Random(7)
        vocab_size = model.config.vocab_size
        self.prompts = [[source.randrange(vocab_size) for _ in range(length)] for length in prompt_lengths]
        self.greedy = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, logprobs=5)
        self.tokens: list[list[int]] = []
        self.logprobs: list[torch.Tensor] = []  # [new, vocab_size] each
        for prompt in self.prompts:
            tokens, rows = _generate(model, prompt, new)
            self.tokens.append(tokens)
            self.logprobs.append(rows)


@torch.inference_mode()
def _generate(model: PreTrainedModel, prompt: list[int], new: int) -> tuple[list[int], torch.Tensor]:
    """Without a KV cache: every token from a forward pass over the whole sequence."""
    ids, rows = list(prompt), []
    for _ in range(new):
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1].float()
        rows.append(torch.log_softmax(logits, dim=-1))
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :], torch.stack(rows)
