"""A model read from another host: the weights of one that is here, little more than a rank's bytes; kept, resumed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from aphro_core.checkpoint.open import open_checkpoint
from aphro_core.errors import ModelError
from aphro_core.executor.served_model import MAX_REPLY_BYTES, ServedModel, describe
from aphro_core.messages.model_source import FetchModel
from aphro_core.models.registry import load_spec
from aphro_core.parallel.shard import build_plan
from aphro_core.quantization.matrix import Weights
from aphro_core.worker.fetched_model import FetchedFile, FetchedModel
from aphro_core.worker.loader import load_weights
from tests import tiny
from tests.formats import write_tiny_format

CPU = torch.device("cpu")
PAGE = 4096


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fetch_of(served: ServedModel) -> Callable[[str, list[int]], bytes]:
    def fetch(file: str, ranges: list[int]) -> bytes:
        reply = served._read(FetchModel(3, file, ranges))
        assert reply.number == 3
        if reply.problem:
            raise RuntimeError(reply.problem)
        return reply.data

    return fetch


def write_model(kind: str, folder: Path) -> Path:
    if kind == "safetensors":
        tiny.write_tiny_checkpoint(folder, "llama", hidden_size=288, intermediate_size=2048, vocab_size=2048)
    elif kind == "gguf":
        tiny.write_tiny_gguf(folder.with_suffix(".gguf"), quant="Q4_0")
        return folder.with_suffix(".gguf")
    else:
        write_tiny_format(folder, kind)
    return folder


def load(opened: object, tp: int, pp: int, rank: int) -> Weights:
    with opened as checkpoint:  # type: ignore[attr-defined]
        spec = load_spec(checkpoint.hf_config)
        return load_weights(checkpoint, spec, build_plan(spec, tp, pp).ranks[rank], torch.float32, CPU)


def same(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, (list, tuple)):
        return isinstance(right, (list, tuple)) and all(map(same, left, right))
    if hasattr(left, "__dataclass_fields__"):
        return all(same(getattr(left, name), getattr(right, name)) for name in left.__dataclass_fields__)
    return left == right


@pytest.mark.parametrize("kind", ["safetensors", "gguf", "gptq-act-order", "awq"])
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_weights_are_those_of_the_files(tmp_path: Path, kind: str, tp: int, pp: int) -> None:
    path = write_model(kind, tmp_path / "model")
    served = ServedModel(path)
    for rank in range(2):
        fetched = FetchedModel(served.source, fetch_of(served))
        found, expected = load(fetched.open(), tp, pp, rank), load(open_checkpoint(path), tp, pp, rank)
        assert found.keys() == expected.keys()
        assert all(same(found[name], expected[name]) for name in expected)
    again = FetchedModel(served.source, fetch_of(served))
    load(again.open(), tp, pp, 0)
    assert again.bytes_fetched == 0, "all of it was kept"
    served.close()


def test_a_rank_fetches_its_share_and_takes_no_more_room(tmp_path: Path) -> None:
    """Pages are small beside what a rank reads of a model of any size; here they are a part of it."""
    path = write_model("safetensors", tmp_path / "model")
    served = ServedModel(path)
    size = (path / "model.safetensors").stat().st_size
    stages = [FetchedModel(served.source, fetch_of(served)) for _ in range(2)]
    with stages[1].open() as checkpoint:
        spec = load_spec(checkpoint.hf_config)
        load_weights(checkpoint, spec, build_plan(spec, 1, 2).ranks[1], torch.float32, CPU)
        assert checkpoint.bytes_read <= stages[1].bytes_fetched <= checkpoint.bytes_read + 60 * PAGE
    assert stages[1].bytes_fetched < 0.75 * size
    kept = stages[1].path / "model.safetensors"
    assert kept.stat().st_size == size
    assert kept.stat().st_blocks * 512 <= stages[1].bytes_fetched + 8 * PAGE
    load(stages[0].open(), 1, 2, 0)
    assert stages[0].bytes_fetched + stages[1].bytes_fetched < size + 120 * PAGE, "shared pages come once"
    served.close()


def test_an_interrupted_transfer_goes_on(tmp_path: Path) -> None:
    path = write_model("safetensors", tmp_path / "model")
    served, left = ServedModel(path), [4]

    def failing(file: str, ranges: list[int]) -> bytes:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("the cable was pulled")
        return fetch_of(served)(file, ranges)

    first = FetchedModel(served.source, failing)
    with pytest.raises(ModelError, match=r"could not fetch model.safetensors .*: the cable was pulled"):
        load(first.open(), 2, 1, 0)
    second, whole = FetchedModel(served.source, fetch_of(served)), load(open_checkpoint(path), 2, 1, 0)
    found = load(second.open(), 2, 1, 0)
    assert all(same(found[name], whole[name]) for name in whole)
    assert first.bytes_fetched > 0
    shutil.rmtree(first.folder)
    fresh = FetchedModel(served.source, fetch_of(served))
    load(fresh.open(), 2, 1, 0)
    assert first.bytes_fetched + second.bytes_fetched == fresh.bytes_fetched
    served.close()


def test_another_model_of_the_same_name_is_another_one(tmp_path: Path) -> None:
    path = write_model("safetensors", tmp_path / "model")
    before = describe(path)
    assert describe(path) == before
    os.utime(path / "model.safetensors", ns=(1, 1))
    assert describe(path).key != before.key


def test_a_removed_file_is_not_taken_for_zeros(tmp_path: Path) -> None:
    path = write_model("safetensors", tmp_path / "model")
    served = ServedModel(path)
    first = FetchedModel(served.source, fetch_of(served))
    expected = load(first.open(), 1, 1, 0)
    (first.path / "model.safetensors").unlink()
    found = load(FetchedModel(served.source, fetch_of(served)).open(), 1, 1, 0)
    assert all(same(found[name], expected[name]) for name in expected)
    served.close()


@pytest.mark.parametrize(
    ("offset", "width", "num_rows", "stride"),
    [(0, 1, 1, 0), (4095, 2, 1, 0), (5, 700, 40, 9000), (0, 100, 90, 100), (12288, 1, 3, 4096), (90_000, 10_000, 1, 0)],
)
def test_just_the_pages_that_are_touched(tmp_path: Path, offset: int, width: int, num_rows: int, stride: int) -> None:
    data = np.random.default_rng(0).integers(0, 256, 100_000 * 4 + 77, dtype=np.uint8)
    touched = {
        byte // PAGE for row in range(num_rows) for byte in range(offset + row * stride, offset + row * stride + width)
    }
    asked: list[int] = []

    def fetch(_: str, ranges: list[int]) -> bytes:
        pairs = list(zip(ranges[::2], ranges[1::2], strict=True))
        asked.extend(start // PAGE + page for start, length in pairs for page in range(-(-length // PAGE)))
        return b"".join(data[start : start + length].tobytes() for start, length in pairs)

    with FetchedFile(tmp_path / "file", len(data), fetch) as file:
        out = np.zeros((num_rows, width), dtype=np.uint8)
        file.read_rows(out, offset, stride or width)
        for row in range(num_rows):
            assert (out[row] == data[offset + row * stride :][:width]).all()
        assert sorted(asked) == sorted(touched)
        file.need(offset, width, num_rows, stride)
        assert len(asked) == len(touched)


def test_what_may_not_be_asked_for(tmp_path: Path) -> None:
    path = write_model("safetensors", tmp_path / "model")
    (tmp_path / "secret").write_text("s")
    served = ServedModel(path)
    for call in (
        FetchModel(1, "../secret", [0, 1]),
        FetchModel(1, "/etc/passwd", [0, 1]),
        FetchModel(1, "config.json", [0]),
        FetchModel(1, "config.json", [-1, 1]),
        FetchModel(1, "config.json", [0, MAX_REPLY_BYTES + 1]),
        FetchModel(1, "config.json", [10**9, 1]),
    ):
        reply = served._read(call)
        assert reply.problem
        assert not reply.data
    served.close()


def test_a_full_disk_says_where(tmp_path: Path, cache: Path) -> None:
    path = write_model("safetensors", tmp_path / "model")
    cache.write_text("no folder")
    served = ServedModel(path)
    with pytest.raises(ModelError, match=r"cannot keep the model in .*from-head"):
        FetchedModel(served.source, fetch_of(served)).open()
    served.close()
