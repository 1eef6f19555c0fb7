"""The lead of the room: from a question to the balance of every rank, one answer for one (tp, pp)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from aphro_core.errors import PlacementError
from aphro_core.estimate.aphro_engine import AphroEngine
from aphro_core.estimate.balance import RankBalance, Sizes
from aphro_core.estimate.question import Question, resolve
from aphro_core.estimate.vllm import AfterSizing, VllmEngine, illegal_reasons

Verdict = Literal["fits", "may_not_start", "does_not_fit"]


@dataclass(frozen=True)
class Estimate:
    """The answer for one (tp, pp). ``sizes`` are those that were used, defaults and fitted length included."""

    question: Question
    sizes: Sizes
    ranks: tuple[RankBalance, ...]
    after_sizing: AfterSizing = "starts"

    @property
    def limiting(self) -> RankBalance:
        """The rank with the fewest blocks, the first of equals."""
        return min(self.ranks, key=lambda balance: (balance.num_blocks, balance.left_bytes, balance.rank))

    @property
    def num_blocks(self) -> int:
        return self.limiting.num_blocks

    @property
    def tokens(self) -> int:
        """What the server prints as its cache's size: blocks x block size, but for hybrids."""
        length, batch = self.sizes.max_model_len, self.sizes.max_num_batched_tokens
        return self.limiting.layout.printed_tokens(self.num_blocks, length, batch)

    @property
    def blocks_per_request(self) -> int:
        """That a request of the maximum length needs; the same number on every rank, of blocks of different sizes."""
        return max(
            balance.layout.blocks_per_request(self.sizes.max_model_len, self.sizes.max_num_batched_tokens)
            for balance in self.ranks
        )

    @property
    def max_concurrency(self) -> float:
        """Requests of the maximum length at once."""
        return self.num_blocks / self.blocks_per_request

    @property
    def longest_request(self) -> int:
        """Tokens of the largest single request, up to the model's own limit."""
        limit = max(self.sizes.max_model_len, self.question.source.facts.max_position_embeddings)
        return self.limiting.layout.longest_request(self.num_blocks, self.sizes.max_num_batched_tokens, limit)

    @property
    def missing_bytes(self) -> int:
        """On the rank that lacks most, for one request of the maximum length (or the wanted number of them)."""
        return max(self._missing(balance) for balance in self.ranks)

    @property
    def short_rank(self) -> RankBalance:
        """The rank that lacks most."""
        return max(self.ranks, key=lambda balance: (self._missing(balance), -balance.rank))

    @property
    def verdict(self) -> Verdict:
        """``may_not_start`` where the range of the estimate straddles one request, or the start is short afterwards."""
        missing = self.missing_bytes
        if missing > 0 or self.dies_after_sizing:
            return "does_not_fit"
        if self.after_sizing == "may_die":
            return "may_not_start"
        is_exact = self.question.version is None and self.question.device.kind == "cpu"
        doubt = 0 if is_exact else self.short_rank.doubt_bytes
        return "may_not_start" if missing + doubt > 0 else "fits"

    @property
    def dies_after_sizing(self) -> bool:
        return self.after_sizing == "dies"

    @property
    def fits(self) -> bool:
        return self.verdict != "does_not_fit"

    def _missing(self, balance: RankBalance) -> int:
        needed = max(self.blocks_per_request * self.question.concurrency, 1)
        return int(needed * balance.layout.block_bytes) - balance.left_bytes


def estimate(question: Question, tp: int, pp: int) -> Estimate:
    """The balance of every rank. Raises PlacementError for illegal sizes, UsageError for wrong options."""
    sizes = resolve(question, tp, pp)
    found = _estimate(question, sizes)
    if question.max_model_len == "auto" and found.num_blocks:
        length = min(max(found.longest_request, 1), sizes.max_model_len)
        found = _estimate(question, replace(sizes, max_model_len=length))
    return found


def _estimate(question: Question, sizes: Sizes) -> Estimate:
    source, device = question.source, question.device
    if question.version is None:
        engine = AphroEngine(source.spec, device.total_bytes, device.kind == "cuda")
        if source.spec is None:
            _check_general(question, sizes)
        return Estimate(question, sizes, tuple(engine.balances(source.facts, sizes, question.scheme)))
    reasons = illegal_reasons(source.facts, sizes.tp, sizes.pp, question.scheme)
    if reasons:
        raise PlacementError(
            f"vLLM refuses tensor parallel {sizes.tp} x pipeline parallel {sizes.pp}: {'; '.join(reasons)}",
            hint="leave -tp and -pp out: aphro estimate lists the sizes that are legal",
        )
    generation = question.generation
    assert generation is not None
    server = VllmEngine(generation, device.card, device.total_bytes)
    overridden = question.quantization is not None and question.quantization != source.facts.quantization
    tensors = None if overridden else source.tensors
    ranks = tuple(server.balances(source.facts, sizes, question.scheme, tensors))
    ends = {server.after_sizing(source.facts, sizes, balance) for balance in ranks}
    worst: AfterSizing = "dies" if "dies" in ends else "may_die" if "may_die" in ends else "starts"
    return Estimate(question, sizes, ranks, worst)


def _check_general(question: Question, sizes: Sizes) -> None:
    """The legality of aphro's rules for a model that it does not run yet: whole heads, whole groups of columns."""
    facts = question.source.facts
    group = (question.scheme.group_size or 1) if question.scheme else 1
    limits = {"query heads": facts.num_heads}
    for mlp in {layer.mlp for layer in facts.layers}:
        limits[f"MLP columns in groups of {group}"] = mlp.intermediate_size // group
    for what, number in limits.items():
        if sizes.tp > number:
            raise PlacementError(
                f"tensor_parallel_size is {sizes.tp}, but {facts.architecture} has {number} {what} and each rank "
                f"needs one, allowed: 1 to {number}",
                hint=f"-tp {number}, and -pp for more devices",
            )
    if sizes.pp > facts.num_layers:
        raise PlacementError(
            f"pipeline_parallel_size is {sizes.pp}, but the model has {facts.num_layers} layers, "
            f"allowed: 1 to {facts.num_layers}",
            hint=f"-pp {facts.num_layers}",
        )
