"""Headers of models without their weights: folders, an index alone, GGUF files, and the Hub with its failures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, NotASafetensorsRepoError

from aphro_core.checkpoint.headers import read_headers
from aphro_core.errors import ModelError
from tests.tiny import write_tiny_checkpoint, write_tiny_gguf


def test_folder_with_several_files(tmp_path: Path) -> None:
    model = write_tiny_checkpoint(tmp_path, "llama", max_shard_size="100KB")
    headers = read_headers(str(tmp_path))
    assert headers.tensors is not None
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    stored = {name for name in model.state_dict() if name != "lm_head.weight"}
    assert {tensor.name for tensor in headers.tensors} == stored
    assert headers.file_bytes == sum(model.state_dict()[name].numel() * 4 for name in stored)


def test_index_alone_states_the_size(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "whole", "llama", max_shard_size="100KB")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors.index.json"):
        shutil.copy(tmp_path / "whole" / name, bare / name)
    headers = read_headers(str(bare))
    assert headers.tensors is None
    assert headers.file_bytes == read_headers(str(tmp_path / "whole")).file_bytes


def test_config_alone(tmp_path: Path) -> None:
    path = tmp_path / "any.json"
    path.write_text('{"model_type": "llama"}')
    assert read_headers(str(path)).hf_config == {"model_type": "llama"}
    path.write_text("[]")
    with pytest.raises(ModelError, match="expected an object"):
        read_headers(str(path))
    path.write_text("{")
    with pytest.raises(ModelError, match="JSON"):
        read_headers(str(path))


def test_gguf_of_a_supported_family(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "x.gguf", "llama", quant="Q4_0")
    headers = read_headers(str(tmp_path / "x.gguf"))
    assert headers.hf_config["architectures"] == ["LlamaForCausalLM"]
    assert headers.tensors is not None
    embedding = next(tensor for tensor in headers.tensors if tensor.name == "token_embd.weight")
    assert embedding.num_bytes == embedding.num_elements // 32 * 18


def test_gguf_of_another_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are read under whatever architecture the file names."""
    monkeypatch.setattr("aphro_core.checkpoint.gguf_families.FAMILIES", {})
    write_tiny_gguf(tmp_path / "x.gguf", "llama")
    config = read_headers(str(tmp_path / "x.gguf")).hf_config
    assert (config["model_type"], config["hidden_size"], config["num_hidden_layers"]) == ("llama", 256, 2)
    assert config["num_key_value_heads"] == 2


def fake_hub(monkeypatch: pytest.MonkeyPatch, folder: Path, metadata: Any) -> list[str]:
    asked: list[str] = []

    def fetch(model: str, name: str, **_: Any) -> str:
        asked.append(name)
        return str(folder / name)

    def headers(model: str, **_: Any) -> Any:
        asked.append("headers")
        if isinstance(metadata, Exception):
            raise metadata
        return metadata

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", headers)
    return asked


def test_hub_id_fetches_config_and_headers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    info = SimpleNamespace(dtype="BF16", shape=[4, 8], data_offsets=(0, 64))
    found = SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors={"model.norm.weight": info})})
    asked = fake_hub(monkeypatch, tmp_path, found)
    lines: list[str] = []
    headers = read_headers("owner/model", on_progress=lines.append)
    assert asked == ["config.json", "headers"]
    assert headers.tensors is not None
    assert (headers.tensors[0].num_elements, headers.tensors[0].num_bytes, headers.file_bytes) == (32, 64, 64)
    assert "owner/model" in lines[0]


def test_hub_without_safetensors_gives_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    fake_hub(monkeypatch, tmp_path, NotASafetensorsRepoError("none"))
    assert read_headers("owner/model").tensors is None


def test_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(model: str, name: str, **_: Any) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    with pytest.raises(ModelError, match="cannot be reached"):
        read_headers("owner/model")


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model at"):
        read_headers(str(tmp_path / "missing.gguf"))
    with pytest.raises(ModelError, match=r"config\.json"):
        read_headers(str(tmp_path))
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="is no model"):
        read_headers(str(tmp_path / "weights.bin"))
