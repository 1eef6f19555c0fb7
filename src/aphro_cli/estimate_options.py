"""The options of ``aphro estimate``: those of ``run`` where they mean the same, and the question's own."""

from __future__ import annotations

import re
from typing import Annotated, Final

import typer

from aphro_core.errors import UsageError

_UNITS: Final = {"": 2**30, "g": 2**30, "gib": 2**30, "gb": 10**9, "m": 2**20, "mib": 2**20, "mb": 10**6, "tib": 2**40}

Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="A folder, a config.json, a .gguf file or a Hugging Face id (headers only)."),
]
TensorParallelSize = Annotated[
    int | None,
    typer.Option("--tensor-parallel-size", "-tp", min=1, help="Ranks that share each layer; default: all are tried."),
]
PipelineParallelSize = Annotated[
    int | None, typer.Option("--pipeline-parallel-size", "-pp", min=1, help="Stages; default: all are tried.")
]
Gpu = Annotated[
    str | None,
    typer.Option("--gpu", metavar="NAME", help="A card, such as H200 or 4090; default: this host."),
]
GpuMemory = Annotated[
    str | None,
    typer.Option("--gpu-memory", "--gpu-mem", metavar="SIZE", help="Memory of one device, such as 24GiB or 79.2."),
]
MaxGpus = Annotated[
    int | None, typer.Option("--max-gpus", min=1, max=256, help="Devices that plans may use; default: a host's.")
]
OfCluster = Annotated[bool, typer.Option("--cluster", help="The devices of the cluster that this host has joined.")]
GpusPerNode = Annotated[int, typer.Option("--gpus-per-node", min=1, help="Devices of one host.")]
Engine = Annotated[
    str,
    typer.Option("--engine", metavar="aphro|vllm:VERSION", help="Whose figures: aphro's, or a vLLM's of that version."),
]
DType = Annotated[
    str, typer.Option("--dtype", metavar="auto|float32|bfloat16|float16", help="Data type of weights; auto: as stored.")
]
KvCacheDType = Annotated[
    str, typer.Option("--kv-cache-dtype", metavar="auto|float16|bfloat16|fp8", help="Of the cache; auto: as --dtype.")
]
Quantization = Annotated[
    str | None,
    typer.Option("--quantization", "-q", metavar="SCHEME", help="fp8, awq-int4, ... instead of the config's."),
]
MaxNumSeqs = Annotated[
    int | None, typer.Option("--max-num-seqs", min=1, help="Sequences in one step; default: the engine's.")
]
MaxNumBatchedTokens = Annotated[
    int | None, typer.Option("--max-num-batched-tokens", min=1, help="Tokens in one step; default: the engine's.")
]
Utilization = Annotated[
    float | None,
    typer.Option("--gpu-memory-utilization", "-gmu", help="Share of the device's memory; default: the engine's."),
]
BlockSize = Annotated[int, typer.Option("--block-size", min=1, max=1024, help="Tokens in a KV block.")]
EnforceEager = Annotated[bool, typer.Option("--enforce-eager", help="Without CUDA graphs.")]
EnableLora = Annotated[bool, typer.Option("--enable-lora", help="With room for one adapter, or --max-loras.")]
MaxLoras = Annotated[int | None, typer.Option("--max-loras", min=1, help="Adapters at once.")]
MaxLoraRank = Annotated[int, typer.Option("--max-lora-rank", min=1, help="Rank of the largest adapter.")]
PrefixCaching = Annotated[
    bool | None,
    typer.Option(
        "--enable-prefix-caching/--no-enable-prefix-caching",
        help="Matters for linear-attention hybrids: two states a request instead of one.",
    ),
]
DraftLayers = Annotated[
    int, typer.Option("--draft-layers", min=0, help="Attention layers that a draft model adds to the cache.")
]
NumSpeculativeTokens = Annotated[
    int, typer.Option("--num-speculative-tokens", min=0, help="Tokens that a draft proposes a step.")
]
Concurrency = Annotated[
    float, typer.Option("--concurrency", min=0.01, help="Requests of the maximum length that must fit at once.")
]
Compare = Annotated[
    str | None,
    typer.Option("--compare", metavar="A,B", help="Two models, or two plans of MODEL such as 4x1,2x2 (tp x pp)."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def parse_memory(text: str) -> int:
    """``24GiB``, ``24``, ``79.19`` (GiB), ``81559MiB``, ``24GB`` -> bytes. Raises UsageError."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)", text.strip())
    if not found or found[2].lower() not in _UNITS or float(found[1]) <= 0:
        raise UsageError(f"--gpu-memory is {text!r}, allowed: a number of GiB, or with MiB, GiB, GB", hint="24GiB")
    return round(float(found[1]) * _UNITS[found[2].lower()])


def parse_plan(text: str) -> tuple[int, int] | None:
    """``4x2``, ``tp4pp2``, ``tp4`` -> (tp, pp); None for what can only be a model."""
    found = re.fullmatch(r"(\d{1,3})x(\d{1,3})", text) or re.fullmatch(r"tp(\d{1,3})(?:[x-]?pp(\d{1,3}))?", text)
    return (int(found[1]), int(found[2] or 1)) if found else None


def split_pair(text: str) -> tuple[str, str]:
    """The two sides of ``--compare``. Raises UsageError."""
    sides = [part.strip() for part in text.split(",")]
    if len(sides) != 2 or not all(sides):
        raise UsageError(f"--compare is {text!r}, allowed: two models or two plans", hint="--compare 4x1,2x2")
    return sides[0], sides[1]
