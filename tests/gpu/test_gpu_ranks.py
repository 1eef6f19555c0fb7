"""Ranks as a start has them, a process each: what every one of them takes of the GPUs."""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path

import msgspec
import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from aphro_core.config import EngineConfig
from aphro_core.messages.steps import NewSequence, ScheduledSequence, StartWorker, StepPlan, StepResult
from aphro_core.prepare import EngineOptions, prepare
from aphro_core.reporter import SilentReporter
from aphro_core.request import SamplingParams
from aphro_core.worker.results import Results
from aphro_core.worker.worker import Worker
from tests.tiny import write_tiny_checkpoint

NUM_GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")
BLOCKS = 64
GREEDY = SamplingParams(temperature=0.0)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (4, 1), (2, 2)])
def test_each_takes_its_own_gpu(tmp_path: Path, tp: int, pp: int) -> None:
    """No rank has a context on another's GPU, and none holds more memory than the others outside torch's."""
    if tp * pp > NUM_GPUS:
        pytest.skip(f"needs {tp * pp} GPUs")
    write_tiny_checkpoint(tmp_path, "llama")
    options = EngineOptions(
        model=str(tmp_path),
        load_format="dummy",
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        device="cuda",
        dtype="bfloat16",
        num_blocks=BLOCKS,
        max_model_len=256,
        skip_tokenizer_init=True,
    )
    (tmp_path / "engine.json").write_bytes(msgspec.json.encode(prepare(options, SilentReporter()).config))
    with tempfile.NamedTemporaryFile() as store:
        multiprocessing.spawn(_serve, args=(tmp_path / "engine.json", store.name), nprocs=tp * pp)


def _serve(rank: int, config_file: Path, store: str) -> None:
    config = msgspec.json.decode(config_file.read_bytes(), type=EngineConfig)
    device = torch.device("cuda", rank)
    free_before = torch.cuda.mem_get_info(device)[0]
    worker = Worker(StartWorker(config, rank, rank, store, 0), lambda progress: None)
    worker.load()
    worker.allocate(BLOCKS)
    came: list[StepResult] = []
    is_done = threading.Event()
    with Results(came.append, lambda error: is_done.set(), worker.enter_thread) as results:
        for plan in _plans():
            step = worker.launch(plan)
            if step is not None:
                results.put(step)
    torch.cuda.synchronize()
    others = [index for index in range(NUM_GPUS) if index != rank and torch._C._cuda_hasPrimaryContext(index)]
    outside = free_before - torch.cuda.mem_get_info(device)[0] - torch.cuda.memory_reserved(device)
    everybodys = [torch.zeros(2, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(everybodys, torch.tensor([len(others), outside], device=device))
    print(f"rank {rank}: contexts on {others}, {outside / 2**30:.2f} GiB outside torch")
    contexts, sizes = torch.stack(everybodys).t().tolist()
    assert not any(contexts)
    if "PYTEST_XDIST_WORKER" not in os.environ:  # nobody else takes memory meanwhile
        assert max(sizes) - min(sizes) < 0.1 * 2**30, sizes
    dist.barrier()
    worker.close()


def _plans() -> list[StepPlan]:
    entry = [ScheduledSequence(0, 0, 20, [], [0, 1], True)]
    decoding = [StepPlan(2 + i, [ScheduledSequence(0, 20 + i, 1, [], [], True)], []) for i in range(4)]
    return [StepPlan(1, entry, [NewSequence(0, [1] * 20, 20, GREEDY, 0)]), *decoding]
