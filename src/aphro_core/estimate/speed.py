"""What hardware allows at best: decode and prefill ceilings, bytes that hosts read and hold while loading."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Final

from aphro_core.estimate.estimate import Estimate
from aphro_core.estimate.kv_layout import KvLayout
from aphro_core.estimate.parameters import RankSlice, rank_matrices
from aphro_core.estimate.weights import DTYPE_BYTES

GIB: Final = 2**30
_PROCESS_BYTES: Final = round(1.2 * GIB)  # Python, torch and its libraries in one worker, before weights
_READ_CHUNK: Final = 16 * 2**20  # bytes that a reader holds at once (checkpoint/safetensors.py: 2^22 elements)


@dataclass(frozen=True)
class Ceilings:
    """Tokens a second that bandwidth and arithmetic allow at best; None where the device's rates are unknown.

    ``decode_tokens_per_s`` of one request with an empty cache; ``full_batch_tokens_per_s`` of as many requests of the
    maximum length as fit; ``prefill_tokens_per_s`` by the data sheet's 16-bit rate.
    """

    kv_bytes_per_token: int
    decode_tokens_per_s: float | None
    full_batch_tokens_per_s: float | None
    prefill_tokens_per_s: float | None


@dataclass(frozen=True)
class HostLoad:
    """Of one host while the model loads: bytes it reads from disk, and bytes of memory at the peak."""

    num_hosts: int
    read_bytes: int
    peak_bytes: int


def ceilings(found: Estimate) -> Ceilings:
    """A decode step reads every active weight and the cache once: time = bytes / bandwidth, stage after stage."""
    facts, sizes, card = found.question.source.facts, found.sizes, found.question.device.card
    per_token = sum(_bytes_per_token(balance.layout) for balance in found.ranks)
    if card is None:
        return Ceilings(round(per_token), None, None, None)
    active, alone, batched = 0.0, 0.0, 0.0
    share = _active_share(found)
    requests = max(min(found.max_concurrency, sizes.max_num_seqs), 1.0)
    for stage in range(sizes.pp):
        ranks = [balance for balance in found.ranks if balance.stage == stage]
        weights = max(balance.weights_bytes for balance in ranks)
        cache = max(max(balance.left_bytes, 0) for balance in ranks)
        alone += weights * share / (card.bandwidth_gb * 1e9)
        batched += (weights * min(1.0, share * requests) + cache) / (card.bandwidth_gb * 1e9)
        active += sum(balance.weights_bytes for balance in ranks) * share
    parameters = active / _bytes_per_parameter(found)
    devices = sizes.tp * sizes.pp
    return Ceilings(
        kv_bytes_per_token=round(per_token),
        decode_tokens_per_s=1 / alone if alone else None,
        full_batch_tokens_per_s=requests / batched if batched and facts.num_layers else None,
        prefill_tokens_per_s=devices * card.tflops * 1e12 / (2 * parameters) if parameters else None,
    )


def _bytes_per_token(layout: KvLayout) -> float:
    """Of a long request on one rank: windows and states stop growing."""
    growing = [group for group in layout.groups if group.kind == "full" or layout.num_groups == 1]
    return sum(group.count * layout.block_bytes / (group.block_tokens or layout.block_tokens) for group in growing)


def host_load(found: Estimate) -> HostLoad:
    """Every rank reads its own slices, so a host reads what its ranks hold (of the files' bytes, if they are known).

    On GPUs the host holds the worker processes and one chunk each; on CPUs weights and cache too.
    """
    question, devices = found.question, found.sizes.tp * found.sizes.pp
    num_hosts = ceil(devices / question.devices_per_host) if question.device.kind == "cuda" else 1
    on_first = found.ranks[: ceil(devices / num_hosts)]
    held = sum(balance.weights_bytes for balance in on_first)
    whole = sum(balance.weights_bytes for balance in found.ranks)
    file_bytes = question.source.file_bytes
    read = round(file_bytes * held / whole) if file_bytes and whole else held
    peak = len(on_first) * (_PROCESS_BYTES + _READ_CHUNK)
    if question.device.kind == "cpu":
        peak += sum(balance.weights_bytes + max(balance.left_bytes, 0) for balance in on_first)
    return HostLoad(num_hosts, read, peak)


def _active_share(found: Estimate) -> float:
    """The share of the weights that one token uses: of experts only those it is sent to."""
    facts = found.question.source.facts
    matrices = rank_matrices(facts, RankSlice(range(facts.num_layers), 0, 1, True, True))
    total = sum(matrix.count * matrix.elements for matrix in matrices)
    experts = sum(matrix.count * matrix.elements for matrix in matrices if matrix.precision == "experts")
    embedding = 0 if facts.tie_word_embeddings else facts.vocab_size * facts.hidden_size  # one row of it is read
    most = max((layer.mlp for layer in facts.layers), key=lambda mlp: mlp.num_experts)
    used = most.experts_per_token / most.num_experts if most.num_experts else 1.0
    return (total - experts - embedding + experts * used) / total


def _bytes_per_parameter(found: Estimate) -> float:
    facts = found.question.source.facts
    matrices = rank_matrices(facts, RankSlice(range(facts.num_layers), 0, 1, True, True))
    total = sum(matrix.count * matrix.elements for matrix in matrices)
    weights = sum(balance.weights_bytes for balance in found.ranks)
    return weights / total if total else float(DTYPE_BYTES[found.sizes.dtype])
