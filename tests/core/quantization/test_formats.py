"""Every layout's reader: what each rank holds is its part of the dequantised weights, and the bytes are as planned."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aphro_core.checkpoint.open import open_checkpoint, read_hf_config
from aphro_core.llm import LLM
from aphro_core.models.registry import load_spec
from aphro_core.parallel.memory import weights_bytes
from aphro_core.parallel.shard import RankShard, build_plan, legal_tensor_parallel_sizes
from aphro_core.worker.loader import load_weights
from tests.formats import TINY_FORMATS, round_inputs, write_tiny_format
from tests.reference import Reference

pytestmark = pytest.mark.usefixtures("warm_start")

CPU = torch.device("cpu")


def expected(state: dict[str, Tensor], shard: RankShard, width: int, layer: int) -> dict[str, Tensor]:
    at, mlp = f"model.layers.{layer}", slice(shard.mlp.start, shard.mlp.stop)
    q = slice(shard.heads.start * width, shard.heads.stop * width)
    kv = slice(shard.kv_heads.start * width, shard.kv_heads.stop * width)
    qkv = [state[f"{at}.self_attn.{name}_proj.weight"] for name in "qkv"]
    return {
        "attention.qkv_proj": torch.cat([qkv[0][q], qkv[1][kv], qkv[2][kv]]),
        "attention.o_proj": state[f"{at}.self_attn.o_proj.weight"][:, q],
        "mlp.gate_up_proj": torch.cat([state[f"{at}.mlp.{name}_proj.weight"][mlp] for name in ("gate", "up")]),
        "mlp.down_proj": state[f"{at}.mlp.down_proj.weight"][:, mlp],
    }


MIXTURES = {"num_local_experts": 3, "num_experts_per_tok": 2}
SHARED = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
SHARED |= {"shared_expert_intermediate_size": 96, "mlp_only_layers": [1]}


@pytest.mark.parametrize(
    ("family", "name", "sizes"),
    [
        ("mixtral", "gptq-act-order", MIXTURES),
        ("mixtral", "fp8-block", MIXTURES),
        ("qwen2_moe", "compressed-w4a16-asymmetric", SHARED),
        ("qwen2_moe", "compressed-int8-w8a8", SHARED),
        ("phi3", "awq", {"rope_parameters": None, "original_max_position_embeddings": 256}),
        ("opt", "gptq-act-order", {"word_embed_proj_dim": 96, "ffn_dim": 160}),
        ("nemotron", "compressed-fp8-dynamic", {}),
    ],
)
def test_layouts_do_not_depend_on_the_family(
    family: str, name: str, sizes: dict[str, object], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Experts, fused tensors, other names: the greedy tokens of three ranks, whose logits add up."""
    model = write_tiny_format(tmp_path, name, family, **sizes)
    for tp in (3, 1) if request.config.getoption("full_matrix") else (3,):
        rounding = deepcopy(model)
        if "moe" not in family:  # transformers has the experts in one module
            round_inputs(rounding, name, build_plan(load_spec(read_hf_config(tmp_path)), tp, 1))
        reference = Reference(rounding, prompt_lengths=(3, 9), new=6)
        with LLM(
            str(tmp_path),
            tensor_parallel_size=tp,
            device="cpu",
            dtype="float32",
            num_blocks=16,
            max_model_len=64,
            skip_tokenizer_init=True,
        ) as llm:
            outputs = llm.generate(reference.prompts, reference.greedy)
        assert [list(output.outputs[0].token_ids) for output in outputs] == reference.tokens


@pytest.mark.parametrize("name", TINY_FORMATS)
def test_ranks_hold_their_part_of_the_dequantised_weights(name: str, tmp_path: Path) -> None:
    state = write_tiny_format(tmp_path, name).state_dict()
    for tp in (1, 2, 3, 5):
        for rank in range(tp):
            with open_checkpoint(tmp_path) as checkpoint:
                spec = load_spec(checkpoint.hf_config)
                assert 5 in legal_tensor_parallel_sizes(spec)
                shard = build_plan(spec, tp, 1).ranks[rank]
                weights = load_weights(checkpoint, spec, shard, torch.float32, CPU)
            total = 0
            for layer in shard.layers:
                for part, matrix in expected(state, shard, spec.head_dim, layer).items():
                    packed = weights[f"layers.{layer}.{part}.weight"]
                    assert isinstance(packed, list)
                    found = torch.cat([each.dequantise(torch.float32) for each in packed])
                    torch.testing.assert_close(found, matrix, atol=1e-5, rtol=1e-5)
                    total += sum(each.nbytes for each in packed)
            total += sum(weight.nbytes for weight in weights.values() if isinstance(weight, Tensor))
            assert weights_bytes(spec, shard, 4) == total


@pytest.mark.parametrize("name", ["gptq-act-order", "compressed-w4a16-asymmetric", "compressed-fp8-dynamic"])
def test_a_quantised_head_stays_packed(name: str, tmp_path: Path) -> None:
    expected_head = write_tiny_format(tmp_path, name, has_head=True, vocab_size=288).lm_head.weight
    for tp in (1, 3):
        for rank in range(tp):
            with open_checkpoint(tmp_path) as checkpoint:
                spec = load_spec(checkpoint.hf_config)
                shard = build_plan(spec, tp, 1).ranks[rank]
                weights = load_weights(checkpoint, spec, shard, torch.float32, CPU)
            head = weights["lm_head.weight"]
            assert isinstance(head, list)
            mine, found = expected_head[shard.vocab.start : shard.vocab.stop], head[0].dequantise(torch.float32)
            assert len(found) == len(shard.vocab)
            torch.testing.assert_close(found[: len(mine)], mine, atol=1e-5, rtol=1e-5)
            assert not found[len(mine) :].any()
            total = sum(part.nbytes for each in weights.values() if isinstance(each, list) for part in each)
            total += sum(each.nbytes for each in weights.values() if isinstance(each, Tensor))
            assert weights_bytes(spec, shard, 4) == total
