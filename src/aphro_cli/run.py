"""``aphro run``: from the command line to the running server."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import typer

from aphro_cli import options as opt
from aphro_cli.console import open_console, run_reported

EXAMPLES = """\b
Examples:
  aphro run ./SmolLM2-135M-Instruct.Q4_1.gguf
  aphro run HuggingFaceTB/SmolLM2-135M-Instruct --port 8000
  aphro run ./llama -tp 3                      any number of ranks: shares may differ by a head
  aphro run ./llama -tp 2 -pp 2 --device cpu   four processes on this host's cores
  APHRO_API_KEY=secret aphro run ./llama --host 0.0.0.0
  aphro run ./llama --load-format dummy        start with random weights, to try a placement
"""


def run(
    model: opt.Model,
    tensor_parallel_size: opt.TensorParallelSize = 1,
    pipeline_parallel_size: opt.PipelineParallelSize = 1,
    pp_layers: opt.PpLayers = None,
    enable_expert_parallel: opt.EnableExpertParallel = False,
    distributed_executor_backend: opt.ExecutorBackend = None,
    device: opt.DeviceOption = "auto",
    dtype: opt.DTypeOption = "auto",
    max_model_len: opt.MaxModelLen = None,
    max_num_seqs: opt.MaxNumSeqs = None,
    max_num_batched_tokens: opt.MaxNumBatchedTokens = None,
    max_num_prefill_tokens: opt.MaxNumPrefillTokens = None,
    enforce_eager: opt.EnforceEager = False,
    gpu_memory_utilization: opt.GpuMemoryUtilization = 0.90,
    cpu_memory_utilization: opt.CpuMemoryUtilization = 0.50,
    block_size: opt.BlockSize = 16,
    num_blocks: opt.NumBlocks = None,
    enable_prefix_caching: opt.EnablePrefixCaching = True,
    load_format: opt.LoadFormat = "auto",
    quantization: opt.Quantization = None,
    revision: opt.Revision = None,
    served_model_name: opt.ServedModelName = None,
    chat_template: opt.ChatTemplate = None,
    skip_tokenizer_init: opt.SkipTokenizerInit = False,
    seed: opt.Seed = 0,
    host: opt.Host = "127.0.0.1",
    port: opt.Port = 2242,
    api_key: opt.ApiKey = None,
    allow_anonymous: opt.AllowAnonymous = False,
    max_queued_requests: opt.MaxQueuedRequests = 1024,
    drain_seconds: opt.DrainSeconds = 30.0,
    json_ready: opt.JsonReady = None,
    start_timeout: opt.StartTimeout = 1800.0,
    distributed_timeout: opt.DistributedTimeout = 300.0,
    step_timeout: opt.StepTimeout = None,
    max_recoveries: opt.MaxRecoveries = 3,
    log_level: opt.Level = "info",
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
        opt.check_finite(
            drain_seconds=drain_seconds, start_timeout=start_timeout, distributed_timeout=distributed_timeout
        )
        opt.check_finite(step_timeout=step_timeout or 0.0)
        backend = opt.parse_backend(distributed_executor_backend)
        layers = opt.parse_pp_layers(pp_layers)
        length = opt.parse_max_model_len(max_model_len)
        if json_ready is not None:
            Path(json_ready).unlink(missing_ok=True)  # a script that waits for it must not find an older start's

        from aphro_core import api  # only now: --help and refusals answer at once

        return api.serve(
            api.ServeOptions(
                model=model,
                tensor_parallel_size=tensor_parallel_size,
                pipeline_parallel_size=pipeline_parallel_size,
                pp_layers=layers,
                enable_expert_parallel=enable_expert_parallel,
                backend=backend,
                device=device,
                dtype=opt.parse_dtype(dtype),
                max_model_len=length,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                max_num_prefill_tokens=max_num_prefill_tokens,
                enforce_eager=enforce_eager,
                gpu_memory_utilization=gpu_memory_utilization,
                cpu_memory_utilization=cpu_memory_utilization,
                block_size=block_size,
                num_blocks=num_blocks,
                enable_prefix_caching=enable_prefix_caching,
                load_format=load_format,
                quantization=quantization,
                revision=revision,
                served_model_name=served_model_name,
                chat_template=chat_template,
                skip_tokenizer_init=skip_tokenizer_init,
                seed=seed,
                host=host,
                port=port,
                api_keys=api_keys,
                max_queued_requests=max_queued_requests,
                drain_seconds=drain_seconds,
                json_ready=json_ready,
                start_timeout=start_timeout,
                distributed_timeout=distributed_timeout,
                step_timeout=step_timeout,
                max_recoveries=max_recoveries,
            ),
            console,
        )

    raise typer.Exit(run_reported(console, serve))
