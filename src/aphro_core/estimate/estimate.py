"""The lead of the room: from a question to the balance of every rank, one answer for one (tp, pp)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

from aphro_core.estimate.aphro_engine import AphroEngine
from aphro_core.estimate.balance import RankBalance, Sizes
from aphro_core.estimate.cards import GIB
from aphro_core.estimate.legality import check_general, check_vllm
from aphro_core.estimate.parameters import RankSlice
from aphro_core.estimate.quantization import SCHEMES
from aphro_core.estimate.question import Question, resolve
from aphro_core.estimate.vllm import AfterSizing, VllmServer
from aphro_core.estimate.weights import weight_bytes
from aphro_core.models.quantization import expands_gguf

_BASE_DOUBT: Final = round(0.35 * GIB)
_OTHER_DOUBT: Final = 0.015  # of the memory of cards that few of the logs are of

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
        """aphro allocates no more than ``max_num_seqs`` requests of the maximum length can use."""
        held = self.limiting.num_blocks
        return held if self.question.version is not None else min(held, self.useful_blocks)

    @property
    def useful_blocks(self) -> int:
        """Blocks that requests can hold at once at most."""
        return self.sizes.max_num_seqs * self.blocks_per_request

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
        return self.limiting.layout.longest_request(self.limiting.num_blocks, self.sizes.max_num_batched_tokens, limit)

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
        return "may_not_start" if missing + self.doubt_bytes(self.short_rank) > 0 else "fits"

    @property
    def dies_after_sizing(self) -> bool:
        return self.after_sizing == "dies"

    @property
    def fits(self) -> bool:
        return self.verdict != "does_not_fit"

    def doubt_bytes(self, balance: RankBalance) -> int:
        """Half the range around what is left for the cache that held the truth in nineteen of twenty published logs.

        aphro's own arithmetic leaves in doubt what a GPU's context takes, on CPUs nothing. An encoder's work space and
        what an inexact scheme left in 16 bit are known no better than to 1 GiB and a tenth, what
        ROCm takes than to 1.5 % of the device.
        """
        question = self.question
        if question.version is None and question.source.spec is not None:
            return 0 if question.device.kind == "cpu" else _BASE_DOUBT
        scheme = SCHEMES[question.scheme.scheme] if question.scheme else None
        has_headers = question.source.tensors is not None and question.quantization is None
        share = 0.002 if has_headers else 0.1 if scheme is not None and not scheme.is_exact else 0.01
        overhead = balance.activation_bytes + balance.overhead_bytes
        encoder = GIB if question.source.facts.tower is not None else 0
        card = question.device.card
        platform = _OTHER_DOUBT * question.device.total_bytes if card is not None and not card.is_nvidia else 0.0
        return round(_BASE_DOUBT + share * balance.weights_bytes + 0.1 * overhead + platform) + encoder

    def _missing(self, balance: RankBalance) -> int:
        needed = max(self.blocks_per_request * self.question.concurrency, 1)
        return int(needed * balance.layout.block_bytes) - balance.left_bytes


def estimate(question: Question, tp: int, pp: int) -> Estimate:
    """The balance of every rank. Raises PlacementError for illegal sizes, UsageError for wrong options."""
    sizes = resolve(question, tp, pp)
    found = _estimate(question, sizes)
    if question.max_model_len == "auto" and found.num_blocks:
        fitted = replace(sizes, max_model_len=min(max(found.longest_request, 1), sizes.max_model_len))
        # aphro's block tables are of the length that was asked for
        found = replace(found, sizes=fitted) if question.version is None else _estimate(question, fitted)
    return found


def _estimate(question: Question, sizes: Sizes) -> Estimate:
    source, device, generation = question.source, question.device, question.generation
    if generation is None:
        spec = source.spec
        if spec is not None and expands_gguf(spec.quantization, question.asked_quantization, sizes.dtype):
            spec = replace(spec, quantization=None)
        if spec is None:
            check_general(source.facts, sizes.tp, sizes.pp, question.scheme, expert_parallel=sizes.expert_parallel)
        engine = AphroEngine(
            spec,
            device.total_bytes,
            device.kind == "cuda",
            device.foreign_bytes,
            device.per_host,
            question.devices_per_host,
            device.slots,
        )
        return Estimate(question, sizes, tuple(engine.balances(source.facts, sizes, question.scheme)))
    is_own = question.quantization is None or question.quantization == source.facts.quantization
    check_vllm(
        source.facts,
        sizes.tp,
        sizes.pp,
        question.scheme if is_own else None,
        expert_parallel=sizes.expert_parallel,
    )
    server = VllmServer(
        generation=generation,
        card=device.card,
        total_bytes=device.total_bytes,
        facts=source.facts,
        sizes=sizes,
        quantization=question.scheme,
        tensors=source.tensors if is_own else None,
        stated_share=_stated_share(question),
    )
    ranks = tuple(server.balances())
    ends = {server.after_sizing(balance) for balance in ranks}
    worst: AfterSizing = "dies" if "dies" in ends else "may_die" if "may_die" in ends else "starts"
    return Estimate(question, sizes, ranks, worst)


def _stated_share(question: Question) -> float:
    """The size that a weight index states, as a multiple of what its config and scheme say; 1 where none is."""
    source = question.source
    if source.tensors is not None or source.file_bytes is None or question.quantization is not None:
        return 1.0
    whole = RankSlice(range(source.facts.num_layers), 0, 1, True, True)
    share = source.file_bytes / weight_bytes(source.facts, whole, source.facts.dtype, source.facts.quantization)
    return share if 0.5 < share < 2.0 else 1.0  # beyond, the index is of something else
