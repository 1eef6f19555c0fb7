"""What a rank says it does while it starts is what it does then."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import pytest

from aphro_core.config import EngineConfig, ModelConfig
from aphro_core.messages.steps import StartWorker, WorkerProgress
from aphro_core.worker import worker as module
from aphro_core.worker.worker import Worker
from tests.tiny import write_tiny_checkpoint


def test_each_phase_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_checkpoint(tmp_path, "llama")
    config = EngineConfig(model=ModelConfig(path=str(tmp_path), served_name="m", dtype="float32", max_model_len=64))
    said: list[WorkerProgress] = []
    made_in: dict[str, str] = {}
    for name in ("join", "load_weights", "Decoder", "allocate_kv_cache"):
        made = getattr(module, name)

        def note(*arguments: object, name: str = name, made: object = made, **options: object) -> object:
            made_in[name] = said[-1].phase if said and said[-1].done < said[-1].total else ""
            return made(*arguments, **options)  # type: ignore[operator]

        monkeypatch.setattr(module, name, note)
    worker = Worker(StartWorker(config=config, rank=0, local_rank=0, store="", memory_bytes=2**28), said.append)
    worker.load()
    worker.allocate(8)
    worker.close()
    assert [phase for phase, _ in groupby(said, lambda each: each.phase)] == [
        "rendezvous",
        "weights",
        "layers",
        "cache",
    ]
    assert made_in == {"join": "rendezvous", "load_weights": "", "Decoder": "layers", "allocate_kv_cache": "cache"}
