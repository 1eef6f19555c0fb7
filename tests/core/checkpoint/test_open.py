"""The door: which file a model is, and every refusal with the name of the file and the next step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file, save_file

from aphro_core.checkpoint.headers import read_headers
from aphro_core.checkpoint.model_files import model_files
from aphro_core.checkpoint.open import open_checkpoint, read_hf_config, resolve_model
from aphro_core.errors import ModelError
from aphro_core.models.registry import load_spec
from tests import tiny


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny.write_tiny_checkpoint(folder, "llama", num_layers=2)
    return folder


@pytest.fixture
def whole(written: Path, tmp_path: Path) -> Path:
    """A folder that a test may damage."""
    for file in written.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny.write_tiny_checkpoint(tmp_path, "llama", num_layers=2, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors") | {
        key.replace("__", "."): value for key, value in changes.items()
    }
    save_file({key: value for key, value in tensors.items() if value is not None}, folder / "model.safetensors")


def verify(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        checkpoint.verify(load_spec(checkpoint.hf_config))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("max_shard_size", ["5GB", "60KB"])
def test_every_family_opens_and_verifies(family: str, max_shard_size: str, tmp_path: Path) -> None:
    model = tiny.write_tiny_checkpoint(tmp_path, family, max_shard_size=max_shard_size)
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.verify(load_spec(checkpoint.hf_config))
        assert checkpoint.bytes_read == 0
        if family in tiny.PLAIN:
            state = model.state_dict()
            assert all(torch.equal(checkpoint.read(name), state[name]) for name in checkpoint.tensor_names)


def test_generation_config_adds_its_end_tokens(whole: Path) -> None:
    change_json(whole / "generation_config.json", eos_token_id=[7, 2])
    with open_checkpoint(whole) as checkpoint:
        assert load_spec(checkpoint.hf_config).eos_token_ids == (2, 7)
    (whole / "generation_config.json").unlink()
    with open_checkpoint(whole) as checkpoint:
        assert load_spec(checkpoint.hf_config).eos_token_ids == (2,)


def test_metadata_needs_no_torch(whole: Path) -> None:
    gguf_path = whole / "x.gguf"
    tiny.write_tiny_gguf(gguf_path)
    script = (
        "import sys; from pathlib import Path; from aphro_core.checkpoint.open import open_checkpoint\n"
        "from aphro_core.models.registry import load_spec\n"
        "for path in sys.argv[1:]:\n"
        "    with open_checkpoint(Path(path)) as checkpoint: checkpoint.verify(load_spec(checkpoint.hf_config))\n"
        "assert not {'torch', 'transformers', 'gguf', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, str(whole), str(gguf_path)], check=True, timeout=60)


def test_a_missing_tensor_is_named(whole: Path) -> None:
    change_tensors(whole, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(ModelError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight, which LlamaForCausalLM needs"):
        verify(whole)


def test_a_wrong_shape_is_named_with_both_shapes(whole: Path) -> None:
    change_json(whole / "config.json", intermediate_size=160)
    with pytest.raises(ModelError, match=r"gate_proj\.weight in .* has shape \[176, 72\], expected \[160, 72\]"):
        verify(whole)


def test_a_parameter_that_would_be_ignored_is_refused(whole: Path) -> None:
    change_tensors(whole, model__layers__0__self_attn__q_proj__bias=torch.ones(72))
    with pytest.raises(ModelError, match=r"q_proj\.bias is in .*, but LlamaForCausalLM with this config has no such"):
        verify(whole)


def test_rotary_tables_and_a_tied_models_head_may_be_there(whole: Path) -> None:
    change_tensors(
        whole, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4), lm_head__weight=torch.ones(131, 72)
    )
    verify(whole)


def test_an_untied_config_needs_its_head(whole: Path) -> None:
    change_json(whole / "config.json", tie_word_embeddings=False)
    with pytest.raises(ModelError, match=r"lacks lm_head\.weight, and the config says tie_word_embeddings false"):
        verify(whole)


def test_an_unreadable_type_is_refused_by_verify(whole: Path) -> None:
    change_tensors(whole, model__norm__weight=torch.ones(72, dtype=torch.int32))
    with pytest.raises(ModelError, match=r"model\.norm\.weight in .* is of type I32"):
        verify(whole)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(
        ModelError, match=f"lacks {shard.name} of the \\d+ files that model.safetensors.index.json names"
    ):
        open_checkpoint(sharded)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "model.bin", "..", ""])
def test_an_index_cannot_point_elsewhere(sharded: Path, name: str) -> None:
    change_json(sharded / "model.safetensors.index.json", weight_map={"model.norm.weight": name})
    with pytest.raises(ModelError, match=r"index\.json names the file"):
        open_checkpoint(sharded)


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ModelError, match=shard.name):
        open_checkpoint(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(ModelError, match="is in both"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\xff"])
def test_a_config_that_is_no_object_is_refused(whole: Path, text: str) -> None:
    (whole / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"config\.json"):
        open_checkpoint(whole)


def test_pickles_are_refused_with_the_remedy(whole: Path) -> None:
    (whole / "model.safetensors").rename(whole / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin, a pickle") as error:
        open_checkpoint(whole)
    assert "save_pretrained" in str(error.value.hint)


def test_a_folder_without_weights_or_config_is_refused(whole: Path) -> None:
    (whole / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no \*\.safetensors"):
        open_checkpoint(whole)
    (whole / "config.json").unlink()
    (whole / "x.gguf").touch()
    with pytest.raises(ModelError, match=r"has no config\.json") as error:
        open_checkpoint(whole)
    assert str(whole / "x.gguf") in str(error.value.hint)


def test_a_file_that_is_no_model_is_refused(whole: Path) -> None:
    with pytest.raises(ModelError, match="is no model, allowed: a folder") as error:
        open_checkpoint(whole / "model.safetensors")
    assert str(whole) in str(error.value.hint)


def test_a_path_that_does_not_exist_lists_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "SmolLM2-135M").mkdir()
    with pytest.raises(ModelError, match=r"no model at .*SmolLM2-136M; near it in .*: SmolLM2-135M") as error:
        resolve_model(str(tmp_path / "SmolLM2-136M"))
    assert error.value.hint == str(tmp_path / "SmolLM2-135M")
    with pytest.raises(ModelError, match=r"near it in .*: SmolLM2-135M"):
        resolve_model(str(tmp_path / "SmolLM2-13" / "deep" / "down"))


def test_a_local_path_is_taken_as_it_is(whole: Path) -> None:
    assert resolve_model(str(whole)) == whole


def test_an_id_is_fetched_with_only_the_files_that_serving_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}

    def fetch(model: str, **options: Any) -> str:
        asked.update(options, model=model)
        return str(tmp_path)

    said: list[str] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve_model("owner/name", revision="v1", on_progress=said.append) == tmp_path
    assert (asked["model"], asked["revision"]) == ("owner/name", "v1")
    assert len(said) == 1
    wanted = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "chat_template.jinja", "merges.txt"]
    left = ["pytorch_model.bin", "model.gguf", "original/params.json", "consolidated.safetensors", "modeling_x.py"]
    filtered = huggingface_hub.utils.filter_repo_objects(
        wanted + left, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(filtered) == wanted


def _of_response(kind: type[Exception]) -> Exception:
    import httpx

    return kind("no", response=httpx.Response(403, request=httpx.Request("GET", "https://example.invalid")))


@pytest.mark.parametrize(
    ("error", "problem", "hint"),
    [
        (_of_response(GatedRepoError), "is gated", "HF_TOKEN"),
        (_of_response(RepositoryNotFoundError), "no Hugging Face model 'owner/name'", "spelling"),
        (_of_response(RevisionNotFoundError), "'owner/name' at revision 'v9'", "--revision"),
        (LocalEntryNotFoundError("offline"), "the Hub cannot be reached", "local folder"),
        (OSError(28, "No space left on device"), "OSError: .*No space left on device", "try again"),
    ],
)
def test_what_the_hub_refuses_ends_in_a_next_step(
    monkeypatch: pytest.MonkeyPatch, error: Exception, problem: str, hint: str
) -> None:
    def fetch(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(ModelError, match=problem) as raised:
        resolve_model("owner/name", revision="v9")
    assert hint in str(raised.value.hint)


def test_what_is_no_id_is_refused_without_a_network() -> None:
    with pytest.raises(ModelError, match="'a b' is neither a path nor a Hugging Face id"):
        resolve_model("a b")
    with pytest.raises(ModelError, match="name is empty"):
        resolve_model("")


def test_a_cached_model_is_found_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "models--owner--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolve_model("owner/name") == snapshot
    with pytest.raises(ModelError, match="not in the Hugging Face cache, and the Hub cannot be reached"):
        resolve_model("owner/other")


@pytest.mark.parametrize(
    ("name", "section", "method"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 128, "desc_act": True, "sym": True}, "gptq"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"}, "awq"),
        ("config.json", None, "compressed-tensors"),
    ],
)
def test_a_quantisation_that_older_writers_put_elsewhere(
    name: str, section: dict[str, Any] | None, method: str, whole: Path
) -> None:
    if section is None:
        weights = {"num_bits": 8, "type": "float", "strategy": "tensor"}
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        change_json(whole / name, compression_config={"format": "float-quantized", "config_groups": groups})
    else:
        (whole / name).write_text(json.dumps(section))
    found = load_spec(read_hf_config(whole)).quantization
    assert found is not None
    assert (found.layout, found.bits) == (method, 8 if section is None else 4)
    headers = read_headers(str(whole))
    assert load_spec(headers.hf_config).quantization == found
    assert name in [file.name for file in model_files(whole)]
    change_json(whole / "config.json", quantization_config={"quant_method": "fp8"})
    found = load_spec(read_hf_config(whole)).quantization
    assert found is not None
    assert found.layout == "fp8"
