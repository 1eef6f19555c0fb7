"""GGUF headers from an enemy: cut, flipped or lying, each ends in a ModelError that names the file."""

from __future__ import annotations

import re
import struct
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aphro_core.checkpoint.file import ModelFile
from aphro_core.checkpoint.gguf import GGUFCheckpoint
from aphro_core.checkpoint.gguf_header import GGUFHeader
from aphro_core.errors import ModelError
from aphro_core.models.registry import load_spec
from tests import tiny


@pytest.fixture(scope="module")
def sound_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "sound.gguf"
    tiny.write_tiny_gguf(path, quant="Q4_0", num_hidden_layers=1)
    return path


@pytest.fixture
def sound(sound_path: Path) -> bytes:
    return sound_path.read_bytes()


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def header(values: bytes = b"", num_values: int = 0, tensors: bytes = b"", num_tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_values) + values + tensors


def refusal(tmp_path: Path, raw: bytes) -> str:
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    with pytest.raises(ModelError) as error:
        GGUFCheckpoint(path)
    assert str(path) in error.value.message
    assert error.value.hint
    return error.value.message


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.02, 0.05, 0.3, 0.7, 0.999])
def test_a_truncated_file_is_refused_before_use(tmp_path: Path, sound: bytes, share: float) -> None:
    message = refusal(tmp_path, sound[: int(len(sound) * share)])
    assert "not a GGUF" in message or "truncated" in message


def test_the_last_missing_byte_is_noticed_with_both_sizes(tmp_path: Path, sound: bytes) -> None:
    end = len(sound.rstrip(b"\0"))  # the writer pads the last tensor
    message = refusal(tmp_path, sound[: end - 40])
    assert f"the file has {end - 40}" in message


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_flipped_header_bytes_never_give_more_than_a_model_error(sound_path: Path, data: st.DataObject) -> None:
    raw = bytearray(sound_path.read_bytes())
    for at in data.draw(st.lists(st.integers(0, 6000), min_size=1, max_size=4)):
        raw[at] = data.draw(st.integers(0, 255))
    path = sound_path.with_name("flipped.gguf")
    path.write_bytes(raw)
    try:
        with GGUFCheckpoint(path) as checkpoint:
            checkpoint.verify(load_spec(checkpoint.hf_config))
            for key in checkpoint.metadata_keys:
                checkpoint.metadata(key)
    except ModelError:
        pass


def test_versions_and_byte_orders_are_named(tmp_path: Path, sound: bytes) -> None:
    assert "version 1, allowed: 2 and 3" in refusal(tmp_path, sound[:4] + struct.pack("<I", 1) + sound[8:])
    assert "big-endian" in refusal(tmp_path, sound[:4] + struct.pack(">I", 3) + sound[8:])
    assert "not a GGUF file" in refusal(tmp_path, b"GGML" + sound[4:])


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (string(b"k") + struct.pack("<I", 99), "value of type 99"),
        (string(b"k") + struct.pack("<IIQ", 9, 4, 2**62), "does not end within"),
        (string(b"k") + struct.pack("<IIQ", 9, 8, 2**62), "does not end within"),
        (string(b"k") + struct.pack("<IQ", 8, 2**63), "does not end within"),
        (string(b"k") + struct.pack("<IIQ", 9, 9, 1) * 1 + struct.pack("<IQ", 9, 1) * 9, "arrays up to 4 deep"),
        (string(b"\xff\xfe") + struct.pack("<II", 4, 1), "not UTF-8"),
        (string(b"general.alignment") + struct.pack("<II", 4, 3), "general.alignment is 3, allowed: a power of two"),
        (string(b"general.architecture") + struct.pack("<I", 8) + string(b"\xff"), "general.architecture is not UTF-8"),
        (string(b"general.architecture") + struct.pack("<IIQ", 9, 4, 0), r"architecture '\[\]'"),
    ],
)
def test_lying_values_are_refused(tmp_path: Path, values: bytes, problem: str) -> None:
    assert re.search(problem, refusal(tmp_path, header(values, 1)))


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (string(b"t") + struct.pack("<I", 9), "t has 9 dimensions"),
        (string(b"t") + struct.pack("<IQQIQ", 2, 32, 2**40, 2, 0), "t ends at byte"),
        (string(b"t") + struct.pack("<IQIQ", 1, 33, 2, 0), "t has rows of 33, expected whole blocks of 32"),
        (string(b"t") + struct.pack("<IQIQ", 1, 32, 0, 2**63), "t ends at byte"),
        ((string(b"t") + struct.pack("<IQIQ", 1, 0, 0, 0)) * 2, "two tensors have the same name"),
    ],
)
def test_lying_tensors_are_refused(tmp_path: Path, tensor: bytes, problem: str) -> None:
    num_tensors = 2 if "two" in problem else 1
    assert problem in refusal(tmp_path, header(tensors=tensor, num_tensors=num_tensors).ljust(256, b"\0"))


def test_arrays_of_arrays_are_read(tmp_path: Path) -> None:
    inner = struct.pack("<IQ", 8, 2) + string(b"a") + string(b"b")
    path = tmp_path / "nested.gguf"
    path.write_bytes(header(string(b"k") + struct.pack("<IIQ", 9, 9, 2) + inner * 2, 1))
    with ModelFile(path) as file:
        found = GGUFHeader(file)
        assert found.value("k") == [["a", "b"], ["a", "b"]]
        found.close()


@pytest.mark.parametrize(
    ("start", "problem"),
    [
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**40), "claims 1099511627776 metadata values"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**40, 0), "claims 1099511627776 tensors"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**32), "claims 4294967296 bytes of a name"),
        (header(string(b"k") + struct.pack("<IIQ", 9, 8, 2**30), 1), "claims 1073741824 items of its arrays"),
        (header(string(b"k") + struct.pack("<IIQ", 9, 0, 2**32), 1), "claims 4294967308 bytes of k"),
    ],
)
def test_a_file_with_holes_that_claims_too_much_is_refused_at_once(tmp_path: Path, start: bytes, problem: str) -> None:
    path = tmp_path / "holes.gguf"
    with path.open("wb") as file:
        file.write(start)
        file.truncate(20 * 2**30)
    began = time.process_time()
    with pytest.raises(ModelError, match=problem):
        GGUFCheckpoint(path)
    assert time.process_time() - began < 1.0
