"""safetensors checkpoints: slices equal the library's, only their bytes are read, damaged files are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from aphro_core.checkpoint.open import open_checkpoint
from aphro_core.checkpoint.safetensors import SafetensorsCheckpoint
from aphro_core.errors import ModelError

TENSORS = {
    "a": torch.arange(7 * 10, dtype=torch.float32).view(7, 10),
    "b": torch.arange(12, dtype=torch.bfloat16),
    "c": torch.arange(6 * 4, dtype=torch.float16).view(6, 4),
    "d": torch.arange(8, dtype=torch.int64),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def rewrite_header(path: Path, change: Any) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_whole_tensors_equal_the_librarys(folder: Path) -> None:
    expected = load_file(folder / "model.safetensors")
    with open_checkpoint(folder) as checkpoint:
        assert set(checkpoint.tensor_names) == set(expected)
        for name in "abc":
            assert checkpoint.shape(name) == tuple(expected[name].shape)
            found = checkpoint.read(name)
            assert found.dtype == expected[name].dtype
            assert torch.equal(found, expected[name])


@pytest.mark.parametrize("chunk_elements", [1, 9, 2**22])
def test_slices_are_exact_and_read_only_their_bytes(
    folder: Path, chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SafetensorsCheckpoint, "chunk_elements", chunk_elements)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.bytes_read == 0
        assert torch.equal(checkpoint.read("a", 0, 2, 5), TENSORS["a"][2:5])
        assert checkpoint.bytes_read == 3 * 10 * 4
        assert torch.equal(checkpoint.read("a", 1, 3, 7), TENSORS["a"][:, 3:7])
        assert checkpoint.bytes_read == 3 * 10 * 4 + 7 * 4 * 4
        assert torch.equal(checkpoint.read("b", 0, 4), TENSORS["b"][4:])
        assert checkpoint.bytes_read == 3 * 10 * 4 + 7 * 4 * 4 + 8 * 2


def test_reads_cast_and_fill_parts_of_larger_tensors(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        assert torch.equal(checkpoint.read("a", 1, 3, 7, dtype=torch.bfloat16), TENSORS["a"][:, 3:7].bfloat16())
        out = torch.full((9, 6), -1.0)
        checkpoint.read_into(out[1:8, 1:5], "a", 1, 2, 6)
        assert torch.equal(out[1:8, 1:5], TENSORS["a"][:, 2:6])
        assert out.sum() == TENSORS["a"][:, 2:6].sum() - (9 * 6 - 7 * 4)
        with pytest.raises(ValueError, match="does not fit"):
            checkpoint.read_into(torch.empty(3, 10), "a", 0, 0, 4)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_slice_equals_torchs(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=2))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    tensor = torch.randn(shape).to(dtype)
    dim = data.draw(st.integers(0, len(shape) - 1))
    start = data.draw(st.integers(0, shape[dim] - 1))
    stop = data.draw(st.integers(start + 1, shape[dim]))
    folder = tmp_path_factory.mktemp("slice")
    save_file({"x": tensor}, folder / "model.safetensors")
    with SafetensorsCheckpoint(folder, {}, ["model.safetensors"]) as checkpoint:
        found = checkpoint.read("x", dim, start, stop)
        assert torch.equal(found, tensor.narrow(dim, start, stop - start))
        assert checkpoint.bytes_read == found.nbytes


def test_a_type_that_is_not_served_is_named(folder: Path) -> None:
    with (
        open_checkpoint(folder) as checkpoint,
        pytest.raises(ModelError, match=r"d in .* is of type I64, allowed: F32, F16, BF16"),
    ):
        checkpoint.check_readable("d")


def test_a_tensor_that_is_not_there_is_named(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint, pytest.raises(ModelError, match="has no tensor e"):
        checkpoint.shape("e")


@pytest.mark.parametrize("keep", [0, 4, 8, 20, 200, -1, -40])
def test_a_truncated_file_is_refused_before_use(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged or truncated: .*\d") as error:
        open_checkpoint(folder)
    if keep < 0:
        assert f"describes {len(data)} bytes, the file has {len(data) + keep}" in error.value.message


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda header: header["a"].update(shape=[7, 11]), r"a F32 \[7, 11\] has 280 bytes, expected 308"),
        (lambda header: header["a"].update(shape=[-7, -10]), "its header is not the expected JSON"),
        (lambda header: header["a"].update(shape=[2**60]), "its header is not the expected JSON"),
        (lambda header: header["a"].update(data_offsets=[0, 280]), "starts at byte"),
        (lambda header: header["a"].update(data_offsets=[280, 0]), "its header is not the expected JSON"),
        (lambda header: header["a"].pop("dtype"), "its header is not the expected JSON"),
        (lambda header: header.update(a=[1]), "its header is not the expected JSON"),
        (lambda header: header["a"].update(shape=[2**47] * 100_000), "its header is not the expected JSON"),
        (lambda header: header.update({f"t{n}": {"data_offsets": [0, 0]} for n in range(2**17)}), "has 131076 tensors"),
        (lambda header: header.update(a=None), "its header is not the expected JSON"),
        (lambda header: header.pop("c"), "starts at byte|describes"),
    ],
)
def test_a_header_that_lies_is_refused(folder: Path, change: Any, problem: str) -> None:
    rewrite_header(folder / "model.safetensors", change)
    with pytest.raises(ModelError, match=problem):
        open_checkpoint(folder)


def test_a_header_that_is_a_list_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((5).to_bytes(8, "little") + b"[1,2]")
    with pytest.raises(ModelError, match="its header is not the expected JSON"):
        open_checkpoint(folder)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_flipped_header_bytes_never_give_more_than_a_model_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    path = folder / "model.safetensors"
    save_file(TENSORS, path)
    raw = bytearray(path.read_bytes())
    header_end = 8 + int.from_bytes(raw[:8], "little")
    for at in data.draw(st.lists(st.integers(0, header_end - 1), min_size=1, max_size=4)):
        raw[at] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        with SafetensorsCheckpoint(folder, {}, ["model.safetensors"]) as checkpoint:
            for name in checkpoint.tensor_names:
                checkpoint.read(name)
    except ModelError:
        pass


def test_a_git_lfs_pointer_is_called_by_its_name(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 100\n"
    (folder / "model.safetensors").write_text(pointer)
    with pytest.raises(ModelError, match="Git LFS pointer"):
        open_checkpoint(folder)


def test_a_file_that_shrinks_while_open_is_reported(folder: Path) -> None:
    path = folder / "model.safetensors"
    start = path.read_bytes().index(TENSORS["a"].numpy().tobytes())
    with open_checkpoint(folder) as checkpoint:
        with path.open("r+b") as file:
            file.truncate(start + 1)
        with pytest.raises(ModelError, match=f"ends at byte {start + 1}, expected data up to byte"):
            checkpoint.read("a")
