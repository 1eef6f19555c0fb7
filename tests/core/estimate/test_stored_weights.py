"""Weights by the tensors of the files: synthetic headers of published models, cut as servers cut them."""

from __future__ import annotations

from typing import Any

import pytest

from aphro_core.estimate.config_reader import read_facts
from aphro_core.estimate.parameters import RankSlice
from aphro_core.estimate.weights import StoredTensor, allocator_slack, stored_weight_bytes, weight_bytes
from tests.core.estimate.configs import LLAMA_8B, QWEN_72B


def files_of(config: dict[str, Any]) -> list[StoredTensor]:
    """The tensors of a dense checkpoint in bfloat16."""
    hidden, columns = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    shapes = {"model.embed_tokens.weight": config["vocab_size"] * hidden, "model.norm.weight": hidden,
              "lm_head.weight": config["vocab_size"] * hidden}  # fmt: skip
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": hidden * hidden for name in "qo"}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": hidden * kv for name in "kv"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": hidden * columns for name in ("gate", "up", "down")}
        shapes |= {f"{layer}.{name}_layernorm.weight": hidden for name in ("input", "post_attention")}
    return [StoredTensor(name, count, 2 * count, is_float=True) for name, count in shapes.items()]


SLICES = [(1, 32, True, True), (4, 32, True, True), (1, 16, True, False), (2, 16, False, True), (16, 32, True, True)]


@pytest.mark.parametrize(("tp", "layers", "first", "last"), SLICES)
def test_files_and_config_agree(tp: int, layers: int, first: bool, last: bool) -> None:
    facts = read_facts(LLAMA_8B)
    part = RankSlice(range(layers), 0, tp, first, last)
    counted = weight_bytes(facts, part, "bfloat16", None)
    assert stored_weight_bytes(facts, part, files_of(LLAMA_8B), "bfloat16") == pytest.approx(counted, rel=1e-6)


def test_run_dtype_counts_not_the_files() -> None:
    facts, part = read_facts(LLAMA_8B), RankSlice(range(32), 0, 1, True, True)
    stored = [StoredTensor(each.name, each.num_elements, 4 * each.num_elements, True) for each in files_of(LLAMA_8B)]
    whole = stored_weight_bytes(facts, part, stored, "bfloat16")
    assert whole == stored_weight_bytes(facts, part, files_of(LLAMA_8B), "bfloat16")


def test_packed_tensors_keep_their_bytes() -> None:
    facts, part = read_facts(LLAMA_8B), RankSlice(range(32), 0, 2, True, True)
    packed = [StoredTensor("model.layers.0.mlp.down_proj.qweight", 1000, 4000, False)]
    assert stored_weight_bytes(facts, part, packed, "bfloat16") == 2000


def test_drafts_and_towers() -> None:
    facts = read_facts(LLAMA_8B)
    tensors = [
        StoredTensor("mtp.layers.0.mlp.up_proj.weight", 1000, 2000, True),
        StoredTensor("vision_tower.encoder.layers.0.fc1.weight", 1000, 2000, True),
        StoredTensor("model.layers.3.mlp.gate.weight", 1000, 2000, True),  # a router, on every rank whole
    ]
    assert stored_weight_bytes(facts, RankSlice(range(32), 0, 2, True, True), tensors, "bfloat16") == 1000 + 2000
    assert stored_weight_bytes(facts, RankSlice(range(16, 32), 0, 2, False, True), tensors, "bfloat16") == 0


@pytest.mark.parametrize(("tp", "mib"), [(2, 80), (4, 120)])
def test_allocator_rounds_large_matrices(tp: int, mib: int) -> None:
    """Qwen2.5-72B: printed weights are 0.078 and 0.117 GiB above its parameters."""
    part = RankSlice(range(80), 0, tp, True, True)
    assert round(allocator_slack(read_facts(QWEN_72B), part, "bfloat16", None) / 2**20) == mib
