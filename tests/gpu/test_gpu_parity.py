"""On GPUs: float32 tokens equal transformers for every family, on one device and over two; bfloat16 runs; it serves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aphro_core.checkpoint.open import read_hf_config
from aphro_core.llm import LLM
from aphro_core.models.registry import load_spec
from aphro_core.parallel.shard import build_plan
from aphro_core.request import SamplingParams
from tests.e2e.server_process import running_server
from tests.families import TINY
from tests.formats import TINY_FORMATS, round_inputs, write_tiny_format
from tests.reference import Reference
from tests.tiny import PLAIN, write_tiny_checkpoint

NUM_GPUS = torch.cuda.device_count()
FAMILIES = tuple(TINY)
FORMATS = (
    "gptq",
    "gptq-act-order",
    "awq",
    "fp8-block",
    "compressed-fp8-dynamic",
    "compressed-int8-w8a8",
    "compressed-w4a16",
)

pytestmark = pytest.mark.skipif(NUM_GPUS == 0, reason="no CUDA device")


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_tokens_equal_transformers(tmp_path: Path, family: str, tp: int, pp: int) -> None:
    if tp * pp > NUM_GPUS:
        pytest.skip(f"needs {tp * pp} GPUs")
    if family not in PLAIN and (tp, pp) != (1, 1):
        pytest.skip("one layout of several ranks is enough for what differs")
    model = write_tiny_checkpoint(tmp_path, family)
    reference = Reference(model, prompt_lengths=(1, 5, 17, 40, 33), new=12)
    with LLM(
        str(tmp_path),
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        device="cuda",
        dtype="float32",
        max_num_batched_tokens=24,
        num_blocks=64,
        max_model_len=128,
        skip_tokenizer_init=True,
    ) as llm:
        outputs = llm.generate(reference.prompts, reference.greedy)
        sampled = [
            llm.generate([reference.prompts[2]] * n, SamplingParams(seed=5, max_tokens=12))[0].outputs[0].token_ids
            for n in (1, 16)
        ]
    assert [list(output.outputs[0].token_ids) for output in outputs] == reference.tokens
    assert sampled[0] == sampled[1]
    for output, rows in zip(outputs, reference.logprobs, strict=True):
        for position, row in zip(output.outputs[0].logprobs or [], rows, strict=True):
            for token_id, entry in position.items():
                assert entry.logprob == pytest.approx(float(row[token_id]), abs=1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_quantised_tokens_equal_transformers(tmp_path: Path, name: str) -> None:
    """On the dequantised weights; decode takes the kernel, the prompts of more than 64 rows a dequantised copy."""
    assert name in TINY_FORMATS
    model = write_tiny_format(tmp_path, name)
    round_inputs(model, name, build_plan(load_spec(read_hf_config(tmp_path)), 1, 1))
    reference = Reference(model, prompt_lengths=(1, 17, 40, 70), new=12)
    with LLM(
        str(tmp_path), device="cuda", dtype="float32", num_blocks=64, max_model_len=128, skip_tokenizer_init=True
    ) as llm:
        outputs = llm.generate(reference.prompts, reference.greedy)
    assert [list(output.outputs[0].token_ids) for output in outputs] == reference.tokens


@pytest.mark.parametrize("tp", [1, 2])
def test_bfloat16_serves(tmp_path: Path, tp: int) -> None:
    import httpx

    if tp > NUM_GPUS:
        pytest.skip(f"needs {tp} GPUs")
    write_tiny_checkpoint(tmp_path / "tiny", "qwen2", max_position_embeddings=1024)
    arguments = ("--skip-tokenizer-init", "--dtype", "bfloat16", "-tp", str(tp), "--max-model-len", "1024")
    with running_server(tmp_path, tmp_path / "tiny", *arguments, device="cuda", seconds=180) as server:
        body = {"prompt": list(range(5, 25)), "max_tokens": 32, "temperature": 0, "ignore_eos": True}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] == 32
        log = server.log.read_text()
    assert "# GPU blocks: " in log
