"""On GPUs: float32 tokens equal transformers for every family, on one device and over two; bfloat16 runs; it serves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aphro_core.checkpoint.open import read_hf_config
from aphro_core.llm import LLM
from aphro_core.models.registry import load_spec
from aphro_core.parallel.shard import build_plan
from aphro_core.prepare import EngineOptions, prepare
from aphro_core.reporter import SilentReporter
from aphro_core.request import SamplingParams
from tests.e2e.server_process import running_server
from tests.families import TINY
from tests.formats import TINY_FORMATS, round_inputs, write_tiny_format
from tests.gguf_families import TINY_GGUF, write_gguf_family
from tests.reference import Reference
from tests.tiny import PLAIN, write_tiny_checkpoint, write_tiny_gguf

NUM_GPUS = torch.cuda.device_count()
FAMILIES = tuple(TINY)
LAYOUTS = {  # (tp, pp): what differs between families is the same in each
    (1, 1): FAMILIES,
    (2, 1): (*PLAIN, "mixtral", "qwen2_moe"),
    (1, 2): PLAIN,
    **dict.fromkeys([(3, 1), (4, 1), (2, 2)], ("llama", "qwen2", "mixtral")),
}
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


@pytest.mark.parametrize(
    ("family", "tp", "pp"), [(family, *layout) for layout, families in LAYOUTS.items() for family in families]
)
def test_float32_tokens_equal_transformers(tmp_path: Path, family: str, tp: int, pp: int) -> None:
    if tp * pp > NUM_GPUS:
        pytest.skip(f"needs {tp * pp} GPUs")
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


@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3"])
def test_tokens_of_long_prompts_on_two_gpus_equal_transformers(
    tmp_path: Path, family: str, enforce_eager: bool
) -> None:
    """Sums of so many rows that each rank adds up some of them; logits of all rows of a prompt are asked for, too."""
    if NUM_GPUS < 2:
        pytest.skip("needs two GPUs")
    model = write_tiny_checkpoint(tmp_path, family, max_position_embeddings=2048)
    reference = Reference(model, prompt_lengths=(1100, 17, 530, 513), new=4)
    greedy = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=5)
    asking = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, prompt_logprobs=1)
    with LLM(
        str(tmp_path),
        tensor_parallel_size=2,
        device="cuda",
        dtype="float32",
        max_num_batched_tokens=1300,
        max_num_prefill_tokens=1300,
        max_num_seqs=8,
        num_blocks=400,
        max_model_len=1200,
        enforce_eager=enforce_eager,
        skip_tokenizer_init=True,
    ) as llm:
        outputs = llm.generate(reference.prompts, greedy)
        asked = llm.generate(reference.prompts, asking)
    assert [list(output.outputs[0].token_ids) for output in outputs] == reference.tokens
    assert [list(output.outputs[0].token_ids) for output in asked] == reference.tokens
    for output, rows in zip(outputs, reference.logprobs, strict=True):
        for position, row in zip(output.outputs[0].logprobs or [], rows, strict=True):
            for token_id, entry in position.items():
                assert entry.logprob == pytest.approx(float(row[token_id]), abs=2e-4)


@pytest.mark.parametrize(("family", "tp"), [("mixtral", 2), ("qwen2_moe", 2), ("mixtral", 3)])
def test_whole_experts_on_each_gpu_give_the_tokens_of_transformers(tmp_path: Path, family: str, tp: int) -> None:
    """Five or seven experts are shared out unevenly; the rows of the long prompt stand by expert."""
    if tp > NUM_GPUS:
        pytest.skip(f"needs {tp} GPUs")
    model = write_tiny_checkpoint(tmp_path, family, max_position_embeddings=2048)
    reference = Reference(model, prompt_lengths=(1, 17, 600), new=8)
    with LLM(
        str(tmp_path),
        tensor_parallel_size=tp,
        enable_expert_parallel=True,
        device="cuda",
        dtype="float32",
        max_num_batched_tokens=800,
        num_blocks=128,
        max_model_len=700,
        skip_tokenizer_init=True,
    ) as llm:
        outputs = llm.generate(reference.prompts, reference.greedy)
    assert [list(output.outputs[0].token_ids) for output in outputs] == reference.tokens


@pytest.mark.parametrize(
    ("name", "tp"), [*((name, 1) for name in FORMATS), *((name, 2) for name in FORMATS if "dynamic" not in name)]
)
def test_quantised_tokens_equal_transformers(tmp_path: Path, name: str, tp: int) -> None:
    """On the dequantised weights; decode takes the kernel, the prompts of more than 64 rows a dequantised copy."""
    assert name in TINY_FORMATS
    if tp > NUM_GPUS:
        pytest.skip(f"needs {tp} GPUs")
    model = write_tiny_format(tmp_path, name)
    round_inputs(model, name, build_plan(load_spec(read_hf_config(tmp_path)), tp, 1))
    reference = Reference(model, prompt_lengths=(1, 17, 40, 70), new=12)
    with LLM(
        str(tmp_path),
        tensor_parallel_size=tp,
        device="cuda",
        dtype="float32",
        num_blocks=64,
        max_model_len=128,
        skip_tokenizer_init=True,
    ) as llm:
        outputs = llm.generate(reference.prompts, reference.greedy)
    assert [list(output.outputs[0].token_ids) for output in outputs] == reference.tokens


class Lines(SilentReporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def first_logprobs(path: Path, prompts: list[list[int]], quantization: str | None) -> list[dict[int, float]]:
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=5)
    with LLM(
        str(path),
        device="cuda",
        dtype="float16",
        quantization=quantization,
        num_blocks=64,
        max_model_len=128,
        skip_tokenizer_init=True,
    ) as llm:
        outputs = llm.generate(prompts, params)
    found = []
    for output in outputs:
        choice = output.outputs[0]
        assert len(choice.token_ids) == 6
        (first, *_) = choice.logprobs or []
        found.append({token: entry.logprob for token, entry in first.items()})
    return found


@pytest.mark.parametrize("name", ["Q4_K_M", "Q5_0", "mixtral", "qwen2moe"])
def test_gguf_blocks_stay_packed(tmp_path: Path, name: str) -> None:
    """In 16 bits they do so by default; what is computed is that of the expanded weights up to rounding."""
    path = tmp_path / "model.gguf"
    if name in TINY_GGUF:
        write_gguf_family(tmp_path, name, "Q4_0")
    else:
        others = {"v_proj": "Q6_K", "layers.0.mlp.down": "Q6_K", "layers.1.mlp.up": "Q6_K"} if name == "Q4_K_M" else {}
        write_tiny_gguf(path, quant="Q4_K" if others else name, others=others)
    lines = Lines()
    prepare(EngineOptions(model=str(path), device="cuda", dtype="float16"), lines)
    assert any("gguf, kept packed (" in line for line in lines.lines)
    prompts = [[7 * i % 120 + 1 for i in range(length)] for length in (1, 9, 40, 75)]
    packed, expanded = (first_logprobs(path, prompts, asked) for asked in (None, "none"))
    for one, other in zip(packed, expanded, strict=True):
        for token in one.keys() & other.keys():
            assert one[token] == pytest.approx(other[token], abs=0.15, rel=0.03)


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
