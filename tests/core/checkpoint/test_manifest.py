"""Lists of digests beside a model: a flipped bit is named, whatever the list looks like."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from aphro_core.checkpoint.manifest import verify_manifest
from aphro_core.errors import ModelError
from tests.tiny import write_tiny_checkpoint


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_tiny_checkpoint(tmp_path / "model", "llama")
    return tmp_path / "model"


def digest_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def write_list(folder: Path, form: str) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    if form == "FILE.sha256":
        (folder / "model.safetensors.sha256").write_text(digest_of(weights).upper() + "\n")
    elif form == "FILE.sha256 with its name":
        (folder / "model.safetensors.sha256").write_text(f"{digest_of(weights)}  build/model.safetensors\n")
    else:
        lines = ["# made by hand", f"{digest_of(weights)}  ./model.safetensors", f"{digest_of(config)} *config.json"]
        (folder / form).write_text("\n".join(lines) + "\n")


FORMS = ["SHA256SUMS", "FILE.sha256", "FILE.sha256 with its name"]


@pytest.mark.parametrize("form", FORMS)
def test_a_flipped_bit_is_named(folder: Path, form: str) -> None:
    write_list(folder, form)
    assert "as their list says" in (verify_manifest(folder) or "")
    weights = folder / "model.safetensors"
    expected, data = digest_of(weights), bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ModelError) as caught:
        verify_manifest(folder)
    assert str(weights) in caught.value.message
    assert expected in caught.value.message
    assert digest_of(weights) in caught.value.message


def test_another_file_under_its_name_is_named(folder: Path) -> None:
    write_list(folder, "SHA256SUMS")
    config = folder / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(ModelError, match=r"config\.json"):
        verify_manifest(folder)


@pytest.mark.parametrize("text", ["", "no digest here\n", "\x00\xff", f"{'0' * 64}  of-another-file\n"])
def test_without_a_digest_of_its_files_nothing_is_said(folder: Path, text: str) -> None:
    (folder / "SHA256SUMS").write_text(text)
    assert verify_manifest(folder) is None
