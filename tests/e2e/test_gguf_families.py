"""GGUF files of every family: the tokens of transformers on the dequantised weights, expanded and kept packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest

from aphro_core.checkpoint.gguf_families import FAMILIES
from aphro_core.llm import LLM
from tests.gguf_families import TINY_GGUF, write_gguf_family
from tests.reference import Reference

pytestmark = pytest.mark.usefixtures("warm_start")


@pytest.mark.parametrize("name", TINY_GGUF)
def test_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    has_stacks = name != "mixtral"  # whose older files have a tensor an expert
    reference = Reference(write_gguf_family(tmp_path, name, has_stacks=has_stacks), prompt_lengths=(1, 5, 30), new=8)
    for quantization, tp in (("gguf", 1), (None, 2)) if name in ("mixtral", "gemma2", "phi3") else (("gguf", 1),):
        with LLM(
            str(tmp_path / "model.gguf"),
            tensor_parallel_size=tp,
            quantization=quantization,
            device="cpu",
            dtype="float32",
            num_blocks=32,
            max_model_len=64,
            skip_tokenizer_init=True,
        ) as llm:
            outputs = llm.generate(reference.prompts, reference.greedy)
        assert [list(output.outputs[0].token_ids) for output in outputs] == reference.tokens
        for output, rows in zip(outputs, reference.logprobs, strict=True):
            for position, row in zip(output.outputs[0].logprobs or [], rows, strict=True):
                for token_id, entry in position.items():
                    assert entry.logprob == pytest.approx(float(row[token_id]), abs=2e-4)


def test_every_architecture_of_the_table_is_written_by_a_test() -> None:
    assert set(FAMILIES) == {row.arch for row in TINY_GGUF.values()} | {"llama", "qwen2", "qwen3"}


class Header:
    """Metadata alone."""

    tensors: ClassVar[dict[str, Any]] = {}

    def __init__(self, **values: Any) -> None:
        self._values = {"general.architecture": "gemma2"} | {f"gemma2.{key}": value for key, value in values.items()}

    def value(self, key: str, default: Any = None) -> Any:
        return self._values.get(key.replace("attention.", "").replace("embedding_length", "width"), default)


@pytest.mark.parametrize(("layers", "scalar"), [(26, 128), (42, 128), (46, 144)])
def test_the_largest_gemma_scales_by_the_hidden_size(layers: int, scalar: int) -> None:
    header = Header(block_count=layers, head_count=32, width=4608, key_length=128)
    assert FAMILIES["gemma2"].keys(header)["query_pre_attn_scalar"] == scalar  # type: ignore[arg-type]
