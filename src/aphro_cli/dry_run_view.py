"""What ``aphro run --dry-run`` prints: plan, memory, ports and environment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aphro_cli.console import printable, render_table

if TYPE_CHECKING:
    from aphro_core.dry_run import DryRun, PlannedRank

_COLUMNS = ("rank", "host", "device", "layers", "heads/KV", "weights", "activations", "KV fits")


def render_dry_run(found: DryRun) -> list[str]:
    config, parallel = found.config, found.config.parallel
    sizes = f"tp {parallel.tensor_parallel_size} x pp {parallel.pipeline_parallel_size}"
    lines = render_table(f"{found.architecture}: {sizes}, {config.model.dtype}", _COLUMNS, [*map(_row, found.ranks)])
    lines += ["", *_memory(found)]
    if found.fetch_bytes:
        lines.append(f"To fetch from the Hugging Face Hub: {_gib(found.fetch_bytes)}")
    keys = f"{found.num_api_keys} API keys" if found.num_api_keys else "no API key"
    lines += [f"Address: {found.url} is free ({keys}), as {printable(config.model.served_name)}"]
    over = " over ssh" if parallel.backend == "ssh" else ""
    is_apart = parallel.backend != "inprocess"
    workers = f"1 engine and {parallel.world_size} workers{over}" if is_apart else "1 engine with its worker"
    lines += [f"Processes: keeper, fork server, API, {workers}; no other ports"]
    lines += ["Environment of the engine:" if over else "Environment of engine and workers:"]
    lines += [f"  {name}={printable(value)}" for name, value in found.environment.items()]
    return lines


def _memory(found: DryRun) -> list[str]:
    kind = "GPU" if found.config.device == "cuda" else "CPU"
    if found.num_blocks is None or found.tokens is None:
        if found.config.parallel.hosts:
            return ["Memory: that of other hosts is not known here; `aphro estimate MODEL --gpu NAME` says what fits"]
        return ["Memory: not known, nvidia-smi does not answer"]
    size = found.config.cache.block_size
    blocks = f"{found.num_blocks} blocks x {size}"
    lines = [
        f"# {kind} blocks: {found.num_blocks}",
        f"{kind} KV cache size: {found.tokens:,} tokens ({blocks}); rank {found.limiting_rank} limits",
    ]
    if found.problem is None:
        share = found.tokens / found.max_model_len
        lines.append(f"Maximum concurrency for {found.max_model_len:,} tokens per request: {share:.2f}x")
    return lines


def _row(rank: PlannedRank) -> tuple[str, ...]:
    return (
        str(rank.rank),
        printable(rank.host),
        rank.device,
        f"{rank.first_layer}-{rank.last_layer}",
        f"{rank.num_heads}/{rank.num_kv_heads}",
        _gib(rank.weights_bytes),
        _gib(rank.activation_bytes),
        _gib(rank.kv_bytes),
    )


def _gib(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**30:.2f} GiB"
