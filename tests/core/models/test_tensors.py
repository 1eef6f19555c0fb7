"""Rules to pieces: the names and layouts that ARCHITECTURE.md promises, on hand-checked shards."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from aphro_core.models.llama import tensors as rules
from aphro_core.models.registry import FAMILIES
from aphro_core.models.spec import DecoderSpec, RopeSpec
from aphro_core.models.tensors import parameter_shapes, rank_pieces, source_shapes, tied_parameters

SPEC = DecoderSpec(
    architecture="LlamaForCausalLM",
    vocab_size=100,
    hidden_size=24,
    intermediate_size=40,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    norm_eps=1e-5,
    rope=RopeSpec(theta=1e4, rotary_dim=4),
    max_position_embeddings=64,
    tie_word_embeddings=False,
)


def shard(**changes: object) -> SimpleNamespace:
    """The second of two tp ranks, on one stage."""
    base = {
        "tp_rank": 1,
        "layers": range(2),
        "heads": range(3, 6),
        "kv_heads": range(1, 2),
        "mlp": range(20, 40),
        "experts": range(0),
        "expert_mlp": range(0),
        "shared_mlp": range(0),
        "vocab": range(64, 128),
        "has_embedding": True,
        "has_head": True,
    }
    return SimpleNamespace(**base | changes)


def pieces_of(spec: DecoderSpec, **changes: object) -> dict[tuple[str, str], tuple[int | None, range, int]]:
    pieces = rank_pieces(rules, spec, shard(**changes))
    found = {(piece.parameter, piece.source): (piece.dim, piece.index, piece.offset) for piece in pieces}
    assert len(found) == len(pieces)
    return found


def test_q_k_and_v_rows_are_fused_in_this_order() -> None:
    pieces, at = pieces_of(SPEC), "model.layers.1.self_attn"
    qkv = "layers.1.attention.qkv_proj.weight"
    assert pieces[qkv, f"{at}.q_proj.weight"] == (0, range(12, 24), 0)
    assert pieces[qkv, f"{at}.k_proj.weight"] == (0, range(4, 8), 12)
    assert pieces[qkv, f"{at}.v_proj.weight"] == (0, range(4, 8), 16)
    assert parameter_shapes(rules, SPEC, shard())[qkv] == (20, 24)


def test_gate_comes_before_up_and_the_row_parallel_ones_are_cut_by_columns() -> None:
    pieces = pieces_of(SPEC)
    assert pieces["layers.0.mlp.gate_up_proj.weight", "model.layers.0.mlp.gate_proj.weight"] == (0, range(20, 40), 0)
    assert pieces["layers.0.mlp.gate_up_proj.weight", "model.layers.0.mlp.up_proj.weight"] == (0, range(20, 40), 20)
    assert pieces["layers.0.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.weight"] == (1, range(20, 40), 0)
    assert pieces["layers.0.attention.o_proj.weight", "model.layers.0.self_attn.o_proj.weight"] == (1, range(12, 24), 0)
    norm = pieces["layers.0.input_norm.weight", "model.layers.0.input_layernorm.weight"]
    assert norm == (None, range(24), 0)


def test_vocabulary_padding_has_no_piece() -> None:
    embedding = ("embed_tokens.weight", "model.embed_tokens.weight")
    assert pieces_of(SPEC)[embedding] == (0, range(64, 100), 0)
    behind = pieces_of(SPEC, vocab=range(128, 192))
    assert embedding not in behind
    assert parameter_shapes(rules, SPEC, shard(vocab=range(128, 192)))["embed_tokens.weight"] == (64, 24)


def test_biases_behind_an_all_reduce_are_on_the_first_rank_only() -> None:
    spec = replace(SPEC, qkv_bias=True, o_bias=True, mlp_bias=True)
    first, second = (parameter_shapes(rules, spec, shard(tp_rank=rank)) for rank in (0, 1))
    assert set(first) - set(second) == {
        f"layers.{i}.{name}.bias" for i in (0, 1) for name in ("attention.o_proj", "mlp.down_proj")
    }
    assert second["layers.0.attention.qkv_proj.bias"] == (20,)
    assert second["layers.0.mlp.gate_up_proj.bias"] == (40,)
    assert not any(name.endswith("bias") for name in parameter_shapes(rules, SPEC, shard(tp_rank=0)))


def test_qk_norms_are_whole_on_every_rank() -> None:
    pieces = pieces_of(replace(SPEC, qk_norm=True))
    q_norm = pieces["layers.0.attention.q_norm.weight", "model.layers.0.self_attn.q_norm.weight"]
    assert q_norm == (None, range(4), 0)


def test_a_stage_has_only_its_layers_and_ends() -> None:
    first = parameter_shapes(rules, SPEC, shard(layers=range(1), has_head=False))
    last = parameter_shapes(rules, SPEC, shard(layers=range(1, 2), has_embedding=False))
    assert "embed_tokens.weight" in first
    assert not {"norm.weight", "lm_head.weight"} & set(first)
    assert {"norm.weight", "lm_head.weight"} < set(last)
    assert "embed_tokens.weight" not in last
    assert {name.split(".")[1] for name in last if name.startswith("layers.")} == {"1"}


def test_a_tied_head_is_the_embedding_or_on_another_stage_its_copy() -> None:
    tied = replace(SPEC, tie_word_embeddings=True)
    assert tied_parameters(rules, tied, shard()) == {"lm_head.weight": "embed_tokens.weight"}
    assert "lm_head.weight" not in parameter_shapes(rules, tied, shard())
    last = pieces_of(tied, has_embedding=False)
    assert last["lm_head.weight", "model.embed_tokens.weight"] == (0, range(64, 100), 0)
    assert tied_parameters(rules, tied, shard(has_embedding=False)) == {}
    assert tied_parameters(rules, SPEC, shard()) == {}


def test_sources_name_every_checkpoint_tensor_once() -> None:
    shapes = source_shapes(rules, SPEC)
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (8, 24)
    assert shapes["model.layers.0.self_attn.o_proj.weight"] == (24, 24)
    assert shapes["lm_head.weight"] == (100, 24)
    assert "lm_head.weight" not in source_shapes(rules, replace(SPEC, tie_word_embeddings=True))
    assert len(shapes) == 3 + 2 * 9


@pytest.mark.parametrize("name", FAMILIES)
def test_rules_of_a_family_name_each_parameter_once(name: str) -> None:
    parameters = [rule.parameter for rule in FAMILIES[name].tensors]
    assert len(set(parameters)) == len(parameters)
    sources = [(source.name, source.part) for rule in FAMILIES[name].tensors for source in rule.sources]
    assert len(set(sources)) == len(sources)
