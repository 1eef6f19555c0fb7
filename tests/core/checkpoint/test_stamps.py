"""Files that change while a model is served are noticed before an engine is started again with them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from aphro_core.checkpoint import model_files
from aphro_core.checkpoint.model_files import check_unchanged, stamps_of
from aphro_core.errors import ModelError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(model_files, "_SMALL_BYTES", 100)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"w" * 1000)
    (tmp_path / "other.txt").write_text("not a part of the model")
    return tmp_path


def _replace(path: Path) -> None:
    """As copies do that keep size and date."""
    shutil.copy2(path, path.with_name("new"))
    os.replace(path.with_name("new"), path)


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("model.safetensors", lambda path: os.truncate(path, 999), "it had 1000 bytes, it has 999"),
        ("model.safetensors", lambda path: path.unlink(), "is gone since the server started"),
        ("model.safetensors", lambda path: path.write_bytes(b"x" * 1000), "has changed"),
        ("model.safetensors", _replace, "has changed"),
        ("config.json", lambda path: path.write_text("[]"), "has changed"),
    ],
)
def test_a_change_is_named(folder: Path, name: str, change: Callable[[Path], None], problem: str) -> None:
    stamps = stamps_of(folder)
    check_unchanged(folder, stamps)
    change(folder / name)
    with pytest.raises(ModelError, match=problem) as raised:
        check_unchanged(folder, stamps)
    assert str(folder / name) in raised.value.message


def test_what_is_the_same_or_no_part_of_the_model_does_not_matter(folder: Path) -> None:
    stamps = stamps_of(folder)
    (folder / "config.json").write_text("{}")
    (folder / "other.txt").write_text("changed")
    (folder / "model.safetensors").read_bytes()
    check_unchanged(folder, stamps)
    check_unchanged(folder, ())


def test_a_single_file_is_a_model_too(folder: Path) -> None:
    path = folder / "model.safetensors"
    stamps = stamps_of(path)
    check_unchanged(path, stamps)
    os.utime(path, ns=(1, 1))
    with pytest.raises(ModelError, match=f"{path} has changed"):
        check_unchanged(path, stamps)
