"""An estimate as data for scripts: stable keys, units in the names."""

from __future__ import annotations

from typing import Any, Final

from aphro_core.estimate.estimate import Estimate
from aphro_core.estimate.planner import Plan, closeness, shortage
from aphro_core.estimate.remedies import Remedy
from aphro_core.estimate.speed import ceilings, host_load

CONSTANTS_OF: Final = "2026-11"  # when the constants of engines and cards were last compared with logs


def build_report(found: Estimate, plans: list[Plan], ways_out: list[Remedy]) -> dict[str, Any]:
    """The record that ``--json`` prints. Keys may be added, never changed."""
    question, sizes, limiting = found.question, found.sizes, found.limiting
    load, speed = host_load(found), ceilings(found)
    doubt = found.doubt_bytes(limiting)
    low = max((limiting.left_bytes - doubt) // limiting.layout.block_bytes, 0)
    high = max((limiting.left_bytes + doubt) // limiting.layout.block_bytes, 0)
    return {
        "model": question.source.name,
        "architecture": question.source.facts.architecture,
        "engine": question.engine,
        "block_size": sizes.block_size,
        "num_blocks": found.num_blocks,
        "tokens": found.tokens,
        "max_concurrency": round(found.max_concurrency, 2),
        "longest_request_tokens": found.longest_request,
        "limiting_rank": limiting.rank,
        "per_rank": [_rank(found, index) for index in range(len(found.ranks))],
        "fits": found.fits,
        "verdict": found.verdict,
        "missing_bytes": max(found.missing_bytes, 0),
        "reason": None if found.verdict == "fits" else closeness(found) if found.fits else shortage(found),
        "num_blocks_range": [low, high],
        "plans": [_plan(plan) for plan in plans],
        "remedies": [{"flags": way.flags, "cost": way.cost, "tokens": way.tokens} for way in ways_out],
        "settings": {
            "tensor_parallel_size": sizes.tp,
            "pipeline_parallel_size": sizes.pp,
            "dtype": sizes.dtype,
            "quantization": question.scheme.scheme if question.scheme else None,
            "kv_cache_element_bytes": sizes.cache_bytes,
            "max_model_len": sizes.max_model_len,
            "max_num_batched_tokens": sizes.max_num_batched_tokens,
            "max_num_seqs": sizes.max_num_seqs,
            "memory_utilization": sizes.utilization,
            "enforce_eager": sizes.enforce_eager,
            "device_kind": question.device.kind,
            "device_name": question.device.card.name if question.device.card else None,
            "device_bytes": question.device.total_bytes,
        },
        "host": {
            "num_hosts": load.num_hosts,
            "read_bytes_per_host": load.read_bytes,
            "peak_memory_bytes_per_host": load.peak_bytes,
        },
        "ceilings": {
            "kv_cache_bytes_per_token": speed.kv_bytes_per_token,
            "decode_tokens_per_second": _rounded(speed.decode_tokens_per_s),
            "full_batch_tokens_per_second": _rounded(speed.full_batch_tokens_per_s),
            "prefill_tokens_per_second": _rounded(speed.prefill_tokens_per_s),
        },
        "weights_from": "file headers" if question.source.tensors is not None else "config",
        "assumed": assumptions(found),
        "constants_of": CONSTANTS_OF,
    }


def illegal_report(model: str, engine: str, block_size: int, reason: str, plans: list[Plan]) -> dict[str, Any]:
    """The same keys where the sizes that were asked for are refused."""
    return {
        "model": model,
        "engine": engine,
        "block_size": block_size,
        "num_blocks": 0,
        "tokens": 0,
        "max_concurrency": 0.0,
        "limiting_rank": None,
        "per_rank": [],
        "fits": False,
        "verdict": "illegal",
        "reason": reason,
        "plans": [_plan(plan) for plan in plans],
    }


def assumptions(found: Estimate) -> list[str]:
    """What the answer rests on besides exact arithmetic, a sentence each."""
    question, source = found.question, found.question.source
    notes = list(source.facts.assumed)
    if question.version is not None and question.version.assumed:
        notes.append(question.version.assumed)
    if question.version is None and source.spec is None and source.refusal:
        notes.append(f"this version of aphro does not run the model: {source.refusal}")
    if question.version is not None and question.quantization is not None:
        notes.append("the quantised checkpoint is taken to have the config's sizes, padded to whole groups")
    if question.version is not None and source.tensors is None and question.scheme is not None:
        notes.append("what the quantised checkpoint leaves in 16 bit is taken from its scheme; file headers would tell")
    if source.facts.tower is not None:
        notes.append("the encoder's work space is a guess within 1 GiB")
    card = question.device.card
    if card is not None and not card.is_nvidia:
        notes.append(f"{card.name} is an AMD card: the constants of kernels and communicators are those of NVIDIA's")
        if question.version is None:
            notes.append("aphro has not been tried on AMD cards")
    if question.device.origin:
        notes.append(question.device.origin)
    if found.num_blocks < found.limiting.num_blocks:
        notes.append(
            f"{found.sizes.max_num_seqs:,} requests of {found.sizes.max_model_len:,} tokens use no more blocks; "
            f"the memory would hold {found.limiting.num_blocks:,} (--max-num-seqs, --max-model-len)"
        )
    if len(found.limiting.layout.groups) > 1:
        notes.append(
            "the server's token figure divides by all groups of layers; concurrency and the longest request count"
        )
    return notes


def _rank(found: Estimate, index: int) -> dict[str, Any]:
    balance = found.ranks[index]
    return {
        "rank": balance.rank,
        "stage": balance.stage,
        "tp_rank": balance.tp_rank,
        "num_layers": len(balance.layers),
        "num_heads": balance.num_heads,
        "num_kv_heads": balance.num_kv_heads,
        "budget_bytes": balance.budget_bytes,
        "weights_bytes": balance.weights_bytes,
        "kv_bytes": max(balance.left_bytes, 0),
        "activation_bytes": balance.activation_bytes,
        "overhead_bytes": balance.overhead_bytes,
        "after_sizing_bytes": balance.after_sizing_bytes,
        "block_bytes": balance.layout.block_bytes,
        "num_blocks": balance.num_blocks,
    }


def _plan(plan: Plan) -> dict[str, Any]:
    found = plan.found
    return {
        "tp": plan.tp,
        "pp": plan.pp,
        "legal": found is not None,
        "reason": plan.reason,
        "num_blocks": found.num_blocks if found else 0,
        "tokens": found.tokens if found else 0,
        "max_concurrency": round(found.max_concurrency, 2) if found else 0.0,
        "fits": found.fits if found else False,
        "recommended": plan.recommended,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)
