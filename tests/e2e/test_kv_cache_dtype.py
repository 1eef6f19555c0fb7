"""``--kv-cache-dtype fp8``: tokens of transformers with K and V rounded so, close to those without; half the bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from aphro_kernels.float8 import FLOAT8
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

from aphro_core.errors import AphroError, UsageError
from aphro_core.llm import LLM
from aphro_core.prepare import EngineOptions, expect_memory, prepare
from aphro_core.reporter import SilentReporter
from aphro_core.request import RequestOutput
from tests.reference import Reference
from tests.tiny import write_tiny_checkpoint

pytestmark = pytest.mark.usefixtures("warm_start")

PROMPT_LENGTHS = (1, 17, 40, 150)  # the last by products, the others row by row
SCALES = {layer: (0.03 + 0.01 * layer, 0.02 + 0.01 * layer) for layer in range(4)}


def rounded(x: Tensor, scale: float) -> Tensor:
    return (x / scale).clamp(-448, 448).to(FLOAT8).float() * scale


def rounding_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Any:
    key_scale, value_scale = module.config.cache_scales.get(module.layer_idx, (1.0, 1.0))
    cached = rounded(key, key_scale), rounded(value, value_scale)
    return eager_attention_forward(module, query, *cached, *rest, **named)


AttentionInterface.register("rounding", rounding_attention)
AttentionMaskInterface.register("rounding", eager_mask)


def generate(folder: Path, reference: Reference, kv_cache_dtype: str, tp: int, **options: Any) -> list[RequestOutput]:
    with LLM(
        str(folder),
        tensor_parallel_size=tp,
        device="cpu",
        kv_cache_dtype=kv_cache_dtype,
        num_blocks=64,
        max_model_len=192,
        skip_tokenizer_init=True,
        **({"dtype": "float32"} | options),
    ) as llm:
        return llm.generate(reference.prompts, reference.greedy)


def differences(outputs: list[RequestOutput], reference: Reference) -> list[float]:
    """Of each position's log-probabilities the largest, in rising order, as long as the tokens are the same."""
    found = []
    for output, tokens, rows in zip(outputs, reference.tokens, reference.logprobs, strict=True):
        choice = output.outputs[0]
        for token_id, expected_id, position, row in zip(
            choice.token_ids, tokens, choice.logprobs or [], rows, strict=True
        ):
            found.append(max(abs(entry.logprob - float(row[token])) for token, entry in position.items()))
            if token_id != expected_id:
                break
    return sorted(found)


@pytest.mark.parametrize("has_scales", [False, True])
def test_a_float8_cache(tmp_path: Path, has_scales: bool) -> None:
    model = write_tiny_checkpoint(tmp_path, "qwen2", max_position_embeddings=256)
    plain = Reference(model, prompt_lengths=PROMPT_LENGTHS, new=10)
    model.config.cache_scales = SCALES if has_scales else {}
    model.set_attn_implementation("rounding")
    reference = Reference(model, prompt_lengths=PROMPT_LENGTHS, new=10)
    if has_scales:
        state = load_file(tmp_path / "model.safetensors")
        for layer, pair in SCALES.items():
            for name, scale in zip("kv", pair, strict=True):
                state[f"model.layers.{layer}.self_attn.{name}_scale"] = torch.tensor([scale])
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for tp in (1, 3):
        outputs = generate(tmp_path, reference, "fp8", tp)
        assert [list(output.outputs[0].token_ids) for output in outputs] == reference.tokens
        found = differences(outputs, reference)
        assert found[len(found) * 3 // 4] < 0.001
        assert found[-1] < 0.05  # a key beside a code's border may fall to its other side
    assert differences(outputs, plain)[-1] > 0.05  # these logits lie far apart


class Lines(SilentReporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def test_what_it_costs_and_says(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, "llama")
    found, reporter = {}, Lines()
    for name in ("auto", "fp8", "fp8_e4m3"):
        options = EngineOptions(model=str(tmp_path), device="cpu", dtype="bfloat16", kv_cache_dtype=name)
        found[name] = prepare(options, reporter)
    plain, narrow, again = (expect_memory(found[name], reporter) for name in ("auto", "fp8", "fp8_e4m3"))
    assert plain is not None
    assert narrow is not None
    assert again is not None
    assert 2 * narrow[0].layout.block_bytes == plain[0].layout.block_bytes == 2 * again[0].layout.block_bytes
    assert reporter.lines.count("KV cache: fp8 (e4m3), scale 1: the checkpoint has none of its own.") == 2
    with pytest.raises(UsageError, match="fp8_e5m2") as error:
        prepare(EngineOptions(model=str(tmp_path), device="cpu", kv_cache_dtype="fp8_e5m2"), reporter)
    assert "allowed: auto, fp8" in str(error.value)


def test_a_scale_that_is_none(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, "llama")
    state = load_file(tmp_path / "model.safetensors")
    for name in ("k_scale", "v_scale"):
        state[f"model.layers.1.self_attn.{name}"] = torch.tensor([0.0])
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AphroError, match=r"layers\.1\.self_attn\.k_scale.*expected one positive number"):
        LLM(str(tmp_path), device="cpu", kv_cache_dtype="fp8", num_blocks=8, max_model_len=64, skip_tokenizer_init=True)
