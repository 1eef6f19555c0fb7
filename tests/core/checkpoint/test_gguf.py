"""GGUF files: every block format, cuts and interleaved rows equal the gguf package's own dequantisation."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from aphro_core.checkpoint.gguf import GGUFCheckpoint, hf_name
from aphro_core.checkpoint.gguf_families import FAMILIES
from aphro_core.checkpoint.gguf_header import FORMATS
from aphro_core.checkpoint.open import open_checkpoint
from aphro_core.errors import ModelError
from aphro_core.models.registry import load_spec
from tests import tiny

NAMES = [each.name for each in FORMATS.values()]
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module", params=NAMES)
def quantised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    path = tmp_path_factory.mktemp("gguf") / f"{request.param}.gguf"
    return path, tiny.write_tiny_gguf(path, quant=request.param).state_dict()


def test_block_formats_have_the_packages_sizes() -> None:
    for type_id, found in FORMATS.items():
        qtype = GGMLQuantizationType(type_id)
        assert (qtype.name, *gguf.GGML_QUANT_SIZES[qtype]) == (found.name, found.elements, found.num_bytes)


def test_whole_tensors_equal_the_packages(quantised: tuple[Path, dict[str, Any]]) -> None:
    path, state = quantised
    with open_checkpoint(path) as checkpoint:
        checkpoint.verify(load_spec(checkpoint.hf_config))
        for name in checkpoint.tensor_names:
            assert torch.equal(checkpoint.read(name, dtype=torch.float32), state[name]), name


def test_cuts_equal_slices_of_the_whole(quantised: tuple[Path, dict[str, Any]]) -> None:
    path, state = quantised
    cuts = [
        (Q_PROJ, 0, 32, 96),  # whole heads
        (Q_PROJ, 0, 5, 70),  # within heads
        ("model.layers.1.self_attn.k_proj.weight", 0, 32, 64),
        ("model.layers.0.mlp.down_proj.weight", 1, 96, 160),  # whole small blocks, parts of large ones
        ("model.layers.0.mlp.down_proj.weight", 1, 7, 301),
        ("model.layers.0.self_attn.o_proj.weight", 1, 224, 256),
        ("model.embed_tokens.weight", 0, 64, 131),
        ("model.norm.weight", 0, 3, 9),
    ]
    with open_checkpoint(path) as checkpoint:
        for name, dim, start, stop in cuts:
            found = checkpoint.read(name, dim, start, stop)
            assert torch.equal(found.float(), state[name].narrow(dim, start, stop - start)), (name, dim, start, stop)


def test_only_the_rows_and_blocks_of_a_cut_are_read(tmp_path: Path) -> None:
    tiny.write_tiny_gguf(tmp_path / "x.gguf", quant="Q4_0")
    with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
        assert checkpoint.bytes_read == 0
        checkpoint.read("model.layers.0.mlp.up_proj.weight", 0, 100, 110)
        assert checkpoint.bytes_read == 10 * 256 // 32 * 18
        checkpoint.read("model.layers.0.mlp.down_proj.weight", 1, 33, 95)  # inside blocks 1 and 2
        assert checkpoint.bytes_read == 10 * 256 // 32 * 18 + 256 * 2 * 18
        checkpoint.read(Q_PROJ, 0, 32, 64)
        assert checkpoint.bytes_read == 10 * 256 // 32 * 18 + 256 * 2 * 18 + 32 * 256 // 32 * 18


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_chunks_do_not_show(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "chunks.gguf"
    if not path.exists():
        tiny.write_tiny_gguf(path, quant="Q5_1")
    with GGUFCheckpoint(path) as checkpoint:
        name = data.draw(st.sampled_from([Q_PROJ, "model.layers.0.mlp.gate_proj.weight"]))
        size = checkpoint.shape(name)[0]
        start = data.draw(st.integers(0, size - 1))
        stop = data.draw(st.integers(start + 1, size))
        expected = checkpoint.read(name, 0, start, stop)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GGUFCheckpoint, "chunk_elements", data.draw(st.integers(1, 20_000)))
            assert torch.equal(checkpoint.read(name, 0, start, stop), expected)


def test_rows_of_llama_are_un_interleaved_as_transformers_does(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    tiny.write_tiny_gguf(path, quant="Q8_0", num_attention_heads=4, num_key_value_heads=2)
    processor = LlamaTensorProcessor(config={"num_attention_heads": 4, "num_key_value_heads": 2})
    with open_checkpoint(path) as checkpoint:
        for tensor in GGUFReader(path).tensors:
            values = np.array(quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            theirs = processor.process(values, tensor.name).weights
            name = hf_name(tensor.name, FAMILIES["llama"])
            assert torch.equal(checkpoint.read(name), torch.from_numpy(np.ascontiguousarray(theirs)))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_rows_of_other_families_stay(family: str, tmp_path: Path) -> None:
    overrides = {"use_sliding_window": False} if family == "qwen2" else {}
    state = tiny.write_tiny_gguf(tmp_path / "x.gguf", family, **overrides).state_dict()
    with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
        spec = load_spec(checkpoint.hf_config)
        checkpoint.verify(spec)
        assert spec.qkv_bias == (family == "qwen2")
        assert spec.qk_norm == (family == "qwen3")
        assert all(torch.equal(checkpoint.read(name), state[name]) for name in checkpoint.tensor_names)


def test_the_config_is_that_of_the_model_written(tmp_path: Path) -> None:
    model = tiny.write_tiny_gguf(
        tmp_path / "x.gguf", tie_word_embeddings=False, metadata={"tokenizer.ggml.eot_token_id": 5}
    )
    theirs = load_spec(model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "eos_token_id": [2, 5]})
    with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
        ours = load_spec(checkpoint.hf_config, "none")
    for key in theirs.__dataclass_fields__:
        found, expected = getattr(ours, key), getattr(theirs, key)
        if key == "norm_eps":
            assert math.isclose(found, expected, rel_tol=1e-6)
        elif key == "dtype":
            assert found == "bfloat16"
        else:
            assert found == expected, key


def test_metadata_and_token_arrays_are_plain_values(tmp_path: Path) -> None:
    tiny.write_tiny_gguf(tmp_path / "x.gguf")
    with GGUFCheckpoint(tmp_path / "x.gguf") as checkpoint:
        tokens = checkpoint.metadata("tokenizer.ggml.tokens")
        assert (len(tokens), tokens[0], tokens[7]) == (131, "ünïcode", "<7>")
        assert checkpoint.metadata("tokenizer.ggml.token_type") == [1] * 131
        assert checkpoint.metadata("tokenizer.ggml.merges") == ["a b", "b c"]
        assert checkpoint.metadata("tokenizer.ggml.bos_token_id") == 1
        assert checkpoint.metadata("no.such.key") is None
        assert checkpoint.metadata("no.such.key", 3) == 3
        reader = GGUFReader(tmp_path / "x.gguf")
        assert set(checkpoint.metadata_keys) == {key for key in reader.fields if not key.startswith("GGUF.")}
        for key in checkpoint.metadata_keys:
            assert checkpoint.metadata(key) == reader.fields[key].contents(), key


@pytest.mark.parametrize(
    ("metadata", "kind", "factors"),
    [
        ({"llama.rope.scaling.type": "none"}, "default", {}),
        ({"llama.rope.scaling.type": "linear"}, "linear", {"factor": 4.0}),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.original_context_length": 64},
            "yarn",
            {"factor": 4.0, "original_max_position_embeddings": 64.0},
        ),
    ],
)
def test_rope_scaling_keys(tmp_path: Path, metadata: dict[str, Any], kind: str, factors: dict[str, float]) -> None:
    extra = metadata | ({"llama.rope.scaling.factor": 4} if factors else {})
    tiny.write_tiny_gguf(tmp_path / "x.gguf", metadata=extra)
    with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
        rope = load_spec(checkpoint.hf_config).rope
    assert (rope.kind, rope.theta) == (kind, 10_000.0)
    assert factors.items() <= rope.factors.items()


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_llama3_scaling_is_read_back_from_its_factors(tmp_path: Path) -> None:
    tiny.write_tiny_gguf(tmp_path / "x.gguf", rope_parameters=dict(LLAMA3))
    with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
        assert "rope_freqs.weight" not in checkpoint.tensor_names
        spec = load_spec(checkpoint.hf_config)
        checkpoint.verify(spec)
    assert (spec.rope.kind, spec.rope.theta) == ("llama3", 5e5)
    assert spec.rope.factors == {key: value for key, value in LLAMA3.items() if key not in ("rope_type", "rope_theta")}


def test_other_factors_than_llama3s_are_refused(tmp_path: Path) -> None:
    other = LLAMA3 | {"low_freq_factor": 2.0}
    tiny.write_tiny_gguf(tmp_path / "x.gguf", rope_parameters=other)
    with pytest.raises(ModelError, match=r"rope_freqs\.weight that Llama 3's rule with factor 32 does not yield"):
        open_checkpoint(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"split.count": 3}, "one of 3 split files"),
        ({"llama.rope.scaling.type": "longrope"}, "lacks rope_parameters.short_factor"),
        ({"llama.rope.scale_linear": "x"}, "scale_linear is 'x', expected a number"),
    ],
)
def test_what_has_no_counterpart_is_refused(tmp_path: Path, metadata: dict[str, Any], problem: str) -> None:
    tiny.write_tiny_gguf(tmp_path / "x.gguf", metadata=metadata)
    with pytest.raises(ModelError, match=problem):
        load_spec(open_checkpoint(tmp_path / "x.gguf").hf_config)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="architecture 'mamba', supported: llama, qwen, qwen2, qwen2moe"):
        open_checkpoint(tmp_path / "x.gguf")


def test_an_unsupported_tensor_type_names_tensor_and_type(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    tiny.write_tiny_gguf(path, quant="Q8_0")
    raw = path.read_bytes()
    at = raw.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4 + 2 * 8
    assert raw[at : at + 4] == (8).to_bytes(4, "little")
    path.write_bytes(raw[:at] + (16).to_bytes(4, "little") + raw[at + 4 :])
    with (
        open_checkpoint(path) as checkpoint,
        pytest.raises(ModelError, match=r"q_proj\.weight \(blk\.0\.attn_q\.weight\) .* of type IQ2_XXS, allowed: F32"),
    ):
        checkpoint.verify(load_spec(checkpoint.hf_config))


def test_smollm2_equals_the_packages_dequantisation_whole_and_cut(smollm2_gguf: Path) -> None:
    with GGUFCheckpoint(smollm2_gguf) as checkpoint:
        data = np.memmap(smollm2_gguf)
        processor = LlamaTensorProcessor(config={"num_attention_heads": 9, "num_key_value_heads": 3})
        for name in ("blk.0.attn_q", "blk.7.attn_k", "blk.29.ffn_down", "blk.3.attn_output", "blk.1.ffn_norm"):
            info = checkpoint._header.tensors[f"{name}.weight"]
            qtype = GGMLQuantizationType(info.type_id)
            rows = math.prod(info.shape[:-1])
            raw = data[info.offset : info.offset + rows * info.row_bytes].reshape(rows, -1)
            values = processor.process(quants.dequantize(raw, qtype).reshape(info.shape), info.name).weights
            whole, ours = torch.from_numpy(np.ascontiguousarray(values)), hf_name(info.name, FAMILIES["llama"])
            assert torch.equal(checkpoint.read(ours), whole)
            if whole.ndim == 2:
                assert torch.equal(checkpoint.read(ours, 0, 64, 192), whole[64:192])
                assert torch.equal(checkpoint.read(ours, 1, 100, 500), whole[:, 100:500])
        vocab = checkpoint.read("model.embed_tokens.weight", 0, 49_000, 49_152, dtype=torch.bfloat16)
        assert (vocab.shape, vocab.dtype) == ((152, 576), torch.bfloat16)


def test_smollm2_opens_quickly_with_its_vocabulary(smollm2_gguf: Path) -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        with GGUFCheckpoint(smollm2_gguf) as checkpoint:
            checkpoint.verify(load_spec(checkpoint.hf_config))
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3
    with GGUFCheckpoint(smollm2_gguf) as checkpoint:
        assert len(checkpoint.metadata("tokenizer.ggml.tokens")) == 49_152
        assert checkpoint.metadata("tokenizer.ggml.pre") == "smollm"
        assert load_spec(checkpoint.hf_config).eos_token_ids == (2,)
