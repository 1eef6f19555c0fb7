"""What to change when a model does not fit: each way checked by the same arithmetic, the cheapest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from aphro_core.errors import AphroError
from aphro_core.estimate.cards import CARDS
from aphro_core.estimate.estimate import Estimate, estimate
from aphro_core.estimate.facts import QuantizationFacts
from aphro_core.estimate.planner import plan_one
from aphro_core.estimate.question import Question

_MOST_DEVICES: Final = 64
_SEQS: Final = (256, 128, 64, 32, 16)


@dataclass(frozen=True)
class Remedy:
    """``flags`` that can be pasted behind the command; ``cost`` in words; ``tokens`` that fit then."""

    flags: str
    cost: str
    tokens: int


def remedies(found: Estimate, *, most: int = 3) -> list[Remedy]:
    """The cheapest ``most`` changes with which it fits, one of each kind, in the order of what they cost a user.

    Where it may not start, those with which it surely does.
    """
    wanted = ("fits",) if found.fits else ("fits", "may_not_start")
    result: list[Remedy] = []
    for make in (
        _fewer_seqs,
        _fewer_tokens,
        _cache_dtype,
        _shorter,
        _utilization,
        _eager,
        _devices,
        _quantized,
        _other_card,
    ):
        for flags, cost, question, tp, pp in make(found):
            try:
                tried = estimate(question, tp, pp)
            except AphroError:
                continue
            if tried.verdict in wanted:
                result.append(Remedy(flags, cost, tried.tokens))
                break
        if len(result) == most:
            break
    return result


_Candidate = tuple[str, str, Question, int, int]


def _changed(found: Estimate, flags: str, cost: str, **changes: Any) -> _Candidate:
    return flags, cost, replace(found.question, **changes), found.sizes.tp, found.sizes.pp


def _fewer_seqs(found: Estimate) -> Iterator[_Candidate]:
    for seqs in _SEQS:
        if seqs < found.sizes.max_num_seqs:
            yield _changed(found, f"--max-num-seqs {seqs}", "fewer requests in one step", max_num_seqs=seqs)


def _fewer_tokens(found: Estimate) -> Iterator[_Candidate]:
    for tokens in (4096, 2048, 1024, 512):
        if tokens < found.sizes.max_num_batched_tokens:
            flags = f"--max-num-batched-tokens {tokens}"
            changes = {"max_num_batched_tokens": tokens}
            if found.question.version is None:
                flags += f" --max-num-prefill-tokens {tokens}"
                changes["max_num_prefill_tokens"] = tokens
            yield _changed(found, flags, "prompts in smaller chunks", **changes)


def _cache_dtype(found: Estimate) -> Iterator[_Candidate]:
    if found.sizes.cache_bytes > 1:
        yield _changed(found, "--kv-cache-dtype fp8", "a less precise cache", kv_cache_dtype="fp8")


def _shorter(found: Estimate) -> Iterator[_Candidate]:
    length = min(found.longest_request, found.sizes.max_model_len)
    while length >= 512:
        rounded = length // 256 * 256
        yield _changed(found, f"--max-model-len {rounded}", "shorter requests", max_model_len=rounded)
        length = rounded * 3 // 4


def _utilization(found: Estimate) -> Iterator[_Candidate]:
    for share in (0.92, 0.95):
        if share > found.sizes.utilization and found.question.device.kind == "cuda":
            yield _changed(found, f"-gmu {share}", "less room for other processes", utilization=share)
    if found.dies_after_sizing:
        for share in (0.92, 0.9, 0.85):
            if share < found.sizes.utilization:
                yield _changed(found, f"-gmu {share}", "a smaller cache, room for graphs", utilization=share)


def _eager(found: Estimate) -> Iterator[_Candidate]:
    if found.question.device.kind == "cuda" and not found.sizes.enforce_eager:
        yield _changed(found, "--enforce-eager", "slower decoding", enforce_eager=True)


def _devices(found: Estimate) -> Iterator[_Candidate]:
    """The fewest devices more; inside a host by tensor parallel, then by stages."""
    now = found.sizes.tp * found.sizes.pp
    spread = _fewest(found.question, now + 1)
    if spread is not None:
        tp, pp = spread
        yield f"-tp {tp} -pp {pp}", f"{tp * pp} devices instead of {now}", found.question, tp, pp


def _quantized(found: Estimate) -> Iterator[_Candidate]:
    """Fewer bits a weight, on as few devices as hold them then."""
    if found.question.version is None or found.question.scheme is not None:
        return
    for scheme, words in (("fp8", "8-bit weights"), ("awq-int4", "a 4-bit checkpoint")):
        question = replace(found.question, quantization=QuantizationFacts(scheme=scheme))
        spread = _fewest(question, found.sizes.tp * found.sizes.pp)
        if spread is not None:
            tp, pp = spread
            yield f"-q {scheme} -tp {tp} -pp {pp}", f"{words}, {tp * pp} devices", question, tp, pp


def _other_card(found: Estimate) -> Iterator[_Candidate]:
    """The smallest larger card of which as many hold it."""
    question, devices = found.question, found.sizes.tp * found.sizes.pp
    least = question.device.total_bytes
    larger = [card for card in CARDS if card.total_bytes > least and card.capability >= 8.0 and card.is_nvidia]
    for card in sorted(larger, key=lambda card: card.total_bytes):
        device = replace(question.device, total_bytes=card.total_bytes, card=card, foreign_bytes=0, origin="")
        asked = replace(question, device=device)
        spread = _fewest(asked, 1, most=devices)
        if spread is not None and question.device.kind == "cuda":
            tp, pp = spread
            yield f"--gpu '{card.name}' -tp {tp} -pp {pp}", f"{tp * pp} of a larger card", asked, tp, pp


def _fewest(question: Question, devices: int, most: int = _MOST_DEVICES) -> tuple[int, int] | None:
    """The first (tp, pp) from so many devices on that fits, as wide inside a host as it goes."""
    for count in range(devices, most + 1):
        for tp in range(min(question.devices_per_host, count), 0, -1):
            if count % tp == 0:
                plan = plan_one(question, tp, count // tp)
                if plan.found is not None and plan.found.fits:
                    return tp, count // tp
    return None
