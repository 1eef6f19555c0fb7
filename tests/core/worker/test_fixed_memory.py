"""What a GPU's runner keeps for the length of its life, counted on CPU tensors, is in the memory model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aphro_core.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from aphro_core.estimate.aphro_engine import expected_balances
from aphro_core.messages.steps import StartWorker
from aphro_core.parallel import memory
from aphro_core.parallel.shard import build_plan
from aphro_core.worker.worker import Worker
from tests.core.worker.one_rank import BLOCK_SIZE
from tests.core.worker.test_device_runner import device_runner
from tests.tiny import write_tiny_checkpoint


def storages(found: Any, seen: set[int], sizes: dict[int, int]) -> dict[int, int]:
    """Bytes of the memory of every tensor that can be reached from ``found``, by address."""
    if id(found) in seen:
        return sizes
    seen.add(id(found))
    if isinstance(found, torch.Tensor):
        storage = found.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return sizes
    names = [*getattr(found, "__dict__", ()), *getattr(type(found), "__slots__", ())]
    parts = [getattr(found, name, None) for name in names] if type(found).__module__.startswith("aphro_") else []
    parts += list(found.values()) if isinstance(found, dict) else list(found) if isinstance(found, list | tuple) else []
    for part in parts:
        storages(part, seen, sizes)
    return sizes


@pytest.mark.parametrize("graph_tokens", [0, 32, 2048])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_fixed_tensors_are_counted(family: str, graph_tokens: int, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, family)
    runner = device_runner(SimpleNamespace(folder=tmp_path), graph_tokens=graph_tokens)  # type: ignore[arg-type]
    runner._memory._row_start = None  # weights of the decoder
    padded, rows = runner._padded, runner._memory.max_rows
    seen = {id(runner._answers.memory), id(runner._memory._answers)}  # pinned memory of the host
    kept = storages([runner._memory, padded.hidden, padded.logits, padded.sampler], seen, {})
    tables = memory.tables_bytes(rows, 128, BLOCK_SIZE)
    vocab_size = padded.logits.shape[1]
    fixed = memory.fixed_bytes(max(graph_tokens, rows), rows, padded.hidden.shape[1], vocab_size, 4)
    assert 0.5 * (fixed + 2 * tables) < sum(kept.values()) <= fixed + 2 * tables


@pytest.mark.parametrize("is_eager", [True, False])
def test_an_estimate_counts_a_gpus_memory_as_its_worker_does(
    is_eager: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_checkpoint(tmp_path, "llama", max_position_embeddings=4096)
    config = EngineConfig(
        model=ModelConfig(path=str(tmp_path), served_name="tiny", dtype="float16", max_model_len=4000),
        cache=CacheConfig(block_size=8),
        scheduler=SchedulerConfig(max_num_seqs=100, max_num_batched_tokens=300),
        device="cuda",
        enforce_eager=is_eager,
    )
    worker = Worker(StartWorker(config, 0, 0, "", 0), lambda _: None)
    worker._spec = worker._read_spec()
    plan = build_plan(worker._spec, 1, 1)
    worker._shard, worker._weights_bytes, worker._link = plan.ranks[0], 0, None
    monkeypatch.setattr(worker, "_memory_budget", lambda: 2**30)
    (expected,) = expected_balances(worker._spec, plan, config, 2**34)
    assert worker._report_loaded(0).activation_bytes == expected.activation_bytes
