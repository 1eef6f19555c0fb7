"""From what was typed to one EngineConfig: what can be refused is refused here, before a process starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from aphro_core import host
from aphro_core.checkpoint.cache_scales import cache_scale_names
from aphro_core.checkpoint.manifest import verify_manifest
from aphro_core.checkpoint.model_files import stamps_of
from aphro_core.checkpoint.open import open_checkpoint, read_hf_config, resolve_model
from aphro_core.config import (
    Backend,
    CacheConfig,
    CacheDType,
    Device,
    DType,
    EngineConfig,
    HostSlots,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
)
from aphro_core.errors import PlacementError, UsageError
from aphro_core.estimate.aphro_engine import expected_balances
from aphro_core.estimate.balance import RankBalance
from aphro_core.executor.choice import Wanted, choose_placement
from aphro_core.models.packed_summary import describe_weights
from aphro_core.models.quantization import expands_gguf, is_int4
from aphro_core.models.registry import load_spec
from aphro_core.models.spec import DecoderSpec
from aphro_core.parallel.shard import ShardingPlan, build_plan
from aphro_core.parallel.step_sizes import (
    BLOCK_SIZES,
    GPU_TOKENS_UNIT,
    context_room,
    default_step_sizes,
    parameters_on_the_way,
)
from aphro_core.reporter import Reporter


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What was asked of the engine, as typed. The command line and ``LLM`` both build one."""

    model: str
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    pp_layers: tuple[int, ...] | None = None
    enable_expert_parallel: bool = False
    backend: Literal["auto", "mp", "ssh", "ray"] = "auto"
    hosts: tuple[HostSlots, ...] = ()  # ranks run there, started over ssh
    wait_nodes: int | None = None  # that are to be in the cluster before anything starts
    wait_timeout: float = 300.0  # seconds for them to come
    environment: Mapping[str, str] = field(default_factory=dict)  # of engine and ranks, on top of all other
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int | Literal["auto"] | None = None
    max_num_seqs: int | None = None  # None: 512 on GPUs, 256 on CPUs
    max_num_batched_tokens: int | None = None  # of a step in which sequences decode; None: by the model's size on GPUs
    max_num_prefill_tokens: int | None = None  # of one in which none does; None: on GPUs without stages 8192 or more
    gpu_memory_utilization: float = 0.90
    cpu_memory_utilization: float = 0.50
    block_size: int = 16
    enforce_eager: bool = False
    deterministic: bool = False  # the same tokens whatever else is computed, and after a recovery
    num_blocks: int | None = None
    enable_prefix_caching: bool = True
    kv_cache_dtype: str = "auto"  # or fp8 (fp8_e4m3 is the same)
    load_format: Literal["auto", "dummy"] = "auto"
    quantization: str | None = None
    served_model_name: str | None = None
    chat_template: str | None = None  # a file
    skip_tokenizer_init: bool = False
    revision: str | None = None
    model_from: Literal["nodes", "head"] = "nodes"  # of --hosts
    verify: Literal["headers", "full"] = "headers"
    seed: int = 0
    start_timeout: float = 1800.0
    distributed_timeout: float = 300.0
    step_timeout: float | None = None  # None: 10 s on CPUs, 60 s on GPUs, whose kernels may be compiled in a step
    max_recoveries: int = 3  # of the engine in 60 s


@dataclass(frozen=True)
class Prepared:
    """A start that nothing known beforehand forbids."""

    config: EngineConfig
    spec: DecoderSpec
    plan: ShardingPlan


def prepare(options: EngineOptions, reporter: Reporter) -> Prepared:
    """Find and check the model, choose device, dtype and backend, and say each choice with its reason in one line.

    Raises UsageError, ModelError or PlacementError.
    """
    _check_sizes(options)
    path = resolve_model(options.model, revision=options.revision)
    spec = _read_spec(options, path, reporter)
    placement = choose_placement(_wanted(options), reporter)
    device = placement.device
    dtype = _choose_dtype(options, spec, device, reporter)
    quantization = _choose_quantization(options, spec, device, dtype, reporter)
    spec = spec if quantization != "none" else replace(spec, quantization=None)
    _check_experts(options, spec)
    if options.deterministic:
        _check_deterministic(spec, device, dtype, reporter)
    plan = build_plan(
        spec,
        options.tensor_parallel_size,
        options.pipeline_parallel_size,
        options.pp_layers,
        expert_parallel=options.enable_expert_parallel,
    )
    _check_files_of_hosts(options, placement.backend)
    config = EngineConfig(
        model=ModelConfig(
            path=str(path),
            served_name=options.served_model_name or _served_name(options.model, path),
            dtype=dtype,
            max_model_len=_choose_length(options, spec),
            fit_max_model_len=options.max_model_len == "auto",
            load_format=options.load_format,
            quantization=quantization,
            seed=options.seed,
            model_from=options.model_from,
            verify=options.verify,
            stamps=() if options.load_format == "dummy" else stamps_of(path),
        ),
        parallel=ParallelConfig(
            tensor_parallel_size=options.tensor_parallel_size,
            pipeline_parallel_size=options.pipeline_parallel_size,
            pp_layers=options.pp_layers,
            expert_parallel=options.enable_expert_parallel,
            backend=placement.backend,
            hosts=placement.hosts,
            ray=placement.ray,
            environment=dict(options.environment),
        ),
        cache=CacheConfig(
            block_size=options.block_size,
            gpu_memory_utilization=options.gpu_memory_utilization,
            cpu_memory_utilization=options.cpu_memory_utilization,
            num_blocks=options.num_blocks,
            enable_prefix_caching=options.enable_prefix_caching,
            dtype=_choose_cache_dtype(options, spec, path, device, reporter),
        ),
        scheduler=_choose_steps(options, spec, plan, device, reporter),
        device=device,
        enforce_eager=options.enforce_eager,
        deterministic=options.deterministic,
        start_timeout_seconds=options.start_timeout,
        distributed_timeout_seconds=options.distributed_timeout,
        step_timeout_seconds=options.step_timeout or (60.0 if device == "cuda" else 10.0),
    )
    return Prepared(config, spec, plan)


def _wanted(options: EngineOptions) -> Wanted:
    return Wanted(
        tp_size=options.tensor_parallel_size,
        pp_size=options.pipeline_parallel_size,
        device=options.device,
        backend=options.backend,
        hosts=options.hosts,
        wait_nodes=options.wait_nodes,
        wait_seconds=options.wait_timeout,
    )


def expect_memory(prepared: Prepared, reporter: Reporter) -> tuple[RankBalance, ...] | None:
    """Each rank's memory by the estimate, to be asked before anything is loaded. None of other hosts, whose memory is
    unknown here, and of GPUs that nvidia-smi does not answer for. It may take seconds."""
    config, spec, plan = prepared.config, prepared.spec, prepared.plan
    if config.parallel.hosts:
        return None
    if config.device == "cpu":
        return expected_balances(spec, plan, config, host.available_memory_bytes())
    gpus = host.gpu_memory()
    if not gpus:
        reporter.line("No estimate to compare with: nvidia-smi does not answer.")
        return None
    foreign = max(gpu.total_bytes - gpu.free_bytes for gpu in gpus)
    return expected_balances(spec, plan, config, min(gpu.total_bytes for gpu in gpus), foreign)


def _read_spec(options: EngineOptions, path: Path, reporter: Reporter) -> DecoderSpec:
    """What the config says, and for real weights whether the checkpoint holds it."""
    if options.load_format == "dummy":
        return load_spec(read_hf_config(path), options.quantization)
    with open_checkpoint(path) as checkpoint:
        spec = load_spec(checkpoint.hf_config, options.quantization)
        checkpoint.verify(spec)
    said = verify_manifest(path, lambda done, total: reporter.progress("digests", done, total, "model files: SHA-256"))
    if said is not None:
        reporter.line(said)
    return spec


def _check_sizes(options: EngineOptions) -> None:
    at_least_one = ("tensor_parallel_size", "pipeline_parallel_size")
    unless_left_out = ("max_num_seqs", "max_num_batched_tokens", "max_num_prefill_tokens")
    for name in (*at_least_one, *(name for name in unless_left_out if getattr(options, name) is not None)):
        if getattr(options, name) < 1:
            raise UsageError(f"{name} is {getattr(options, name)}, allowed: 1 and up")
    for name in ("gpu_memory_utilization", "cpu_memory_utilization"):
        if not 0.0 < getattr(options, name) <= 1.0:
            raise UsageError(f"{name} is {getattr(options, name)}, allowed: more than 0, up to 1")
    if options.block_size not in BLOCK_SIZES:
        raise UsageError(f"block_size is {options.block_size}, allowed: {', '.join(map(str, BLOCK_SIZES))}")
    if options.num_blocks is not None and options.num_blocks < 1:
        raise UsageError(f"num_blocks is {options.num_blocks}, allowed: 1 and up")


def _check_experts(options: EngineOptions, spec: DecoderSpec) -> None:
    if options.enable_expert_parallel and spec.moe is None:
        raise UsageError(
            f"enable_expert_parallel is set, but {spec.architecture} with this config has no experts",
            hint="leave --enable-expert-parallel out",
        )


def _check_deterministic(spec: DecoderSpec, device: Device, dtype: DType, reporter: Reporter) -> None:
    """Raises UsageError where a row's bits would depend on the rows beside it."""
    if device == "cuda":
        raise UsageError(
            "--deterministic on GPUs: their products and sums are split by the number of rows, and this version has no "
            "kernels that are not",
            hint="--device cpu, or leave --deterministic out",
        )
    if dtype == "float16":
        raise UsageError("--deterministic in float16, allowed: bfloat16, float32", hint="--dtype bfloat16")
    if spec.quantization is not None:
        raise UsageError(
            f"--deterministic with weights that stay packed ({spec.quantization.layout}): their products are chosen by "
            f"the number of rows",
            hint="a checkpoint in bfloat16 or float32, or a GGUF file without -q",
        )
    reporter.line(
        "Deterministic: the same tokens whatever else is computed, and after a recovery. Every row reads its keys by "
        "itself, which makes long prompts slower; products go in fixed numbers of rows, checked on this CPU."
    )


def _choose_steps(
    options: EngineOptions, spec: DecoderSpec, plan: ShardingPlan, device: Device, reporter: Reporter
) -> SchedulerConfig:
    parameters = parameters_on_the_way(spec, plan)
    default = default_step_sizes(device, parameters, plan.pp_size, options.max_num_batched_tokens)
    tokens = default.decode_tokens
    is_gpu = device == "cuda"
    room = context_room(spec, plan, 2 if options.kv_cache_dtype == "auto" else 1)
    steps = SchedulerConfig(
        max_num_seqs=options.max_num_seqs or default.max_num_seqs,
        max_num_batched_tokens=tokens,
        max_num_prefill_tokens=options.max_num_prefill_tokens or (default.prefill_tokens if is_gpu else None),
        context_per_token=room.context_per_token if is_gpu else None,
        free_context=room.free_context if is_gpu else 0,
        tokens_unit=GPU_TOKENS_UNIT if is_gpu else 1,
    )
    if is_gpu:
        reporter.line(
            f"Steps of up to {steps.max_num_seqs} sequences: {tokens} tokens while any of them decodes, fewer beside "
            f"long contexts, {steps.max_num_prefill_tokens} otherwise."
        )
    return steps


def _served_name(model: str, path: Path) -> str:
    """A Hub id stays as it is, a path answers by its last part."""
    return path.name.removesuffix(".gguf") if Path(model).exists() else model


def _choose_length(options: EngineOptions, spec: DecoderSpec) -> int:
    limit = spec.max_position_embeddings
    if options.max_model_len is None or options.max_model_len == "auto":
        return limit
    if not 1 <= options.max_model_len <= limit:
        raise UsageError(
            f"max_model_len is {options.max_model_len}, allowed: 1 to {limit} (the model's max_position_embeddings)",
            hint=f"--max-model-len {limit}",
        )
    return options.max_model_len


def _choose_dtype(options: EngineOptions, spec: DecoderSpec, device: Device, reporter: Reporter) -> DType:
    if options.dtype != "auto":
        return options.dtype
    if device == "cuda":
        return "float16" if spec.dtype == "float16" else "bfloat16"
    dtype: DType = "bfloat16" if host.has_bf16_instructions() else "float32"
    why = "this CPU multiplies bfloat16" if dtype == "bfloat16" else "this CPU has no bfloat16 instructions"
    reporter.line(f"Data type {dtype}: {why} (--dtype float32 for exact comparisons).")
    if dtype == "bfloat16" and not host.has_product_kernels():
        reporter.line("Products are torch's: aphro's own are for CPUs with AVX512-BF16 and VNNI and without AMX.")
    return dtype


def _choose_cache_dtype(
    options: EngineOptions, spec: DecoderSpec, path: Path, device: Device, reporter: Reporter
) -> CacheDType:
    if options.kv_cache_dtype == "auto":
        return "auto"
    if options.kv_cache_dtype not in ("fp8", "fp8_e4m3"):
        raise UsageError(
            f"kv_cache_dtype is {options.kv_cache_dtype!r}, allowed: auto, fp8 (the same as fp8_e4m3)",
            hint="--kv-cache-dtype fp8, or leave it out",
        )
    oldest = host.least_compute_capability() if device == "cuda" and not options.hosts else None
    if oldest is not None and oldest < (8, 9):
        raise PlacementError(
            f"--kv-cache-dtype fp8 needs GPUs of compute capability 8.9, and this host has one of "
            f"{oldest[0]}.{oldest[1]}, which has no instruction for it",
            hint="--kv-cache-dtype auto",
        )
    num_scaled = 0
    if options.load_format != "dummy":
        with open_checkpoint(path) as checkpoint:
            names = set(checkpoint.tensor_names)
        num_scaled = sum(cache_scale_names(names, layer) is not None for layer in range(spec.num_layers))
    scales = "scale 1: the checkpoint has none of its own"
    if num_scaled:
        scales = f"scales of the checkpoint in {num_scaled} of {spec.num_layers} layers"
    reporter.line(f"KV cache: fp8 (e4m3), {scales}.")
    return "fp8"


def _choose_quantization(
    options: EngineOptions, spec: DecoderSpec, device: Device, dtype: DType, reporter: Reporter
) -> str | None:
    """What was asked for; else GGUF weights are expanded for float32, which is there to be exact."""
    found = spec.quantization
    if found is None:
        return options.quantization
    is_exact = options.deterministic and options.quantization is None and found.layout == "gguf"
    if is_exact or expands_gguf(found, options.quantization, dtype):
        reporter.line(f"Weights: GGUF blocks are expanded to {dtype} (-q gguf keeps them packed).")
        return "none"
    reporter.line(f"Weights: {describe_weights(spec, dtype)}")
    if device == "cpu" and dtype == "bfloat16" and host.has_product_kernels():
        reporter.line(
            "Activations are quantised to 8 bits in blocks of 32 for each product (--dtype float32 does not)."
        )
    elif device == "cpu" and dtype == "bfloat16" and not is_int4(found):
        reporter.line("Weights that are not 4 bits in groups are kept in 8 bits a row, which this CPU multiplies.")
    return options.quantization


def _check_files_of_hosts(options: EngineOptions, backend: Backend) -> None:
    for name, default in (("model_from", "nodes"), ("verify", "headers")):
        if backend in ("inprocess", "mp") and getattr(options, name) != default:
            raise UsageError(
                f"{name} is {getattr(options, name)!r}, which is about other hosts, and all ranks run on this one",
                hint=f"--hosts a:2,b:2, or leave --{name.replace('_', '-')} out",
            )
