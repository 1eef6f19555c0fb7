"""Faults inside a worker, for tests: a request whose prompt has a trigger token meets its fault in every step of it.

Python imports this by its name when the folder is on PYTHONPATH. It waits for the model runner to be imported and wraps
it; ``FAULTS`` in the environment says ``token=fault,...``. ``pace=SECONDS`` lengthens every step of a request, so that
a fault hits it however fast the device is.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import pickle
import signal
import sys
import time
from types import ModuleType
from typing import Any

_FAULTS = dict(pair.split("=") for pair in os.environ.get("FAULTS", "").split(",") if pair)
_LOADS = [fault for token, fault in _FAULTS.items() if token == "load"]
_PACE = float(_FAULTS.get("pace", "0"))
_IS_LIKE_A_GPU = "gpu-loop" in _FAULTS  # on a CPU: the GPU's runner, a step ahead, with its links


def _fail(fault: str) -> None:
    if fault == "raise":
        raise RuntimeError("a fault in forward")
    if fault == "memory":
        raise MemoryError("a fault of the allocator")
    if fault == "exit":
        os._exit(3)
    if fault == "abort":
        os.kill(os.getpid(), signal.SIGABRT)
    if fault == "hang":
        time.sleep(10_000)
    if fault.startswith("sleep"):
        time.sleep(float(fault.removeprefix("sleep")))


def _arm_unpickler(module: ModuleType) -> None:
    """From here on nobody in this process may unpickle anything."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("something was unpickled")

    pickle.load = pickle.loads = pickle.Unpickler = refuse  # type: ignore[assignment,misc]


def _run_out_of_memory_in_the_middle(runner: Any) -> None:
    """On one rank alone: when it comes to its second sum of this step, or, where that is in a graph, to the graph."""
    padded: Any = getattr(runner, "_padded", None)
    if runner._shard.tp_rank == 1 and type(getattr(padded, "run", None)).__name__ == "CudaGraphs":
        padded.graphs, padded.run = padded.run, lambda shape: _fail("memory")
    tensor, num_sums = runner._links.tensor, 0
    all_reduce = tensor.all_reduce_

    def all_reduce_or_fail(x: Any) -> Any:
        nonlocal num_sums
        num_sums += 1
        if num_sums == 2:
            raise MemoryError("a fault of the allocator")
        return all_reduce(x)

    if runner._shard.tp_rank == 1:
        tensor.all_reduce_ = all_reduce_or_fail


def _wrap_runner(module: ModuleType) -> None:
    runner: Any = module.ModelRunner if hasattr(module, "ModelRunner") else module.DeviceRunner
    launch = runner.launch
    triggered: dict[int, str] = {}

    def launch_or_fail(self: Any, plan: Any) -> Any:
        if "pickle" in _FAULTS and any(new.seq_id for new in plan.new):  # the first request: all are ready
            _arm_unpickler(module)
        for new in plan.new:
            prompt = new.token_ids[: new.num_prompt_tokens]
            triggered.pop(new.seq_id, None)
            for token, fault in _FAULTS.items():
                if token.isdigit() and int(token) in prompt:
                    triggered[new.seq_id] = fault
        faults = [triggered[row.seq_id] for row in plan.scheduled if row.seq_id in triggered]
        for fault in faults:
            if fault == "memory-of-one":
                _run_out_of_memory_in_the_middle(self)
            _fail(fault)
        if _PACE and plan.step_id:  # a trial step has no number
            time.sleep(_PACE)
        try:
            return launch(self, plan)
        finally:  # another step must not meet it
            self._links.tensor.__dict__.pop("all_reduce_", None)
            if hasattr(getattr(self, "_padded", None), "graphs"):
                self._padded.run = self._padded.__dict__.pop("graphs")

    runner.launch = launch_or_fail
    if "nan" in _FAULTS.values():
        _wrap_sampler(sys.modules["aphro_core.worker.sampler"])


def _wrap_sampler(module: ModuleType) -> None:
    sample = module.Sampler.sample

    def sample_nan(self: Any, logits: Any, rows: Any) -> Any:
        tokens = {int(token) for token, fault in _FAULTS.items() if fault == "nan"}
        for index, row in enumerate(rows):
            if tokens & set(row.token_ids[: row.num_prompt_tokens]):
                logits[index] = float("nan")
        return sample(self, logits, rows)

    module.Sampler.sample = sample_nan


def _wrap_device_sampler(module: ModuleType) -> None:
    draw = module.DeviceSampler.draw

    def draw_nan(self: Any, logits: Any, *others: Any, peaks: Any = None) -> Any:
        tokens = {int(token) for token, fault in _FAULTS.items() if fault == "nan"}
        for index, row in enumerate(self.rows):
            if tokens & set(row.token_ids[: row.num_prompt_tokens]):
                logits[index] = float("nan")
                if peaks is not None:  # what a draw sees of NaN there
                    peaks[index] = float("inf")
        return draw(self, logits, *others, peaks=peaks)

    module.DeviceSampler.draw = draw_nan


def _wrap_worker(module: ModuleType) -> None:
    load = module.Worker.load

    def load_or_fail(self: Any) -> Any:
        rank, _, fault = _LOADS[0].partition(":")
        if self._start.rank == int(rank):
            _fail(fault)
        return load(self)

    module.Worker.load = load_or_fail


def _let_steps_run_ahead(module: ModuleType) -> None:
    module.EngineConfig.run_ahead = property(lambda self: 1)  # type: ignore[assignment]


def _link_last_to_first_stage(module: ModuleType) -> None:
    join = module.join

    def join_as_a_gpu(plan: Any, rank: int, *arguments: Any) -> Any:
        links = join(plan, rank, *arguments)
        if plan.pp_size == 1:
            return links
        from aphro_core.distributed.stage_lines import token_link

        return module.Links(links.tensor, links.stage, token_link(plan, rank), links.store)

    module.join = join_as_a_gpu


def _run_like_a_gpu(module: ModuleType) -> None:
    def allocate(self: Any, num_blocks: int) -> None:
        block_size = self._config.cache.block_size
        caches = module.allocate_kv_cache(
            self._shard, self._spec, num_blocks, block_size, self._cache_dtype, self._device
        )
        self._runner = module.DeviceRunner(
            self._spec,
            self._shard,
            self._decoder,
            caches,
            self._links,
            block_size=block_size,
            max_rows=self._config.scheduler.max_num_seqs,
            max_model_len=self._config.model.max_model_len,
            dtype=self._dtype,
            device=self._device,
        )

    module.Worker.allocate = allocate


_WRAPPERS = {"aphro_core.worker.model_runner": _wrap_runner, "aphro_core.worker.device_runner": _wrap_runner}
if "nan" in _FAULTS.values():
    _WRAPPERS["aphro_core.worker.device_sampler"] = _wrap_device_sampler
if "pickle" in _FAULTS:
    _WRAPPERS["aphro_core.server.serve"] = _arm_unpickler
if _LOADS:
    _WRAPPERS["aphro_core.worker.worker"] = _wrap_worker
if _IS_LIKE_A_GPU:
    _WRAPPERS["aphro_core.config"] = _let_steps_run_ahead
    _WRAPPERS["aphro_core.distributed.links"] = _link_last_to_first_stage
    _WRAPPERS["aphro_core.worker.worker"] = _run_like_a_gpu


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        wrap = _WRAPPERS.pop(name, None)
        if wrap is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_wrap(module: ModuleType) -> None:
            execute(module)
            wrap(module)

        spec.loader.exec_module = execute_and_wrap  # type: ignore[method-assign]
        return spec


if _FAULTS:
    sys.meta_path.insert(0, _Finder())
