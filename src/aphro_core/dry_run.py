"""A start that is only tried out: what ``run`` would do, and whether it would be refused."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from aphro_core.api import ServeOptions
from aphro_core.checkpoint.headers import read_headers
from aphro_core.checkpoint.hub import fetch_headers
from aphro_core.checkpoint.open import local_path
from aphro_core.config import EngineConfig
from aphro_core.engine.entry import fit_cache
from aphro_core.environment import is_secret
from aphro_core.errors import AphroError
from aphro_core.estimate.balance import RankBalance
from aphro_core.frontend.supervisor import engine_environment
from aphro_core.messages.steps import WorkerLoaded
from aphro_core.parallel.placement import place_ranks
from aphro_core.prepare import Prepared, expect_memory, prepare
from aphro_core.reporter import Reporter
from aphro_core.server.bind import bind, url_of

_SHOWN: Final = (
    *("APHRO_", "CUDA_", "GLOO_", "HF_", "KMP_", "MKL_", "NCCL_", "NVIDIA_", "OMP_", "PYTORCH_"),
    *("TOKENIZERS_", "TORCH", "TRANSFORMERS_", "TRITON_", "UCX_"),
)


@dataclass(frozen=True)
class PlannedRank:
    """What one rank would hold, in bytes; None where its device cannot be asked."""

    rank: int
    stage: int
    tp_rank: int
    host: str
    device: str
    first_layer: int
    last_layer: int
    num_heads: int
    num_kv_heads: int
    weights_bytes: int | None = None
    activation_bytes: int | None = None
    overhead_bytes: int | None = None
    kv_bytes: int | None = None
    num_blocks: int | None = None


@dataclass(frozen=True)
class DryRun:
    """``problem``: why the start would be refused once the weights are loaded. ``fetch_bytes``: from the Hub."""

    config: EngineConfig
    architecture: str
    ranks: tuple[PlannedRank, ...]
    limiting_rank: int | None
    num_blocks: int | None
    max_model_len: int
    url: str
    num_api_keys: int
    fetch_bytes: int
    environment: dict[str, str]
    problem: AphroError | None

    @property
    def tokens(self) -> int | None:
        return None if self.num_blocks is None else self.num_blocks * self.config.cache.block_size

    def to_json(self) -> dict[str, Any]:
        """Stable keys."""
        config, tokens = self.config, self.tokens
        return {
            "model": config.model.path,
            "served_model_name": config.model.served_name,
            "architecture": self.architecture,
            "device": config.device,
            "dtype": config.model.dtype,
            "backend": config.parallel.backend,
            "tensor_parallel_size": config.parallel.tensor_parallel_size,
            "pipeline_parallel_size": config.parallel.pipeline_parallel_size,
            "max_model_len": self.max_model_len,
            "block_size": config.cache.block_size,
            "num_blocks": self.num_blocks,
            "tokens": tokens,
            "max_concurrency": None if tokens is None else tokens / self.max_model_len,
            "limiting_rank": self.limiting_rank,
            "per_rank": [asdict(rank) for rank in self.ranks],
            "url": self.url,
            "num_api_keys": self.num_api_keys,
            "fetch_bytes": self.fetch_bytes,
            "environment": self.environment,
            "problem": None if self.problem is None else _describe(self.problem),
        }


def try_out(options: ServeOptions, reporter: Reporter) -> DryRun:
    """Bind, prepare and size as a start would, and let go of it all. Raises what refuses a start before it loads."""
    sockets = bind(options.host, options.port)
    try:
        url = url_of(sockets)
    finally:
        for sock in sockets:
            sock.close()
    options, fetch_bytes = _without_weights(options, reporter)
    prepared = prepare(options, reporter)
    expected = expect_memory(prepared, reporter)
    num_blocks, length, limiting, problem = _size(prepared, expected)
    return DryRun(
        config=prepared.config,
        architecture=prepared.spec.architecture,
        ranks=_ranks(prepared, expected),
        limiting_rank=limiting,
        num_blocks=num_blocks,
        max_model_len=length,
        url=url,
        num_api_keys=len(options.api_keys),
        fetch_bytes=fetch_bytes,
        environment=_shown(engine_environment(prepared.config), prepared.config.parallel.environment),
        problem=problem,
    )


def _without_weights(options: ServeOptions, reporter: Reporter) -> tuple[ServeOptions, int]:
    """For a Hub id that is not cached whole: the folder of its config, and the bytes that a start would fetch."""
    if local_path(options.model) is not None or options.load_format == "dummy":
        return options, 0
    folder, found = fetch_headers(options.model, revision=options.revision, on_progress=reporter.line)
    if found is None:
        return options, 0
    headers = read_headers(options.model, revision=options.revision)
    reporter.line("Only its config is here: whether the files hold what it says is found when they are fetched.")
    name = options.served_model_name or options.model
    return replace(options, model=str(folder), load_format="dummy", served_model_name=name), headers.file_bytes or 0


def _size(
    prepared: Prepared, expected: tuple[RankBalance, ...] | None
) -> tuple[int | None, int, int | None, AphroError | None]:
    """(KV blocks, longest request, limiting rank, what would be refused), as the engine decides it from its workers."""
    length = prepared.config.model.max_model_len
    if expected is None:
        return None, length, None, None
    loaded = [_as_loaded(balance) for balance in expected]
    limiting = min(loaded, key=lambda each: each.num_blocks)
    try:
        num_blocks, length = fit_cache(prepared.config, loaded)
    except AphroError as error:
        return prepared.config.cache.num_blocks or limiting.num_blocks, length, limiting.rank, error
    return num_blocks, length, limiting.rank, None


def _as_loaded(balance: RankBalance) -> WorkerLoaded:
    """What this rank's worker will say, if the estimate is right."""
    return WorkerLoaded(
        rank=balance.rank,
        pid=0,
        host="",
        device="",
        weights_bytes=balance.weights_bytes,
        activation_bytes=balance.activation_bytes,
        kv_bytes=max(balance.left_bytes, 0),
        block_bytes=balance.layout.block_bytes,
        num_blocks=balance.num_blocks,
        bytes_read=0,
    )


def _places(config: EngineConfig) -> list[tuple[str, int]]:
    """(host, index of the device there) of each rank."""
    parallel = config.parallel
    if not parallel.hosts:
        return [(socket.gethostname(), rank) for rank in range(parallel.world_size)]
    slots = [each.num_slots for each in parallel.hosts]
    places = place_ranks(slots, parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
    return [(parallel.hosts[place.host].name, place.device) for place in places]


def _ranks(prepared: Prepared, expected: tuple[RankBalance, ...] | None) -> tuple[PlannedRank, ...]:
    is_gpu, places = prepared.config.device == "cuda", _places(prepared.config)
    balances = expected or [None] * len(prepared.plan.ranks)
    return tuple(
        PlannedRank(
            rank=shard.rank,
            stage=shard.pp_rank,
            tp_rank=shard.tp_rank,
            host=host,
            device=f"cuda:{device}" if is_gpu else "cpu",
            first_layer=shard.layers.start,
            last_layer=shard.layers.stop - 1,
            num_heads=len(shard.heads),
            num_kv_heads=len(shard.kv_heads),
            **_bytes_of(balance),
        )
        for shard, balance, (host, device) in zip(prepared.plan.ranks, balances, places, strict=True)
    )


def _bytes_of(balance: RankBalance | None) -> dict[str, int]:
    if balance is None:
        return {}
    return {
        "weights_bytes": balance.weights_bytes,
        "activation_bytes": balance.activation_bytes,
        "overhead_bytes": balance.overhead_bytes,
        "kv_bytes": max(balance.left_bytes, 0),
        "num_blocks": balance.num_blocks,
    }


def _describe(problem: AphroError) -> dict[str, Any]:
    return {"message": problem.message, "hint": problem.hint, "exit_code": int(problem.exit_code)}


def _shown(environment: Mapping[str, str], asked: Mapping[str, str]) -> dict[str, str]:
    """What decides how ranks compute and talk, and what was ``asked``, in order; never a secret's value."""
    return {
        name: "set, not shown" if is_secret(name) else environment[name]
        for name in sorted(environment)
        if name.startswith(_SHOWN) or name in asked
    }
