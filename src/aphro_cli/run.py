"""``aphro run``: from the command line to the running server."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from aphro_cli import cors_options as cors
from aphro_cli import options as opt
from aphro_cli.console import Console, open_console, run_reported
from aphro_core.environment import parse_assignments
from aphro_core.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from aphro_core.api import ServeOptions

EXAMPLES = """\b
Examples:
  aphro run ./SmolLM2-135M-Instruct.Q4_1.gguf
  aphro run HuggingFaceTB/SmolLM2-135M-Instruct --port 8000
  aphro run ./llama -tp 3                      any number of ranks: shares may differ by a head
  aphro run ./llama -tp 2 -pp 2 --device cpu   four processes on this host's cores
  aphro run ./llama -tp 2 -pp 2 --hosts a:2,b:2
  aphro run ./llama -tp 2 -pp 2 --wait-nodes 2 in the cluster that this host is in (aphro cluster up, join)
  aphro run ./llama -pp 2 --hosts a,b --model-from head   b needs no copy of the model
  aphro run ./llama -tp 2 -pp 2 --hosts a:2,b:2 -e NCCL_DEBUG=INFO -e HF_TOKEN   for the ranks, on all hosts
  APHRO_API_KEY=secret aphro run ./llama --host 0.0.0.0
  aphro run ./llama --load-format dummy        start with random weights, to try a placement
  aphro run ./llama -tp 2 --dry-run            plan, memory, ports, environment; nothing is started
  aphro run --config llama.yaml --port 8000    options from a file; flags win
  aphro run ./llama -tp 2 --print-config > llama.yaml
"""


def run(
    context: typer.Context,
    model: opt.Model,
    tensor_parallel_size: opt.TensorParallelSize = 1,
    pipeline_parallel_size: opt.PipelineParallelSize = 1,
    pp_layers: opt.PpLayers = None,
    enable_expert_parallel: opt.EnableExpertParallel = False,
    distributed_executor_backend: opt.ExecutorBackend = None,
    hosts: opt.Hosts = None,
    wait_nodes: opt.WaitNodes = None,
    wait_timeout: opt.WaitTimeout = 300.0,
    env: opt.Environment = None,
    device: opt.DeviceOption = "auto",
    dtype: opt.DTypeOption = "auto",
    max_model_len: opt.MaxModelLen = None,
    max_num_seqs: opt.MaxNumSeqs = None,
    max_num_batched_tokens: opt.MaxNumBatchedTokens = None,
    max_num_prefill_tokens: opt.MaxNumPrefillTokens = None,
    enforce_eager: opt.EnforceEager = False,
    deterministic: opt.Deterministic = False,
    gpu_memory_utilization: opt.GpuMemoryUtilization = 0.90,
    cpu_memory_utilization: opt.CpuMemoryUtilization = 0.50,
    block_size: opt.BlockSize = 16,
    num_blocks: opt.NumBlocks = None,
    enable_prefix_caching: opt.EnablePrefixCaching = True,
    kv_cache_dtype: opt.KvCacheDType = "auto",
    load_format: opt.LoadFormat = "auto",
    quantization: opt.Quantization = None,
    revision: opt.Revision = None,
    model_from: opt.ModelFrom = "nodes",
    verify: opt.Verify = "headers",
    served_model_name: opt.ServedModelName = None,
    chat_template: opt.ChatTemplate = None,
    skip_tokenizer_init: opt.SkipTokenizerInit = False,
    seed: opt.Seed = 0,
    host: opt.Host = "127.0.0.1",
    port: opt.Port = 2242,
    api_key: opt.ApiKey = None,
    allow_anonymous: opt.AllowAnonymous = False,
    allowed_origins: cors.AllowedOrigins = cors.NONE,
    allowed_methods: cors.AllowedMethods = cors.ALL,
    allowed_headers: cors.AllowedHeaders = cors.ALL,
    allow_credentials: cors.AllowCredentials = False,
    max_queued_requests: opt.MaxQueuedRequests = 1024,
    queue_timeout: opt.QueueTimeout = 600.0,
    request_timeout: opt.RequestTimeout = 3600.0,
    drain_seconds: opt.DrainSeconds = 30.0,
    json_ready: opt.JsonReady = None,
    start_timeout: opt.StartTimeout = 1800.0,
    distributed_timeout: opt.DistributedTimeout = 300.0,
    step_timeout: opt.StepTimeout = None,
    max_recoveries: opt.MaxRecoveries = 3,
    log_level: opt.Level = "info",
    config: opt.Config = None,
    print_config: opt.PrintConfig = False,
    dry_run: opt.DryRun = False,
    as_json: opt.AsJson = False,
) -> None:
    """Serve MODEL over the OpenAI API until Ctrl-C or SIGTERM."""
    console = open_console(log_level, term=os.environ.get("TERM", ""))
    for warning in opt.unknown_variables(os.environ):
        console.warn(warning)
    # the libraries' own logs, and the traceback behind an HTTP 500
    library_level = {"debug": logging.DEBUG, "error": logging.ERROR}.get(log_level, logging.WARNING)
    logging.basicConfig(level=library_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")

    def serve() -> int:
        api_keys = tuple(api_key or ())
        opt.check_access(host, api_keys, allow_anonymous)
        opt.check_files(chat_template, json_ready)
        origins, methods = cors.parse_origins(allowed_origins), cors.parse_methods(allowed_methods)
        headers = cors.parse_headers(allowed_headers)
        opt.check_finite(
            drain_seconds=drain_seconds, start_timeout=start_timeout, distributed_timeout=distributed_timeout
        )
        opt.check_finite(
            step_timeout=step_timeout or 0.0,
            wait_timeout=wait_timeout,
            queue_timeout=queue_timeout,
            request_timeout=request_timeout,
        )
        backend = opt.parse_backend(distributed_executor_backend)
        layers = opt.parse_pp_layers(pp_layers)
        length = opt.parse_max_model_len(max_model_len)
        if print_config:
            return _print_values(context, as_json)
        if as_json and not dry_run:
            raise UsageError("--json is for --dry-run and --print-config", hint="--json-ready FILE for a start")
        if json_ready is not None and not dry_run:
            Path(json_ready).unlink(missing_ok=True)  # a script that waits for it must not find an older start's

        _check_torch()
        from aphro_core import api  # only now: --help and refusals answer at once

        options = api.ServeOptions(
            model=model,
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            pp_layers=layers,
            enable_expert_parallel=enable_expert_parallel,
            backend=backend,
            hosts=opt.parse_hosts(hosts),
            environment=parse_assignments(env or [], os.environ),
            wait_nodes=wait_nodes,
            wait_timeout=wait_timeout,
            device=device,
            dtype=opt.parse_dtype(dtype),
            max_model_len=length,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_prefill_tokens=max_num_prefill_tokens,
            enforce_eager=enforce_eager,
            deterministic=deterministic,
            gpu_memory_utilization=gpu_memory_utilization,
            cpu_memory_utilization=cpu_memory_utilization,
            block_size=block_size,
            num_blocks=num_blocks,
            enable_prefix_caching=enable_prefix_caching,
            kv_cache_dtype=kv_cache_dtype.replace("-", "_"),
            load_format=load_format,
            quantization=quantization,
            revision=revision,
            model_from=model_from,
            verify=verify,
            served_model_name=served_model_name,
            chat_template=chat_template,
            skip_tokenizer_init=skip_tokenizer_init,
            seed=seed,
            host=host,
            port=port,
            api_keys=api_keys,
            allowed_origins=origins,
            allowed_methods=methods,
            allowed_headers=headers,
            allow_credentials=allow_credentials,
            max_queued_requests=max_queued_requests,
            queue_timeout=queue_timeout,
            request_timeout=request_timeout,
            drain_seconds=drain_seconds,
            json_ready=json_ready,
            start_timeout=start_timeout,
            distributed_timeout=distributed_timeout,
            step_timeout=step_timeout,
            max_recoveries=max_recoveries,
        )
        return _try_out(options, console, as_json) if dry_run else api.serve(options, console)

    raise typer.Exit(run_reported(console, serve))


def _check_torch() -> None:
    """The single file comes without it, and cannot serve."""
    if importlib.util.find_spec("torch") is None:
        raise UsageError(
            "torch is not installed here: this aphro estimates, diagnoses and talks to servers, and serves nothing",
            hint="python3 quickstart.py, in a checkout of aphro, installs it whole",
        )


def _print_values(context: typer.Context, as_json: bool) -> int:
    from aphro_cli.effective import read_values, render_values

    rows = read_values(context)
    typer.echo(json.dumps(rows, indent=2) if as_json else "\n".join(render_values(rows)))
    return ExitCode.OK


def _try_out(options: ServeOptions, console: Console, as_json: bool) -> int:
    from aphro_cli.dry_run_view import render_dry_run
    from aphro_core.dry_run import try_out

    found = try_out(options, console)
    typer.echo(json.dumps(found.to_json(), indent=2) if as_json else "\n".join(render_dry_run(found)))
    if found.problem is not None:
        raise found.problem
    return ExitCode.OK
