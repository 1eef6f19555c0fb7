"""Greedy tokens and log-probabilities equal transformers in float32, for every family x tp x pp."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from aphro_core.checkpoint.open import read_hf_config
from aphro_core.llm import LLM
from aphro_core.models.packed import column_group
from aphro_core.models.registry import load_spec
from aphro_core.models.spec import DecoderSpec
from aphro_core.models.tensors import Axis
from aphro_core.parallel.shard import build_plan
from aphro_core.quantization.online import quantise
from aphro_core.request import RequestOutput, SamplingParams
from tests.formats import TINY_FORMATS, round_inputs, write_tiny_format
from tests.reference import Reference, load_reference
from tests.tiny import FAMILIES, write_tiny_checkpoint

pytestmark = pytest.mark.usefixtures("warm_start")

NEW_TOKENS = 12
PROMPT_LENGTHS = (1, 5, 17, 40, 33)
LEGAL_SHAPES = [(tp, pp) for tp in (1, 2, 3, 4) for pp in (1, 2, 3)]
COVERING_SHAPES = [(1, 1), (3, 1), (2, 2)]  # even and uneven, the others with --full-matrix


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    folder = tmp_path_factory.mktemp(request.param)
    model = write_tiny_checkpoint(folder, request.param)
    return folder, Reference(model, prompt_lengths=PROMPT_LENGTHS, new=NEW_TOKENS)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_tiny_checkpoint(folder, "llama")
    return folder


def check(outputs: list[RequestOutput], reference: Reference) -> None:
    assert [list(output.outputs[0].token_ids) for output in outputs] == reference.tokens
    for output, expected in zip(outputs, reference.logprobs, strict=True):
        positions = output.outputs[0].logprobs
        assert positions is not None
        for token_id, position, row in zip(output.outputs[0].token_ids, positions, expected, strict=True):
            assert position[token_id].rank == 1
            for candidate, logprob in position.items():
                assert logprob.logprob == pytest.approx(float(row[candidate]), abs=1e-4)


def check_most(outputs: list[RequestOutput], reference: Reference) -> None:
    """The same tokens, and most of their log-probabilities: a number beside a code's border falls to its other side
    where its scale, found from float32 sums, differs in the last place."""
    errors = []
    for output, tokens, rows in zip(outputs, reference.tokens, reference.logprobs, strict=True):
        choice = output.outputs[0]
        assert list(choice.token_ids) == tokens
        for position, row in zip(choice.logprobs or [], rows, strict=True):
            errors.append(max(abs(entry.logprob - float(row[token])) for token, entry in position.items()))
    assert sum(error < 1e-4 for error in errors) > len(errors) / 2
    assert max(errors) < 1.0


@pytest.mark.parametrize(("tp", "pp"), LEGAL_SHAPES)
def test_every_family_and_shape(
    family: tuple[Path, Reference], tp: int, pp: int, request: pytest.FixtureRequest
) -> None:
    """Five prompts of mixed lengths at once, chunked (24 tokens a step), beyond the windows."""
    folder, reference = family
    is_first = request.node.callspec.params["family"] == FAMILIES[0]
    if not is_first and (tp, pp) not in COVERING_SHAPES and not request.config.getoption("full_matrix"):
        pytest.skip("--full-matrix runs every shape")
    with LLM(
        str(folder),
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        device="cpu",
        dtype="float32",
        max_num_batched_tokens=24,
        num_blocks=64,
        max_model_len=128,
        skip_tokenizer_init=True,
    ) as llm:
        outputs = llm.generate(reference.prompts, reference.greedy)
    check(outputs, reference)


def test_preempted_and_prefix_cached_requests(llama: Path) -> None:
    """Blocks for a fraction of the demand, and prompts that repeat: preemption and prefix hits change no token."""
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    reference = Reference(model, prompt_lengths=(14, 15, 13, 40, 12, 14), new=20)
    with LLM(
        str(llama),
        tensor_parallel_size=2,
        device="cpu",
        dtype="float32",
        max_model_len=64,
        num_blocks=6,
        skip_tokenizer_init=True,
    ) as llm:
        first = llm.generate(reference.prompts * 2, reference.greedy)
        again = [llm.generate([reference.prompts[3]], reference.greedy)[0] for _ in range(2)]
        stats = llm.stats()
    check(first[: len(reference.prompts)], reference)
    check(first[len(reference.prompts) :], reference)
    assert [output.outputs[0].token_ids for output in again] == [reference.tokens[3]] * 2
    assert stats.num_preemptions > 0
    assert stats.num_prefix_hits > 0


@pytest.mark.parametrize(("tp", "pp"), [(3, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_expert_parallel(name: str, tp: int, pp: int, tmp_path: Path) -> None:
    """5 and 7 experts on 2, 3 and 4 ranks."""
    reference = Reference(write_tiny_checkpoint(tmp_path, name), prompt_lengths=(1, 17, 40), new=NEW_TOKENS)
    with LLM(
        str(tmp_path),
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        enable_expert_parallel=True,
        device="cpu",
        dtype="float32",
        max_num_batched_tokens=24,
        num_blocks=64,
        max_model_len=128,
        skip_tokenizer_init=True,
    ) as llm:
        outputs = llm.generate(reference.prompts, reference.greedy)
    check(outputs, reference)


@pytest.mark.parametrize("name", TINY_FORMATS)
def test_every_format(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Tokens of the dequantised weights in transformers, even and uneven."""
    written = write_tiny_format(tmp_path, name)
    shapes = [(tp, pp) for tp in (1, 2, 3, 4) for pp in (1, 2)]
    for tp, pp in shapes if request.config.getoption("full_matrix") else [(3, 1)]:
        model = deepcopy(written)
        round_inputs(model, name, build_plan(load_spec(read_hf_config(tmp_path)), tp, pp))
        reference = Reference(model, prompt_lengths=(1, 17, 40), new=NEW_TOKENS)
        with LLM(
            str(tmp_path),
            tensor_parallel_size=tp,
            pipeline_parallel_size=pp,
            device="cpu",
            dtype="float32",
            max_num_batched_tokens=24,
            num_blocks=64,
            max_model_len=128,
            skip_tokenizer_init=True,
        ) as llm:
            outputs = llm.generate(reference.prompts, reference.greedy)
        if TINY_FORMATS[name].inputs == "dynamic":
            check_most(outputs, reference)
        else:
            check(outputs, reference)


@pytest.mark.parametrize("name", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_quantised_while_loading(name: str, family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Tokens of the dequantised weights in transformers: every tp x pp has the same codes."""
    model = write_tiny_checkpoint(tmp_path, family)
    dequantise(model, load_spec(read_hf_config(tmp_path), name))
    reference = Reference(model, prompt_lengths=(1, 17, 40), new=NEW_TOKENS)
    shapes = [(3, 1, False), (2, 2, family != "llama")]
    if request.config.getoption("full_matrix"):
        shapes.append((1, 1, False))
    for tp, pp, expert_parallel in shapes:
        with LLM(
            str(tmp_path),
            tensor_parallel_size=tp,
            pipeline_parallel_size=pp,
            enable_expert_parallel=expert_parallel,
            quantization=name,
            device="cpu",
            dtype="float32",
            num_blocks=64,
            max_model_len=128,
            skip_tokenizer_init=True,
        ) as llm:
            outputs = llm.generate(reference.prompts, reference.greedy)
        check(outputs, reference)


@torch.no_grad()
def dequantise(model: PreTrainedModel, spec: DecoderSpec) -> None:
    """What quantising while loading makes of every linear weight of the blocks, put back as numbers."""
    assert spec.quantization is not None
    for name, parameter in model.named_parameters():
        if "_proj" not in name or name.endswith("bias"):
            continue
        axis: Axis = "hidden"
        if "o_proj" in name:
            axis = "heads"
        elif "down_proj" in name:
            axis = "shared_mlp" if "shared" in name else "expert_mlp" if "experts" in name else "mlp"
        matrix = parameter.reshape(-1, parameter.shape[-1])
        packed = quantise(matrix, spec.quantization.kind, column_group(spec, axis), torch.float32)
        parameter.copy_(packed.dequantise(torch.float32).view_as(parameter))


def test_packed_gguf_is_its_dequantised_twin(smollm2_gguf: Path, smollm2_reference: Reference) -> None:
    with LLM(
        str(smollm2_gguf),
        tensor_parallel_size=3,
        quantization="gguf",
        device="cpu",
        dtype="float32",
        num_blocks=64,
        max_model_len=256,
        skip_tokenizer_init=True,
    ) as llm:
        outputs = llm.generate(smollm2_reference.prompts, smollm2_reference.greedy)
    check(outputs, smollm2_reference)


@pytest.fixture(scope="module")
def smollm2_reference(smollm2_gguf: Path) -> Reference:
    return Reference(load_reference(smollm2_gguf), prompt_lengths=(1, 9, 30), new=8)


@pytest.mark.parametrize(("tp", "pp"), LEGAL_SHAPES)
def test_smollm2(
    tp: int, pp: int, smollm2_gguf: Path, smollm2_reference: Reference, request: pytest.FixtureRequest
) -> None:
    if (tp, pp) not in COVERING_SHAPES and not request.config.getoption("full_matrix"):
        pytest.skip("--full-matrix runs every shape")
    with LLM(
        str(smollm2_gguf),
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        device="cpu",
        dtype="float32",
        num_blocks=64,
        max_model_len=256,
        skip_tokenizer_init=True,
    ) as llm:
        outputs = llm.generate(smollm2_reference.prompts, smollm2_reference.greedy)
    check(outputs, smollm2_reference)


def test_sampling_is_a_function_of_seed_and_position(llama: Path) -> None:
    """The same request gives the same tokens alone, in a batch of 16, after a preemption, for any tp x pp."""
    prompt, params = list(range(3, 23)), SamplingParams(seed=1234, temperature=0.9, top_p=0.95, max_tokens=20)
    others = [list(range(n, 2 * n + 5)) for n in range(1, 16)]
    other_params = [SamplingParams(seed=n, temperature=1.5, max_tokens=24) for n in range(1, 16)]
    seen = []
    for tp, pp, num_blocks in ((1, 1, 96), (1, 1, 12), (3, 1, 96), (2, 2, 96)):
        with LLM(
            str(llama),
            tensor_parallel_size=tp,
            pipeline_parallel_size=pp,
            device="cpu",
            dtype="float32",
            max_model_len=128,
            num_blocks=num_blocks,
            skip_tokenizer_init=True,
        ) as llm:
            alone = llm.generate([prompt], params)
            batch = llm.generate([prompt, *others], [params, *other_params])
            if num_blocks == 12:
                assert llm.stats().num_preemptions > 0
        seen += [list(alone[0].outputs[0].token_ids), list(batch[0].outputs[0].token_ids)]
    assert len(set(map(tuple, seen))) == 1
