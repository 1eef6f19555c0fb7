"""A rank's weights: the promised layout for every family, split and format, and no more bytes read than it needs."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aphro_core.checkpoint.open import open_checkpoint
from aphro_core.errors import ModelError
from aphro_core.models.registry import load_spec
from aphro_core.models.spec import DecoderSpec
from aphro_core.parallel.memory import weights_bytes
from aphro_core.parallel.shard import RankShard, build_plan
from aphro_core.worker.loader import DUMMY_RANGE, dummy_weights, load_weights
from tests import tiny

CPU = torch.device("cpu")
SPLITS = [(1, 1), (2, 1), (3, 2), (4, 1), (1, 4)]


def rows_of(tensor: Tensor, heads: range, head_dim: int) -> Tensor:
    return tensor[heads.start * head_dim : heads.stop * head_dim]


def padded(tensor: Tensor, rows: range) -> Tensor:
    whole = torch.zeros(max(rows.stop, tensor.shape[0]), tensor.shape[1], dtype=tensor.dtype)
    whole[: tensor.shape[0]] = tensor
    return whole[rows.start : rows.stop]


def expected_weights(state: dict[str, Tensor], spec: DecoderSpec, shard: RankShard) -> dict[str, Tensor]:
    """What a rank must hold, spelled out from the whole model's tensors."""
    found: dict[str, Tensor] = {}
    if shard.has_embedding:
        found["embed_tokens.weight"] = padded(state["model.embed_tokens.weight"], shard.vocab)
    if shard.has_head:
        head = "model.embed_tokens.weight" if spec.tie_word_embeddings else "lm_head.weight"
        found["lm_head.weight"] = padded(state[head], shard.vocab)
        found["norm.weight"] = state["model.norm.weight"]
    columns = slice(shard.heads.start * spec.head_dim, shard.heads.stop * spec.head_dim)
    mlp = slice(shard.mlp.start, shard.mlp.stop)
    for i in shard.layers:
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        found[f"{ours}.input_norm.weight"] = state[f"{theirs}.input_layernorm.weight"]
        found[f"{ours}.post_attention_norm.weight"] = state[f"{theirs}.post_attention_layernorm.weight"]
        for kind in ("weight", "bias"):
            parts = [
                rows_of(state[f"{theirs}.self_attn.{name}_proj.{kind}"], heads, spec.head_dim)
                for name, heads in (("q", shard.heads), ("k", shard.kv_heads), ("v", shard.kv_heads))
                if f"{theirs}.self_attn.{name}_proj.{kind}" in state
            ]
            if parts:
                found[f"{ours}.attention.qkv_proj.{kind}"] = torch.cat(parts)
            gates = [state.get(f"{theirs}.mlp.{name}_proj.{kind}") for name in ("gate", "up")]
            if gates[0] is not None and gates[1] is not None:
                found[f"{ours}.mlp.gate_up_proj.{kind}"] = torch.cat([gates[0][mlp], gates[1][mlp]])
        for name in ("q_norm", "k_norm"):
            if f"{theirs}.self_attn.{name}.weight" in state:
                found[f"{ours}.attention.{name}.weight"] = state[f"{theirs}.self_attn.{name}.weight"]
        found[f"{ours}.attention.o_proj.weight"] = state[f"{theirs}.self_attn.o_proj.weight"][:, columns]
        found[f"{ours}.mlp.down_proj.weight"] = state[f"{theirs}.mlp.down_proj.weight"][:, mlp]
        for bias in ("self_attn.o_proj", "mlp.down_proj"):
            if f"{theirs}.{bias}.bias" in state and shard.tp_rank == 0:
                found[f"{ours}.{bias.replace('self_attn', 'attention')}.bias"] = state[f"{theirs}.{bias}.bias"]
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].is_contiguous(), name
        assert torch.equal(found[name], tensor), name


def storage_bytes(weights: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in {tensor.data_ptr(): tensor for tensor in weights.values()}.values())


@pytest.fixture(scope="module", params=[*tiny.PLAIN, "llama-biased"])
def checkpoint_folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp(request.param)
    biases = {"attention_bias": True, "mlp_bias": True} if request.param == "llama-biased" else {}
    model = tiny.write_tiny_checkpoint(folder, request.param.split("-")[0], max_shard_size="60KB", **biases)
    return folder, model.state_dict()


@pytest.mark.parametrize(("tp", "pp"), SPLITS)
def test_every_rank_holds_its_slices(checkpoint_folder: tuple[Path, dict[str, Tensor]], tp: int, pp: int) -> None:
    folder, state = checkpoint_folder
    for rank in range(tp * pp):
        with open_checkpoint(folder) as checkpoint:
            spec = load_spec(checkpoint.hf_config)
            shard = build_plan(spec, tp, pp).ranks[rank]
            weights = load_weights(checkpoint, spec, shard, torch.float32, CPU)
            assert_same(weights, expected_weights(state, spec, shard))
            assert weights_bytes(spec, shard, 4) == storage_bytes(weights)
            if spec.tie_word_embeddings and shard.has_embedding and shard.has_head:
                assert weights["lm_head.weight"] is weights["embed_tokens.weight"]


def test_ranks_read_the_file_once_and_again_only_what_is_replicated(
    checkpoint_folder: tuple[Path, dict[str, Tensor]],
) -> None:
    folder, state = checkpoint_folder
    tp, read = 4, 0  # one more than llama's KV heads
    for rank in range(tp):
        with open_checkpoint(folder) as checkpoint:
            spec = load_spec(checkpoint.hf_config)
            plan = build_plan(spec, tp, 1)
            load_weights(checkpoint, spec, plan.ranks[rank], torch.float32, CPU)
            read += checkpoint.bytes_read
    in_file = {
        name: tensor for name, tensor in state.items() if name != "lm_head.weight" or not spec.tie_word_embeddings
    }
    whole = sum(tensor.nbytes for tensor in in_file.values())
    norms = sum(tensor.nbytes for name, tensor in in_file.items() if "norm" in name)
    kv = sum(tensor.nbytes for name, tensor in in_file.items() if "k_proj" in name or "v_proj" in name)
    kv_copies = sum(len(shard.kv_heads) for shard in plan.ranks) / spec.num_kv_heads - 1
    assert read == whole + (tp - 1) * norms + kv_copies * kv


@pytest.fixture(scope="module", params=["F16", "Q4_0", "Q6_K"])
def gguf_file(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Tensor]]:
    path = tmp_path_factory.mktemp("gguf") / f"{request.param}.gguf"
    return path, tiny.write_tiny_gguf(path, quant=request.param).state_dict()


@pytest.mark.parametrize("tp", [1, 3, 8])
def test_gguf_ranks_hold_the_dequantised_slices(gguf_file: tuple[Path, dict[str, Tensor]], tp: int) -> None:
    path, state = gguf_file
    for rank in range(tp):
        with open_checkpoint(path) as checkpoint:
            spec = load_spec(checkpoint.hf_config, "none")
            shard = build_plan(spec, tp, 1).ranks[rank]
            weights = load_weights(checkpoint, spec, shard, torch.bfloat16, CPU)
        expected = {name: tensor.bfloat16() for name, tensor in expected_weights(state, spec, shard).items()}
        assert_same(weights, expected)


def test_a_rank_reads_its_share_of_a_gguf_file(smollm2_gguf: Path) -> None:
    read = []
    for rank in range(3):
        with open_checkpoint(smollm2_gguf) as checkpoint:
            spec = load_spec(checkpoint.hf_config, "none")
            load_weights(checkpoint, spec, build_plan(spec, 3, 1).ranks[rank], torch.bfloat16, CPU)
            read.append(checkpoint.bytes_read)
    size = smollm2_gguf.stat().st_size
    assert 0.97 * size < sum(read) < 1.01 * size
    assert max(read) < 0.36 * size


def test_progress_counts_to_the_end_and_torch_keeps_its_threads(
    checkpoint_folder: tuple[Path, dict[str, Tensor]],
) -> None:
    folder, _ = checkpoint_folder
    threads = torch.get_num_threads()
    calls: list[tuple[int, int]] = []
    with open_checkpoint(folder) as checkpoint:
        spec = load_spec(checkpoint.hf_config)
        shard = build_plan(spec, 1, 1).ranks[0]
        weights = load_weights(checkpoint, spec, shard, torch.bfloat16, CPU, lambda *call: calls.append(call))
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert {total for _, total in calls} == {storage_bytes(weights)}
    assert calls[-1][0] == calls[-1][1]
    assert torch.get_num_threads() == threads
    in_another: list[int] = []
    thread = threading.Thread(target=lambda: in_another.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert in_another == [threads]


def test_a_failing_read_ends_the_load_and_names_the_file(tmp_path: Path) -> None:
    tiny.write_tiny_checkpoint(tmp_path, "llama")
    path, threads = tmp_path / "model.safetensors", torch.get_num_threads()
    with open_checkpoint(tmp_path) as checkpoint:
        spec = load_spec(checkpoint.hf_config)
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        with pytest.raises(ModelError, match=r"model\.safetensors ends at byte"):
            load_weights(checkpoint, spec, build_plan(spec, 1, 1).ranks[0], torch.float32, CPU)
    assert torch.get_num_threads() == threads


def test_weights_of_another_shape_are_refused_by_the_loader_too(tmp_path: Path) -> None:
    tiny.write_tiny_checkpoint(tmp_path, "llama")
    with open_checkpoint(tmp_path) as checkpoint:
        spec = load_spec({**checkpoint.hf_config, "vocab_size": 132})
        with pytest.raises(ModelError, match=r"embed_tokens\.weight .* has shape \[131, 72\], expected \[132, 72\]"):
            load_weights(checkpoint, spec, build_plan(spec, 1, 1).ranks[0], torch.float32, CPU)


@pytest.mark.parametrize(("tp", "pp"), SPLITS)
def test_dummy_weights_are_the_same_model_for_every_split(
    checkpoint_folder: tuple[Path, dict[str, Tensor]], tp: int, pp: int
) -> None:
    """The whole model's dummy tensors, taken apart, give what each rank of a split must hold."""
    folder, _ = checkpoint_folder
    with open_checkpoint(folder) as checkpoint:
        spec = load_spec(checkpoint.hf_config)
    whole = dummy_weights(spec, build_plan(spec, 1, 1).ranks[0], torch.bfloat16, CPU, seed=3)
    state = hf_state(whole, spec)
    for shard in build_plan(spec, tp, pp).ranks:
        assert_same(dummy_weights(spec, shard, torch.bfloat16, CPU, seed=3), expected_weights(state, spec, shard))


def hf_state(whole: dict[str, Tensor], spec: DecoderSpec) -> dict[str, Tensor]:
    """A one-rank model under Hugging Face names, the inverse of ``expected_weights``."""
    state = {
        "model.embed_tokens.weight": whole["embed_tokens.weight"][: spec.vocab_size],
        "lm_head.weight": whole["lm_head.weight"][: spec.vocab_size],
        "model.norm.weight": whole["norm.weight"],
    }
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    fused = {"attention.qkv_proj": (("q", "k", "v"), (q, kv, kv)), "mlp.gate_up_proj": (("gate", "up"), None)}
    renamed = {"input_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}
    for name, tensor in whole.items():
        if not name.startswith("layers."):
            continue
        _, i, rest = name.split(".", 2)
        stem, kind = rest.rsplit(".", 1)
        if stem in fused:
            parts, sizes = fused[stem]
            room = "self_attn" if "attention" in stem else "mlp"
            split = tensor.split(sizes or tensor.shape[0] // 2)
            state |= {
                f"model.layers.{i}.{room}.{part}_proj.{kind}": each for part, each in zip(parts, split, strict=True)
            }
        else:
            state[f"model.layers.{i}.{renamed.get(stem, stem.replace('attention.', 'self_attn.'))}.{kind}"] = tensor
    return state


def test_dummy_weights_are_uniform_small_and_follow_the_seed(tmp_path: Path) -> None:
    tiny.write_tiny_gguf(tmp_path / "x.gguf")
    with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
        spec = load_spec(checkpoint.hf_config, "none")
    shard = build_plan(spec, 1, 1).ranks[0]
    first, again, other = (dummy_weights(spec, shard, torch.float32, CPU, seed=seed) for seed in (0, 0, 1))
    gate_up = first["layers.0.mlp.gate_up_proj.weight"]
    assert gate_up.abs().max() <= DUMMY_RANGE
    assert gate_up.abs().max() > 0.99 * DUMMY_RANGE
    assert abs(gate_up.mean()) < 0.02 * DUMMY_RANGE
    assert abs(gate_up.std() / DUMMY_RANGE - 3**-0.5) < 0.01
    gate, up = gate_up.chunk(2)
    assert not torch.equal(gate, up)
    assert torch.linalg.matrix_rank(gate.double()) == min(gate.shape)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(gate_up, other["layers.0.mlp.gate_up_proj.weight"])
    assert not torch.equal(gate_up, first["layers.1.mlp.gate_up_proj.weight"])
    assert first["embed_tokens.weight"][spec.vocab_size :].abs().max() == 0
