"""What is asked of an estimate, and the defaults that fill in what was left open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from aphro_core.errors import PlacementError, UsageError
from aphro_core.estimate.balance import Sizes
from aphro_core.estimate.cards import Card
from aphro_core.estimate.facts import ModelFacts, QuantizationFacts
from aphro_core.estimate.vllm_versions import Generation, Version, batch_defaults, parse_version
from aphro_core.estimate.weights import DTYPE_BYTES, StoredTensor
from aphro_core.models.spec import DecoderSpec
from aphro_core.parallel.shard import build_plan
from aphro_core.parallel.step_sizes import (
    CPU_TOKENS,
    GPU_PREFILL_TOKENS,
    MAX_NUM_SEQS,
    default_step_sizes,
    parameters_on_the_way,
)

CACHE_DTYPES: Final[dict[str, int | None]] = {
    "auto": None,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "half": 2,
    "fp8": 1,
    "fp8_e4m3": 1,
    "fp8_e5m2": 1,
    "int8": 1,
}


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """The device of each rank. ``total_bytes`` as its driver reports it; on CPUs the host's free memory, shared by its
    ranks: all, or ``per_host`` at most. ``count`` that are there, None for a card that is only named."""

    kind: Literal["cuda", "cpu"]
    total_bytes: int
    card: Card | None = None
    foreign_bytes: int = 0  # that other processes hold now
    count: int | None = None
    per_host: int | None = None  # None: all are of one host
    slots: tuple[int, ...] = ()  # devices of each host, where they are known
    origin: str = "named"  # where the figures come from, for the reader


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model as far as its config and file headers tell. ``spec`` None: aphro does not run it, for the reason in
    ``refusal``."""

    name: str
    facts: ModelFacts
    spec: DecoderSpec | None = None
    refusal: str | None = None
    tensors: Sequence[StoredTensor] | None = None
    file_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Question:
    """Everything that was typed; None is the engine's default."""

    source: ModelSource
    device: DeviceFacts
    version: Version | None = None  # of vLLM; None = aphro
    tp: int | None = None
    pp: int | None = None
    pp_layers: tuple[int, ...] | None = None
    max_devices: int = 8
    devices_per_host: int = 8
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    quantization: QuantizationFacts | None = None  # instead of the checkpoint's own
    asked_quantization: str | None = None  # the same as it was typed
    max_model_len: int | Literal["auto"] | None = None
    max_num_batched_tokens: int | None = None
    max_num_prefill_tokens: int | None = None  # aphro: of a step in which nothing decodes
    max_num_seqs: int | None = None
    block_size: int = 16
    utilization: float | None = None
    enforce_eager: bool = False
    expert_parallel: bool = False
    max_loras: int = 0
    max_lora_rank: int = 16
    prefix_caching: bool | None = None
    draft_layers: int = 0
    draft_tokens: int = 0
    concurrency: float = 1.0  # requests of max_model_len that must fit at once

    @property
    def engine(self) -> str:
        return "aphro" if self.version is None else f"vllm:{self.version.text}"

    @property
    def generation(self) -> Generation | None:
        """Of the server that is imitated; None for aphro."""
        if self.version is None:
            return None
        return self.version.for_model(self.source.facts.model_type).generation(self.device.card)

    @property
    def scheme(self) -> QuantizationFacts | None:
        """The quantisation that counts."""
        return self.quantization or self.source.facts.quantization


def parse_engine(text: str) -> Version | None:
    """``aphro`` -> None, ``vllm:0.19.0`` or ``vllm`` -> its version. Raises UsageError."""
    name, _, version = text.strip().partition(":")
    if name == "aphro" and not version:
        return None
    if name in ("vllm", "aphrodite"):
        return parse_version(version)
    raise UsageError(f"--engine is {text!r}, allowed: aphro, vllm, vllm:VERSION", hint="--engine vllm:0.19.0")


def resolve(question: Question, tp: int, pp: int) -> Sizes:
    """All sizes, the engine's defaults filled in, for one (tp, pp).

    With ``--max-model-len auto`` the length is the model's own: the caller fits it. T is cut to S x M, S to T, as
    servers do. Raises UsageError.
    """
    facts = question.source.facts
    dtype = _dtype(question)
    limit = facts.max_position_embeddings
    length = limit if question.max_model_len in (None, "auto") else int(question.max_model_len or limit)
    tokens, seqs = CPU_TOKENS, MAX_NUM_SEQS[question.device.kind]
    utilization = 0.90 if question.device.kind == "cuda" else 0.50
    generation = question.generation
    if question.version is not None and generation is not None:
        tokens, seqs = batch_defaults(question.version, generation, question.device.card, length)
        utilization = generation.utilization
    tokens, seqs = question.max_num_batched_tokens or tokens, question.max_num_seqs or seqs
    if question.version is None:
        tokens = _largest_step(question, tp, pp)
    if question.max_num_batched_tokens is None and question.version is not None:
        tokens = min(tokens, seqs * length)
    cache_bytes = CACHE_DTYPES.get(question.kv_cache_dtype, 0)
    if cache_bytes == 0:
        raise UsageError(f"--kv-cache-dtype is {question.kv_cache_dtype!r}, allowed: {', '.join(CACHE_DTYPES)}")
    if question.version is None and question.kv_cache_dtype in ("fp8_e5m2", "int8"):
        raise UsageError(
            f"--kv-cache-dtype is {question.kv_cache_dtype}, which aphro does not have; allowed: auto, fp8, fp8_e4m3",
            hint="--kv-cache-dtype fp8, or --engine vllm for another's figures",
        )
    return Sizes(
        tp=tp,
        pp=pp,
        pp_layers=question.pp_layers,
        dtype=dtype,
        cache_bytes=cache_bytes or DTYPE_BYTES[dtype],
        block_size=question.block_size,
        max_model_len=length,
        max_num_batched_tokens=tokens,
        max_num_seqs=min(seqs, tokens),
        utilization=question.utilization if question.utilization is not None else utilization,
        enforce_eager=question.enforce_eager,
        expert_parallel=question.expert_parallel,
        max_loras=question.max_loras,
        max_lora_rank=question.max_lora_rank,
        prefix_caching=question.prefix_caching,
        draft_layers=question.draft_layers,
        draft_tokens=question.draft_tokens,
    )


def _largest_step(question: Question, tp: int, pp: int) -> int:
    """Tokens of any of aphro's steps."""
    asked, device = question.max_num_batched_tokens, question.device.kind
    parameters = _parameters(question, tp, pp) if device == "cuda" else 0
    if parameters is None:
        return max(asked or 0, question.max_num_prefill_tokens or GPU_PREFILL_TOKENS)
    sizes = default_step_sizes(device, parameters, pp, asked)
    return max(sizes.decode_tokens, question.max_num_prefill_tokens or sizes.prefill_tokens)


def _parameters(question: Question, tp: int, pp: int) -> int | None:
    """That a token meets one after the other; None of a model without a spec, or of ranks that it cannot have, which
    whoever asks for their balance is told."""
    if question.source.spec is None:
        return None
    try:
        plan = build_plan(question.source.spec, tp, pp, question.pp_layers, expert_parallel=question.expert_parallel)
    except PlacementError:
        return None
    return parameters_on_the_way(question.source.spec, plan)


def _dtype(question: Question) -> str:
    """``auto``: the checkpoint's, float32 checkpoints as bfloat16 (vLLM and aphro on GPUs take 16 bit)."""
    if question.dtype != "auto":
        return question.dtype
    found = question.source.facts.dtype
    return "bfloat16" if found == "float32" else found
