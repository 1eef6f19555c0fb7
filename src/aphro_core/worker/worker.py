"""One rank: joins its group, loads its shard, sizes and allocates its KV cache, warms up, launches plans."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import torch
from aphro_kernels.float8 import FLOAT8
from torch.distributed import FileStore, Store  # type: ignore[attr-defined]

from aphro_core.checkpoint.cache_scales import read_cache_scales
from aphro_core.checkpoint.checkpoint import Checkpoint
from aphro_core.checkpoint.open import open_checkpoint, read_hf_config
from aphro_core.distributed.links import join
from aphro_core.distributed.stage_lines import Messages, open_lines
from aphro_core.host import num_cores
from aphro_core.layers.cache_format import CacheFormat
from aphro_core.layers.decoder import Decoder
from aphro_core.messages.steps import LinkCost, StartWorker, StepPlan, StepResult, WorkerLoaded, WorkerProgress
from aphro_core.models.registry import load_spec
from aphro_core.models.spec import DecoderSpec
from aphro_core.parallel import memory
from aphro_core.parallel.shard import ShardingPlan, build_plan
from aphro_core.worker.compile_ahead import read_compiler
from aphro_core.worker.device import use_device
from aphro_core.worker.device_runner import DeviceRunner
from aphro_core.worker.fetched_model import Fetch, FetchedModel
from aphro_core.worker.kv_cache import allocate_kv_cache
from aphro_core.worker.link_cost import measure_link
from aphro_core.worker.loader import dummy_weights, load_weights
from aphro_core.worker.model_runner import ModelRunner
from aphro_core.worker.shared_head import SharedHead, share_head
from aphro_core.worker.step import FinishedStep, LaunchedStep, SamplingError
from aphro_core.worker.step_failure import failed_step, is_survivable
from aphro_core.worker.warm_up import warm_up

_LOG: Final = logging.getLogger(__name__)
_PEER_SECONDS: Final = 20.0  # for a rank whose GPU lacks something where the others are to get at its memory


class Worker:
    """Built once a rank, by whichever launcher. Call ``load``, then ``allocate``, then ``launch`` for each plan."""

    def __init__(
        self,
        start: StartWorker,
        on_progress: Callable[[WorkerProgress], None],
        open_store: Callable[[], Store] | None = None,
        fetch: Fetch | None = None,
    ) -> None:
        """``open_store`` makes what the ranks meet in, if it is not the file ``start.store``; ``fetch`` gets ranges of
        a model that comes from elsewhere."""
        self._start = start
        self._fetched = FetchedModel(start.source, fetch) if start.source and fetch else None
        self._open_store = open_store or self._open_file
        self._config = start.config
        self._on_progress = on_progress
        self._dtype: torch.dtype = getattr(torch, start.config.model.dtype)
        self._cache_dtype = FLOAT8 if start.config.cache.dtype == "fp8" else self._dtype
        self._device = torch.device("cpu" if start.config.device == "cpu" else f"cuda:{start.local_rank}")
        self._reading = threading.Thread(target=read_compiler, daemon=True)  # beside the driver, and weights
        self._decoder: Decoder | None = None
        self._head: SharedHead | None = None
        self._runner: ModelRunner | DeviceRunner | None = None
        self._failed: StepResult | None = None  # the step that failed here since all was forgotten
        self._unsettled: StepPlan | None = None  # a failed step that peers still wait in

    def load(self) -> WorkerLoaded:
        """Join the group and put this rank's slices of the weights in place."""
        if self._device.type == "cuda":
            self._reading.start()
            with self._phase("device"):
                use_device(self._device)
        model, parallel, rank = self._config.model, self._config.parallel, self._start.rank
        self._spec = self._read_spec().for_length(model.max_model_len)
        sizes = (parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
        plan = build_plan(self._spec, *sizes, parallel.pp_layers, expert_parallel=parallel.expert_parallel)
        self._shard = plan.ranks[rank]
        timeout = self._config.distributed_timeout_seconds
        # hand-overs between stages do follow each other on their communicator, as this warns; nothing else uses it
        os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
        # of peers' memory nothing is written to all at once, and a switch that is not set up for it keeps all waiting
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        with self._phase("rendezvous"):
            self._links = join(plan, rank, self._open_store, self._device, timeout)
            self._link = self._measure_link() if self._start.measures_links else None
        bytes_read, cache_scales = 0, dict[int, tuple[float, float]]()
        if model.load_format == "dummy":
            weights = dummy_weights(self._spec, self._shard, self._dtype, self._device, model.seed)
            self._weights_progress(1, 1)
        else:
            with self._open_checkpoint() as checkpoint:
                weights = load_weights(
                    checkpoint, self._spec, self._shard, self._dtype, self._device, self._weights_progress
                )
                if self._cache_dtype == FLOAT8:
                    cache_scales = read_cache_scales(checkpoint, self._shard.layers)
                bytes_read = checkpoint.bytes_read
        if len(plan.ranks) > 1 and self._device.type == "cuda":
            with self._phase("peer memory"):
                self._links.meet(self._device)  # some read their weights for longer
                self._connect_peers(plan, timeout)
        self._links.tensor.adds_in_order = is_deterministic = self._config.deterministic
        cache_format = CacheFormat(self._cache_dtype, cache_scales)
        parts = (self._spec, self._shard, weights, self._links.tensor)
        with self._phase("layers"):  # on CPUs weights are packed or put in another order
            is_alone = self._links.stage.is_alone
            self._decoder = Decoder(*parts, cache_format, is_deterministic=is_deterministic, is_alone=is_alone)
        if self._links.shared is not None and memory.shares_head(self._spec, plan.tp_size, plan.pp_size):
            with self._phase("head"):
                self._head = share_head(self._links, self._decoder, rank, len(plan.ranks), self._device)
        self._weights_bytes = self._decoder.weights_bytes + (0 if self._head is None else self._head.num_bytes)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # what loading took besides the weights
            torch.cuda.reset_peak_memory_stats()
        return self._report_loaded(bytes_read)

    def allocate(self, num_blocks: int) -> None:
        """Allocate the KV cache of this rank's layers: ``num_blocks`` blocks, the same on every rank.

        A GPU is warmed up then: whatever would be compiled, made or captured while serving is made here.
        """
        assert self._decoder is not None, "load() comes first"
        block_size = self._config.cache.block_size
        with self._phase("cache"):
            caches = allocate_kv_cache(self._shard, self._spec, num_blocks, block_size, self._cache_dtype, self._device)
        parts = (self._spec, self._shard, self._decoder, caches, self._links)
        if self._device.type == "cpu":
            self._runner = ModelRunner(
                *parts,
                block_size=block_size,
                dtype=self._dtype,
                device=self._device,
                is_deterministic=self._config.deterministic,
            )
            return
        runner = DeviceRunner(
            *parts,
            block_size=block_size,
            max_rows=self._config.scheduler.max_num_seqs,
            max_model_len=self._config.model.max_model_len,
            dtype=self._dtype,
            device=self._device,
            graph_tokens=self._graph_tokens,
            head=self._head,
        )
        cores = num_cores() // self._start.num_ranks_here
        self._reading.join()  # kernels are compiled in processes that are forked from this one
        warm_up(runner, self._config, num_blocks, cores, self._progress)
        self._runner = runner

    def launch(self, plan: StepPlan) -> LaunchedStep | None:
        """Begin one step; on a GPU it is not done when this returns. From tp rank 0 of the last stage, and from any
        rank where it fails. ``settle`` comes next, once that is told.

        A step that fails is answered as failed if the group can go on; whatever it cannot survive is raised. So are
        those behind it, until all is forgotten: what they would read is not there.
        """
        assert self._runner is not None, "allocate() comes first"
        self._links.begin_step()
        if self._head is not None:
            self._head.begin_step()
        if plan.forgets_all:
            self._failed = None
        if self._failed is not None:
            self._unsettled = plan
            return FinishedStep(msgspec.structs.replace(self._failed, step_id=plan.step_id)) if self._speaks else None
        try:
            return self._runner.launch(plan)
        except SamplingError as error:  # all ranks have computed the step, this one draws
            return FinishedStep(failed_step(plan.step_id, error, error.seq_ids))
        except Exception as error:
            if not is_survivable(error):
                raise
            self._failed = failed_step(plan.step_id, error)
        self._unsettled = plan
        return FinishedStep(self._failed)

    def settle(self) -> None:
        """Let the peers end a step that failed here, if one has. Raises RuntimeError when one of them is gone."""
        plan, self._unsettled = self._unsettled, None
        if plan is None:
            return
        assert self._runner is not None
        assert self._failed is not None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # memory that ran out in pieces may be whole again
        if self._config.parallel.world_size == 1:
            return
        if plan.step_id == self._failed.step_id and self._failed.failure is not None:
            _LOG.warning("rank %d: a step failed here:\n%s", self._start.rank, self._failed.failure.detail)
        self._runner.settle(plan)

    @property
    def _speaks(self) -> bool:
        return self._shard.has_head and self._shard.tp_rank == 0

    def enter_thread(self) -> None:
        """Comes first in every other thread that waits for this rank's steps."""
        use_device(self._device)

    @property
    def is_asynchronous(self) -> bool:
        """Whether ``launch`` returns before the step is done."""
        return self._device.type == "cuda"

    def close(self) -> None:
        """Leave the group. Safe at any time."""
        links = getattr(self, "_links", None)
        if links is not None:
            links.close()

    def _report_loaded(self, bytes_read: int) -> WorkerLoaded:
        cache, scheduler = self._config.cache, self._config.scheduler
        element = self._dtype.itemsize
        block_bytes = memory.kv_block_bytes(self._spec, self._shard, cache.block_size, self._cache_dtype.itemsize)
        activation_bytes = memory.working_bytes(
            self._spec,
            self._shard,
            max_num_batched_tokens=scheduler.most_tokens,
            max_num_seqs=scheduler.max_num_seqs,
            dtype_bytes=element,
            is_gpu=self._device.type == "cuda",
            max_model_len=self._config.model.max_model_len,
            block_size=cache.block_size,
            enforce_eager=self._config.enforce_eager,
        )
        kv_bytes = self._memory_budget() - self._weights_bytes - activation_bytes
        return WorkerLoaded(
            rank=self._start.rank,
            pid=os.getpid(),
            host=socket.gethostname(),
            device=str(self._device),
            weights_bytes=self._weights_bytes,
            activation_bytes=activation_bytes,
            kv_bytes=max(kv_bytes, 0),
            block_bytes=block_bytes,
            num_blocks=memory.num_blocks(kv_bytes, block_bytes),
            bytes_read=bytes_read,
            link=self._link,
            bytes_fetched=self._fetched.bytes_fetched if self._fetched else None,
        )

    @property
    def _graph_tokens(self) -> int:
        """Without graphs steps are padded to the same shapes: they give the same bits, and load no kernel of a library
        while others are in flight. A step of 256 tokens or more is a fifth padding at most."""
        scheduler, tp_size = self._config.scheduler, self._config.parallel.tensor_parallel_size
        most_tokens = min(scheduler.most_tokens, scheduler.max_num_seqs * self._config.model.max_model_len)
        return memory.graph_tokens(self._spec, tp_size, most_tokens)

    def _connect_peers(self, plan: ShardingPlan, timeout: float) -> None:
        scheduler, tensor = self._config.scheduler, self._links.tensor
        most_rows = max(scheduler.most_tokens, scheduler.max_num_seqs)
        hurried = partial(self._links.hurried, _PEER_SECONDS, timeout)
        with hurried():
            tensor.connect(self._spec.hidden_size, self._dtype, self._device, most_rows)
            if self._shard.has_head and self._spec.has_plain_logits:
                tensor.connect_logits(scheduler.max_num_seqs, self._spec.vocab_size, self._dtype, self._device)
        if plan.pp_size > 1:
            row_bytes = self._spec.hidden_size * self._dtype.itemsize
            vocab_size = self._spec.vocab_size if memory.shares_head(self._spec, plan.tp_size, plan.pp_size) else 0
            messages = Messages(most_rows, row_bytes, scheduler.max_num_seqs, vocab_size, self._dtype)
            self._links = open_lines(self._links, plan, self._start.rank, messages, self._device, hurried())

    def _measure_link(self) -> LinkCost | None:
        group = self._links.tensor
        return measure_link(group, self._spec.hidden_size, self._dtype, self._device) if group.size > 1 else None

    def _memory_budget(self) -> int:
        """Bytes that weights, activations and KV cache of this rank may take together."""
        if self._device.type == "cpu":
            return self._start.memory_bytes
        free, total = torch.cuda.mem_get_info(self._device)
        ours = torch.cuda.memory_reserved(self._device)
        foreign = total - free - ours  # the CUDA context, communicators, and other processes
        return int(total * self._config.cache.gpu_memory_utilization) - foreign

    def _open_file(self) -> Store:
        return FileStore(self._start.store, self._config.parallel.world_size)

    def _read_spec(self) -> DecoderSpec:
        if self._config.model.load_format == "dummy":
            path = self._fetched.fetch_heads() if self._fetched else self._config.model.path
            return load_spec(read_hf_config(path), self._config.model.quantization)
        with self._open_checkpoint() as checkpoint:
            return load_spec(checkpoint.hf_config, self._config.model.quantization)

    def _open_checkpoint(self) -> Checkpoint:
        return self._fetched.open() if self._fetched else open_checkpoint(Path(self._config.model.path))

    def _weights_progress(self, done: int, total: int) -> None:
        self._progress("weights", done, total)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """What has no parts that could be counted."""
        self._progress(name, 0, 1)
        yield
        self._progress(name, 1, 1)

    def _progress(self, phase: str, done: int, total: int) -> None:
        self._on_progress(WorkerProgress(rank=self._start.rank, phase=phase, done=done, total=total))
