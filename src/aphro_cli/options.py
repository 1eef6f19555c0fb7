"""The options of ``aphro run``: their names and help, and the checks that need nothing but what was typed."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from aphro_cli.console import LogLevel
from aphro_core.errors import UsageError

if TYPE_CHECKING:
    from aphro_core.config import HostSlots

ENVIRONMENT: Final[dict[str, str]] = {
    "APHRO_API_KEY": "API keys, separated by spaces; kept out of the process list, unlike --api-key",
    "APHRO_CLUSTER_TOKEN": "the token that a host joins a cluster with",
    "APHRO_CLUSTER_NODE": "set for the processes of this host's member of a cluster, not by hand",
    "APHRO_LOG_LEVEL": "default of --log-level",
    "APHRO_SMOLLM2": "the .gguf that the end-to-end tests serve, instead of the one in the cache",
}

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A local folder, a .gguf file or a Hugging Face id.")]

# parallelism
TensorParallelSize = Annotated[
    int, typer.Option("--tensor-parallel-size", "-tp", min=1, help="Ranks that share each layer; any number, also 3.")
]
PipelineParallelSize = Annotated[
    int, typer.Option("--pipeline-parallel-size", "-pp", min=1, help="Stages that the layers are split into.")
]
PpLayers = Annotated[str | None, typer.Option("--pp-layers", metavar="A,B,...", help="Layers of each stage, in order.")]
EnableExpertParallel = Annotated[
    bool,
    typer.Option("--enable-expert-parallel", help="Tensor-parallel ranks hold whole experts, not columns of each."),
]
ExecutorBackend = Annotated[
    str | None,
    typer.Option(
        "--distributed-executor-backend",
        metavar="mp|ssh|ray",
        help="How workers are started: mp, here; ssh, on --hosts; ray, in a cluster. Default: by what is there.",
    ),
]
Hosts = Annotated[
    str | None,
    typer.Option(
        "--hosts",
        metavar="HOST:DEVICES,...",
        help="Start the ranks there, over ssh; or a file with a HOST:DEVICES a line.",
    ),
]

WaitNodes = Annotated[
    int | None, typer.Option("--wait-nodes", metavar="N", min=1, help="Use the cluster, once N nodes are in it.")
]
WaitTimeout = Annotated[
    float, typer.Option("--wait-timeout", metavar="S", min=0, help="Seconds for --wait-nodes; then it is refused.")
]

Environment = Annotated[
    list[str] | None,
    typer.Option("--env", "-e", metavar="NAME[=VALUE]", help="For all ranks, wherever they run. NAME: from here."),
]

# model
DeviceOption = Annotated[Literal["auto", "cuda", "cpu"], typer.Option("--device", help="Where the ranks compute.")]
DTypeOption = Annotated[
    Literal["auto", "float32", "bfloat16", "float16", "float", "half"],
    typer.Option("--dtype", help="Data type of weights and KV cache; float and half are float32 and float16."),
]
MaxModelLen = Annotated[
    str | None,
    typer.Option(
        "--max-model-len",
        metavar="TOKENS|auto",
        help="Prompt and output together; default: the model's own length; auto: as much of it as the memory holds.",
    ),
]
KvCacheDType = Annotated[
    str,
    typer.Option(
        "--kv-cache-dtype",
        metavar="auto|fp8|fp8_e4m3",
        help="Of the KV cache; auto: as --dtype; fp8: half the bytes of 16 bits.",
    ),
]
LoadFormat = Annotated[
    Literal["auto", "dummy"], typer.Option("--load-format", help="dummy: random weights, nothing is read but config.")
]
Quantization = Annotated[
    str | None,
    typer.Option(
        "--quantization",
        "-q",
        metavar="METHOD",
        help="fp8, int8 or int4: quantise while loading; or the checkpoint's format; none expands GGUF.",
    ),
]
ModelFrom = Annotated[
    Literal["nodes", "head"],
    typer.Option(
        "--model-from", help="head: hosts without the model fetch the slices that their ranks need from this one."
    ),
]
Verify = Annotated[
    Literal["headers", "full"],
    typer.Option("--verify", help="What is compared of all hosts' model files: sizes and headers, or every byte."),
]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a Hugging Face id.")]
ServedModelName = Annotated[
    str | None, typer.Option("--served-model-name", help="The model's name in the API; default: from MODEL.")
]
ChatTemplate = Annotated[
    str | None, typer.Option("--chat-template", metavar="FILE", help="Jinja template instead of the model's own.")
]
SkipTokenizerInit = Annotated[
    bool, typer.Option("--skip-tokenizer-init", help="Token ids in, token ids out; no tokenizer is read.")
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of dummy weights.")]

# memory and batch
MaxNumSeqs = Annotated[
    int | None, typer.Option("--max-num-seqs", min=1, help="Sequences in one step; default: 512 on GPUs, 256 on CPUs.")
]
MaxNumBatchedTokens = Annotated[
    int | None, typer.Option("--max-num-batched-tokens", min=1, help="Tokens in one step in which anything decodes.")
]
MaxNumPrefillTokens = Annotated[
    int | None, typer.Option("--max-num-prefill-tokens", min=1, help="Tokens in one step in which nothing decodes.")
]
EnforceEager = Annotated[bool, typer.Option("--enforce-eager", help="No CUDA graphs: slower, starts sooner.")]
Deterministic = Annotated[
    bool,
    typer.Option("--deterministic", help="The same tokens whatever else is computed, also in bfloat16 (CPUs; slower)."),
]
GpuMemoryUtilization = Annotated[
    float, typer.Option("--gpu-memory-utilization", "-gmu", help="Share of each GPU's memory, weights included.")
]
CpuMemoryUtilization = Annotated[
    float, typer.Option("--cpu-memory-utilization", help="Share of the free host memory, all ranks together.")
]
BlockSize = Annotated[int, typer.Option("--block-size", metavar="8|16|32", help="Tokens in a KV block.")]
NumBlocks = Annotated[
    int | None, typer.Option("--num-gpu-blocks-override", min=1, help="KV blocks, instead of sizing by memory.")
]
EnablePrefixCaching = Annotated[
    bool,
    typer.Option(
        "--enable-prefix-caching/--no-enable-prefix-caching", help="Requests that begin alike share KV blocks."
    ),
]

# server
Host = Annotated[str, typer.Option("--host", help="Address to listen on; other than loopback needs an API key.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")]
ApiKey = Annotated[
    list[str] | None,
    typer.Option("--api-key", "--api-keys", envvar="APHRO_API_KEY", help="Clients must send it; may be repeated."),
]
AllowAnonymous = Annotated[bool, typer.Option("--allow-anonymous", help="Serve on any address without an API key.")]
MaxQueuedRequests = Annotated[
    int, typer.Option("--max-queued-requests", min=1, help="Requests that may wait; more are answered 429.")
]
QueueTimeout = Annotated[
    float, typer.Option("--queue-timeout", min=1, help="Seconds that a request may wait for its first token; then 503.")
]
RequestTimeout = Annotated[
    float, typer.Option("--request-timeout", min=1, help="Seconds that a request may take in all; then 504.")
]
DrainSeconds = Annotated[
    float, typer.Option("--drain-seconds", min=0, help="After SIGTERM or Ctrl-C: time for open requests to end.")
]
JsonReady = Annotated[
    str | None,
    typer.Option("--json-ready", metavar="FILE", help="Written once it serves: url, pid, workers, KV blocks."),
]


def _load_config(context: typer.Context, file: str | None) -> str | None:
    from aphro_cli.effective import load_config

    return load_config(context, file)


# before the start
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print plan, memory, ports and environment, check them all, start nothing.")
]
Config = Annotated[
    str | None,
    typer.Option("--config", metavar="FILE", callback=_load_config, help="Options from YAML or TOML; flags win."),
]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print every option's value and where it is from, as a --config file.")
]
AsJson = Annotated[bool, typer.Option("--json", help="With --dry-run or --print-config: JSON for scripts.")]

# start and talk
StartTimeout = Annotated[
    float, typer.Option("--start-timeout", min=1, help="Seconds from the first worker to the last one ready.")
]
DistributedTimeout = Annotated[
    float,
    typer.Option(
        "--distributed-timeout",
        "--distributed-timeout-seconds",
        min=1,
        help="Seconds for ranks to meet, and for each collective.",
    ),
]
StepTimeout = Annotated[
    float | None,
    typer.Option(
        "--step-timeout",
        min=1,
        help="Seconds a step may take, if steps of its size took no longer before; default: 10 on CPUs, 60 on GPUs.",
    ),
]
MaxRecoveries = Annotated[
    int, typer.Option("--max-recoveries", min=0, help="Times in 60 s that an engine which died is started again.")
]
Level = Annotated[
    LogLevel,
    typer.Option("--log-level", envvar="APHRO_LOG_LEVEL", help="debug adds tracebacks and the libraries' own logs."),
]


def parse_backend(text: str | None) -> Literal["auto", "mp", "ssh", "ray"]:
    """None -> "auto". Raises UsageError for what is no backend."""
    backends: dict[str | None, Literal["auto", "mp", "ssh", "ray"]]
    backends = {None: "auto", "mp": "mp", "ssh": "ssh", "ray": "ray"}
    if text in backends:
        return backends[text]
    raise UsageError(
        f"--distributed-executor-backend {text} is not a backend; allowed: mp (processes of this host), "
        "ssh (on --hosts), ray (in a cluster)",
        hint="leave the flag out: mp where this host has enough devices, ssh with --hosts, ray in a cluster",
    )


def parse_hosts(text: str | None) -> tuple[HostSlots, ...]:
    """``"a:2,b"`` or a file with such an entry a line -> hosts and devices, 1 where none is named."""
    if text is None:
        return ()
    if Path(text).is_file():
        text = ",".join(line.split("#")[0].strip() for line in Path(text).read_text().splitlines())
    hosts = tuple(_parse_host(entry.strip()) for entry in text.split(",") if entry.strip())
    if not hosts:
        raise UsageError("--hosts names no host", hint="--hosts a:2,b:2 (HOST:DEVICES,...)")
    names = [host.name for host in hosts]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"--hosts names {twice} twice", hint=f"{twice}:DEVICES once, with all its devices")
    return hosts


def _parse_host(entry: str) -> HostSlots:
    if entry.count(":") > 1 and "]" not in entry:
        raise UsageError(f"--hosts entry {entry!r}: brackets belong around an IPv6 address", hint="--hosts [fd00::1]:2")
    name, colon, number = entry.rpartition(":")
    if not colon or entry.endswith("]"):
        name, number = entry, "1"
    if not name or not number.isascii() or not number.isdigit() or not int(number):
        raise UsageError(
            f"--hosts entry {entry!r} is not HOST:DEVICES",
            hint="--hosts a:2,b:2; another port or user of ssh goes into ~/.ssh/config",
        )
    from aphro_core.config import HostSlots

    return HostSlots(name, int(number))


def parse_dtype(text: str) -> Literal["auto", "float32", "bfloat16", "float16"]:
    """The field's other two names for a data type, resolved."""
    dtypes: dict[str, Literal["auto", "float32", "bfloat16", "float16"]] = {
        "auto": "auto",
        "float32": "float32",
        "float": "float32",
        "bfloat16": "bfloat16",
        "float16": "float16",
        "half": "float16",
    }
    return dtypes[text]


def parse_pp_layers(text: str | None) -> tuple[int, ...] | None:
    """``"4,3,3"`` -> (4, 3, 3). Whether they add up to the model's layers is the sharding plan's business."""
    if text is None:
        return None
    try:
        layers = tuple(int(part) for part in text.split(","))
    except ValueError:
        layers = ()
    if not layers or min(layers) < 1:
        raise UsageError(
            f"--pp-layers is {text!r}, allowed: layers of each stage, separated by commas, each 1 and up",
            hint="for example -pp 2 --pp-layers 16,14",
        )
    return layers


def parse_max_model_len(text: str | None) -> int | Literal["auto"] | None:
    """Tokens, or ``auto`` (-1 is the same, as in vLLM)."""
    if text is None:
        return None
    if text in ("auto", "-1"):
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--max-model-len is {text!r}, allowed: 1 and up, or auto", hint="--max-model-len auto")
    return int(text)


def check_access(host: str, api_keys: tuple[str, ...], allow_anonymous: bool) -> None:
    """Refuse to serve beyond this host without a key, and keys that no client could send. Never names a key."""
    for number, key in enumerate(api_keys, start=1):
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise UsageError(
                f"API key {number} of {len(api_keys)} is empty or has characters that a header cannot carry",
                hint="use letters, digits and punctuation without spaces",
            )
    from aphro_core.client.address import is_loopback

    if not (api_keys or allow_anonymous or is_loopback(host)):
        raise UsageError(
            f"--host {host} can be reached from other machines, and there is no API key",
            hint="set APHRO_API_KEY (or --api-key), or accept anybody with --allow-anonymous",
        )


def check_files(chat_template: str | None, json_ready: str | None) -> None:
    """What would fail only after the model is loaded fails now."""
    if chat_template is not None and not (Path(chat_template).is_file() and os.access(chat_template, os.R_OK)):
        raise UsageError(f"--chat-template {chat_template} is not a file that can be read")
    if json_ready is not None:
        file = Path(json_ready).absolute()
        is_free = file.is_file() or not file.exists()  # it is replaced as a whole: no device, no folder
        if not is_free or not os.access(file.parent, os.W_OK):
            raise UsageError(f"--json-ready {json_ready} cannot be written", hint="name a file in a writable folder")


def check_finite(**values: float) -> None:
    """Raise UsageError for a NaN, which passes every comparison with a bound."""
    for name, value in values.items():
        if math.isnan(value):
            raise UsageError(f"--{name.replace('_', '-')} is nan, allowed: a number")


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """A warning for each ``APHRO_*`` variable that nothing reads, with the name that was probably meant."""
    warnings = []
    for name in sorted(environ):
        if name.startswith("APHRO_") and name not in ENVIRONMENT:
            nearest = difflib.get_close_matches(name, ENVIRONMENT, n=1, cutoff=0.0)[0]
            warnings.append(f"{name} is set, but no part of aphro reads it; the nearest known name is {nearest}")
    return warnings
