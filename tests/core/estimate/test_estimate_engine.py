"""One arithmetic: what an estimate says of aphro is what a worker finds, for every family."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from aphro_core.checkpoint.headers import read_headers
from aphro_core.checkpoint.open import open_checkpoint
from aphro_core.config import EngineConfig, ModelConfig
from aphro_core.estimate.aphro_engine import expected_balances
from aphro_core.estimate.estimate import estimate
from aphro_core.estimate.parameters import RankSlice, rank_experts, rank_matrices
from aphro_core.estimate.question import DeviceFacts, Question
from aphro_core.estimate.source import build_source
from aphro_core.estimate.weights import stored_weight_bytes
from aphro_core.messages.steps import StartWorker, WorkerLoaded
from aphro_core.models.packed import parameter_bytes
from aphro_core.models.registry import FAMILIES, family_of, load_spec
from aphro_core.models.tensors import source_shapes
from aphro_core.parallel import memory
from aphro_core.parallel.shard import build_plan
from aphro_core.worker.worker import Worker
from tests.families import TINY
from tests.tiny import write_tiny_checkpoint, write_tiny_gguf

FREE = 2**29

families = pytest.mark.parametrize("family", list(TINY))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {family: tmp_path_factory.mktemp(family) / "model" for family in TINY}
    for family, folder in folders.items():
        write_tiny_checkpoint(folder, family)
    return folders


def load(config: EngineConfig) -> WorkerLoaded:
    """What a worker of one rank finds."""
    memory_bytes = int(FREE * config.cache.cpu_memory_utilization)
    start = StartWorker(config=config, rank=0, local_rank=0, store="", memory_bytes=memory_bytes)
    worker = Worker(start, lambda _: None)
    try:
        return worker.load()
    finally:
        worker.close()


def test_every_family_is_here() -> None:
    assert {row.architecture for row in TINY.values()} == set(FAMILIES)


@families
def test_worker_finds_what_was_estimated(family: str, checkpoints: dict[str, Path]) -> None:
    """float16 is kept as it came on CPUs, so the comparison is exact."""
    path = checkpoints[family]
    config = EngineConfig(model=ModelConfig(path=str(path), served_name="m", dtype="float16", max_model_len=64))
    with open_checkpoint(path) as checkpoint:
        spec = load_spec(checkpoint.hf_config)
    (expected,) = expected_balances(spec, build_plan(spec, 1, 1), config, FREE)
    loaded = load(config)
    assert loaded.weights_bytes == expected.weights_bytes
    assert loaded.activation_bytes == expected.activation_bytes
    assert loaded.block_bytes == expected.layout.block_bytes
    assert loaded.num_blocks == expected.num_blocks


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_quantised_weights_too(family: str, quantization: str, checkpoints: dict[str, Path]) -> None:
    path = checkpoints[family]
    model = ModelConfig(path=str(path), served_name="m", dtype="float16", max_model_len=64, quantization=quantization)
    loaded = load(EngineConfig(model=model))
    with open_checkpoint(path) as checkpoint:
        source = build_source("m", checkpoint.hf_config, quantization=quantization)
    device = DeviceFacts(kind="cpu", total_bytes=FREE)
    asked = Question(source=source, device=device, dtype="float16", asked_quantization=quantization)
    (found,) = estimate(asked, 1, 1).ranks
    assert loaded.weights_bytes == found.weights_bytes
    whole = load(EngineConfig(model=ModelConfig(path=str(path), served_name="m", dtype="float16", max_model_len=64)))
    assert loaded.weights_bytes < whole.weights_bytes


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_gguf_blocks_are_counted_as_they_are_kept(dtype: Any, is_tied: bool, tmp_path: Path) -> None:
    """Embedding and head included: in bfloat16 a CPU has a tied head once more, in the order that it multiplies."""
    write_tiny_gguf(tmp_path / "x.gguf", quant="Q4_K", others={"embed": "Q6_K"}, tie_word_embeddings=is_tied)
    config = EngineConfig(
        model=ModelConfig(path=str(tmp_path / "x.gguf"), served_name="m", dtype=dtype, max_model_len=64)
    )
    with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
        spec = load_spec(checkpoint.hf_config)
    (expected,) = expected_balances(spec, build_plan(spec, 1, 1), config, FREE)
    assert load(config).weights_bytes == pytest.approx(expected.weights_bytes, rel=0.002)


@pytest.mark.parametrize(("dtype", "is_packed"), [("float16", True), ("float32", False)])
def test_gguf_blocks_are_kept_as_run_keeps_them(dtype: str, is_packed: bool, tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "x.gguf", "llama", quant="Q4_0")
    headers = read_headers(str(tmp_path / "x.gguf"))
    source = build_source("m", headers.hf_config, tensors=headers.tensors, file_bytes=headers.file_bytes)
    assert source.spec is not None
    whole = memory.weights_bytes(replace(source.spec, quantization=None), build_plan(source.spec, 1, 1).ranks[0], 2)
    for kind in ("cpu", "cuda"):
        device = DeviceFacts(kind=kind, total_bytes=FREE)  # type: ignore[arg-type]
        (found,) = estimate(Question(source=source, device=device, dtype=dtype), 1, 1).ranks
        size = found.weights_bytes / (2 if dtype == "float32" else 1)
        assert (size < whole) == is_packed


@families
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (3, 2)])
def test_weights_of_a_plan_are_the_memory_models(family: str, tp: int, pp: int, checkpoints: dict[str, Path]) -> None:
    """The short way over one layer of each kind gives what the sum over all layers gives."""
    with open_checkpoint(checkpoints[family]) as checkpoint:
        source = build_source("m", checkpoint.hf_config)
    spec = source.spec
    assert spec is not None
    device = DeviceFacts(kind="cuda", total_bytes=FREE)
    found = estimate(Question(source=source, device=device, dtype="float16"), tp, pp)
    for rank, shard in zip(found.ranks, build_plan(spec, tp, pp).ranks, strict=True):
        assert rank.weights_bytes == parameter_bytes(family_of(spec).tensors, spec, shard, 2)


@pytest.mark.parametrize("family", [name for name in TINY if "moe" in name or name == "mixtral"])
@pytest.mark.parametrize("tp", [2, 3])
def test_whole_experts_are_counted_as_the_engine_places_them(
    family: str, tp: int, checkpoints: dict[str, Path]
) -> None:
    """By the memory model, and, as for a model that aphro does not run, by the general count."""
    with open_checkpoint(checkpoints[family]) as checkpoint:
        source = build_source("m", checkpoint.hf_config)
    assert source.spec is not None
    device = DeviceFacts(kind="cuda", total_bytes=FREE)
    asked = Question(source=source, device=device, dtype="float16", expert_parallel=True)
    shards = build_plan(source.spec, tp, 1, expert_parallel=True).ranks
    own = [rank.weights_bytes for rank in estimate(asked, tp, 1).ranks]
    assert own == [memory.weights_bytes(source.spec, shard, 2) for shard in shards]
    asked = replace(asked, source=replace(source, spec=None))
    general = [rank.weights_bytes for rank in estimate(asked, tp, 1).ranks]
    cut = [rank.weights_bytes for rank in estimate(replace(asked, expert_parallel=False), tp, 1).ranks]
    parts = [RankSlice(range(1), rank, tp, True, True, expert_parallel=True) for rank in range(tp)]
    assert source.spec.moe is not None
    held = [rank_experts(source.spec.moe.num_experts, part) for part in parts]
    assert held == [len(shard.experts) for shard in shards]
    assert sum(general) == pytest.approx(sum(cut), rel=0.1)


@families
def test_general_count_agrees_with_the_family(family: str, checkpoints: dict[str, Path]) -> None:
    """The tolerant reader, made for models that aphro does not run, counts those it does run alike."""
    with open_checkpoint(checkpoints[family]) as checkpoint:
        config = dict(checkpoint.hf_config)
    source = build_source("m", config)
    assert source.spec is not None
    shapes = source_shapes(family_of(source.spec).tensors, source.spec)
    whole = RankSlice(range(source.facts.num_layers), 0, 1, True, True)
    stored = sum(prod(shape) for shape in shapes.values())
    rows = -(-source.facts.vocab_size // 64) * 64 - source.facts.vocab_size
    copies = 1 if source.facts.tie_word_embeddings else 2
    counted = sum(matrix.count * matrix.elements for matrix in rank_matrices(source.facts, whole))
    assert counted - copies * rows * source.facts.hidden_size == pytest.approx(stored, rel=0.02)


@families
def test_headers_give_the_files_bytes(family: str, checkpoints: dict[str, Path]) -> None:
    headers = read_headers(str(checkpoints[family]))
    source = build_source("m", headers.hf_config, tensors=headers.tensors, file_bytes=headers.file_bytes)
    assert source.tensors is not None
    whole = RankSlice(range(source.facts.num_layers), 0, 1, True, True)
    found = stored_weight_bytes(source.facts, whole, source.tensors, "float32")
    padding = 2 * 64 * source.facts.hidden_size * 4
    assert source.file_bytes is not None
    assert source.file_bytes <= found <= source.file_bytes + padding
