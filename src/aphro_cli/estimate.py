"""``aphro estimate``: how many tokens fit, on which devices and with which tp/pp, before anything is started."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Final

import typer

from aphro_cli import estimate_options as est
from aphro_cli import options as opt
from aphro_cli.console import open_console, run_reported
from aphro_core.errors import ExitCode, PlacementError, UsageError

if TYPE_CHECKING:
    from aphro_core.estimate.estimate import Estimate
    from aphro_core.estimate.planner import Plan
    from aphro_core.estimate.question import ModelSource, Question
    from aphro_core.estimate.remedies import Remedy

_MOST_DEVICES: Final = 16  # of a host that plans use unless --max-gpus says more: cores count as devices

EXAMPLES = """\b
Examples:
  aphro estimate ./llama                               on this host's devices; all tp and pp are tried
  aphro estimate ./config.json --gpu H200 --max-gpus 16 --gpus-per-node 8
  aphro estimate Qwen/Qwen3-32B --gpu 4090 -tp 4 --max-model-len auto
  aphro estimate ./llama --gpu H100 --engine vllm:0.19.0 --max-num-seqs 256
  aphro estimate ./llama --gpu L40S --compare 4x1,2x2  two plans side by side
  aphro estimate --compare ./llama,./qwen --gpu H100   two models
"""


def estimate(
    model: est.Model = None,
    tensor_parallel_size: est.TensorParallelSize = None,
    pipeline_parallel_size: est.PipelineParallelSize = None,
    pp_layers: opt.PpLayers = None,
    gpu: est.Gpu = None,
    gpu_memory: est.GpuMemory = None,
    device: opt.DeviceOption = "auto",
    cluster: est.OfCluster = False,
    max_gpus: est.MaxGpus = None,
    gpus_per_node: est.GpusPerNode = 8,
    engine: est.Engine = "aphro",
    dtype: est.DType = "auto",
    quantization: est.Quantization = None,
    kv_cache_dtype: est.KvCacheDType = "auto",
    max_model_len: opt.MaxModelLen = None,
    max_num_seqs: est.MaxNumSeqs = None,
    max_num_batched_tokens: est.MaxNumBatchedTokens = None,
    max_num_prefill_tokens: opt.MaxNumPrefillTokens = None,
    gpu_memory_utilization: est.Utilization = None,
    block_size: est.BlockSize = 16,
    concurrency: est.Concurrency = 1.0,
    enforce_eager: est.EnforceEager = False,
    enable_expert_parallel: opt.EnableExpertParallel = False,
    enable_lora: est.EnableLora = False,
    max_loras: est.MaxLoras = None,
    max_lora_rank: est.MaxLoraRank = 16,
    enable_prefix_caching: est.PrefixCaching = None,
    draft_layers: est.DraftLayers = 0,
    num_speculative_tokens: est.NumSpeculativeTokens = 0,
    revision: opt.Revision = None,
    compare: est.Compare = None,
    as_json: est.Json = False,
) -> None:
    """Say how many tokens of MODEL fit, on which devices and with which tp/pp, without loading it."""
    console = open_console("info", term=os.environ.get("TERM", ""))

    def answer() -> int:
        from aphro_cli.estimate_devices import cluster_devices, find_devices
        from aphro_core.estimate.quantization import parse_quantization
        from aphro_core.estimate.question import Question, parse_engine
        from aphro_core.parallel.step_sizes import BLOCK_SIZES

        version = parse_engine(engine)
        length = opt.parse_max_model_len(max_model_len)
        scheme = parse_quantization(quantization)
        if cluster and (gpu or gpu_memory):
            raise UsageError("--cluster and --gpu both name devices", hint="leave one of them out")
        if cluster:
            devices, per_host = cluster_devices()
        else:
            devices = find_devices(gpu, gpu_memory, device, is_ours=version is None)
            per_host = gpus_per_node

        def ask(name: str, tp: int | None, pp: int | None) -> Question:
            return Question(
                source=_source(name, revision, quantization if version is None else None),
                device=devices,
                version=version,
                tp=tp,
                pp=pp,
                pp_layers=opt.parse_pp_layers(pp_layers),
                max_devices=max_gpus or min(devices.count or gpus_per_node, _MOST_DEVICES),
                devices_per_host=per_host,
                dtype=_dtype(dtype, devices.kind),
                kv_cache_dtype=kv_cache_dtype.replace("-", "_"),
                quantization=scheme,
                asked_quantization=quantization,
                max_model_len=length,
                max_num_batched_tokens=max_num_batched_tokens,
                max_num_prefill_tokens=max_num_prefill_tokens,
                max_num_seqs=max_num_seqs,
                block_size=block_size,
                utilization=gpu_memory_utilization,
                enforce_eager=enforce_eager,
                expert_parallel=enable_expert_parallel,
                max_loras=max_loras or int(enable_lora),
                max_lora_rank=max_lora_rank,
                prefix_caching=enable_prefix_caching,
                draft_layers=draft_layers,
                draft_tokens=num_speculative_tokens,
                concurrency=concurrency,
            )

        _check(dtype, gpu_memory_utilization)
        if version is None and block_size not in BLOCK_SIZES:
            raise UsageError(f"--block-size is {block_size}, allowed: {', '.join(map(str, BLOCK_SIZES))}")
        if compare is not None:
            sides = est.split_pair(compare)
            plans = [est.parse_plan(side) for side in sides]
            if any(plans) and (model is None or not all(plans)):
                raise UsageError(
                    "--compare with plans needs MODEL and two plans", hint="aphro estimate MODEL --compare 4x1,2x2"
                )
            questions = [
                ask(model or side, *(plan or (tensor_parallel_size, pipeline_parallel_size)))
                for side, plan in zip(sides, plans, strict=True)
            ]
            return _compare(questions, list(sides), as_json)
        if model is None:
            raise UsageError("MODEL is missing", hint="aphro estimate ./my-model --gpu H100")
        return _answer(ask(model, tensor_parallel_size, pipeline_parallel_size), as_json)

    raise typer.Exit(run_reported(console, answer))


def _answer(question: Question, as_json: bool) -> int:
    """One model: its plans, and the figures of the recommended or the wanted one. Returns the exit code."""
    from aphro_core.estimate.report import build_report, illegal_report

    found, plans, ways_out = _solve(question)
    if found is None:
        illegal = next(plan for plan in plans if plan.found is None)
        if as_json:
            name, size = question.source.name, question.block_size
            typer.echo(json.dumps(illegal_report(name, question.engine, size, illegal.reason, plans)))
        number = question.source.facts.num_layers
        raise PlacementError(
            illegal.reason,
            hint=f"--pp-layers with numbers that add up to {number}, or without it"
            if question.pp_layers is not None and sum(question.pp_layers) != number
            else "leave -tp and -pp out: the sizes that are legal are listed then",
        )
    if as_json:
        typer.echo(json.dumps(build_report(found, plans, ways_out)))
    else:
        from aphro_cli.estimate_view import render_estimate

        for line in render_estimate(found, plans, ways_out):
            typer.echo(line)
    return ExitCode.OK if found.fits else ExitCode.MEMORY


def _solve(question: Question) -> tuple[Estimate | None, list[Plan], list[Remedy]]:
    """(the answer, all plans, ways out if it may not fit). None for an answer where the wanted sizes are illegal."""
    from aphro_core.estimate.planner import plan_all, plan_one
    from aphro_core.estimate.remedies import remedies

    if question.tp is not None or question.pp is not None or question.pp_layers is not None:
        stages = question.pp or (len(question.pp_layers) if question.pp_layers else 1)
        plan = plan_one(question, question.tp or 1, stages)
        plans, found = [plan], plan.found
    else:
        plans = plan_all(question)
        best = [plan for plan in plans if plan.recommended] or _nearest(plans)
        found = best[0].found if best else None
    ways_out = remedies(found) if found is not None and found.verdict != "fits" else []
    return found, plans, ways_out


def _nearest(plans: list[Plan]) -> list[Plan]:
    """Where nothing fits, the legal plan that lacks least, of equals the one of the fewest devices."""
    legal = [plan for plan in plans if plan.found is not None]
    return sorted(legal, key=lambda plan: max(plan.found.missing_bytes, 0) if plan.found else 0)[:1]


def _compare(questions: list[Question], names: list[str], as_json: bool) -> int:
    from aphro_core.estimate.report import build_report

    solved = [_solve(question) for question in questions]
    for (found, plans, _), name in zip(solved, names, strict=True):
        if found is None:
            raise PlacementError(f"{name}: {plans[0].reason}", hint="compare sizes that are legal for both")
    reports = [build_report(found, plans, ways) for found, plans, ways in solved if found is not None]
    if as_json:
        typer.echo(json.dumps({"compare": reports}))
    else:
        from aphro_cli.estimate_view import render_comparison

        for line in render_comparison(names, [found for found, _, _ in solved if found is not None]):
            typer.echo(line)
    return ExitCode.OK if all(report["fits"] for report in reports) else ExitCode.MEMORY


def _check(dtype: str, utilization: float | None) -> None:
    if dtype not in ("auto", "float32", "bfloat16", "float16", "float", "half"):
        raise UsageError(f"--dtype is {dtype!r}, allowed: auto, float32, bfloat16, float16, float, half")
    if utilization is not None and not 0.0 < utilization <= 1.0:
        raise UsageError(f"--gpu-memory-utilization is {utilization}, allowed: more than 0, up to 1")


def _dtype(dtype: str, kind: str) -> str:
    """As ``run`` would choose it: ``auto`` on CPUs depends on their instructions."""
    from aphro_core import host

    if dtype == "auto" and kind == "cpu":
        return "bfloat16" if host.has_bf16_instructions() else "float32"
    return opt.parse_dtype(dtype)


def _source(model: str, revision: str | None, quantization: str | None) -> ModelSource:
    from aphro_core.checkpoint.headers import read_headers
    from aphro_core.estimate.source import build_source

    headers = read_headers(model, revision=revision, on_progress=lambda text: typer.echo(text, err=True))
    return build_source(
        model,
        headers.hf_config,
        tensors=headers.tensors,
        file_bytes=headers.file_bytes,
        quantization=quantization,
    )
