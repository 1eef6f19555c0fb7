"""Logits to tokens: one step of the last stage's tp rank 0, all rows at once, each step only for rows that ask.

Order, as in vLLM: logit_bias and the min_tokens mask, repetition, frequency and presence penalties, temperature, min_p,
top_k, top_p, draw. A drawn token is a function of (seed, position) and the row's logits alone (worker/gumbel.py): the
same alone, in any batch, and after a preemption or a restart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aphro_core.messages.steps import PromptLogprobs, StepResult, TokenLogprobs
from aphro_core.parallel.memory import SAMPLED_ROWS
from aphro_core.request import SamplingParams
from aphro_core.worker.gumbel import GumbelNoise, draw_keys
from aphro_core.worker.logprobs import token_logprobs
from aphro_core.worker.penalties import TokenCounts, add_biases_, apply_penalties_, mask_tokens_
from aphro_core.worker.reductions import argmax
from aphro_core.worker.step import SamplingError
from aphro_core.worker.truncation import build_truncation, draw_truncated, is_truncated


@dataclass(frozen=True, slots=True)
class SampledToken:
    seq_id: int
    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(slots=True)
class SamplingRow:
    """What the sampler knows of a sequence. Keep one as long as the sequence lives: penalty counts grow in it."""

    seq_id: int
    sampling: SamplingParams
    seed: int
    position: int  # of the token to draw, in the whole sequence
    token_ids: list[int]  # prompt, then output so far; owned and appended to by the worker
    num_prompt_tokens: int
    stop_token_ids: Sequence[int] = ()  # masked while the output is shorter than sampling.min_tokens
    counts: TokenCounts | None = field(default=None, repr=False, compare=False)
    needs_host: bool = field(init=False, compare=False)  # for what it knows (penalties ...) or wants to know

    def __post_init__(self) -> None:
        asked = self.sampling
        wants = asked.logit_bias or asked.min_tokens or asked.logprobs is not None
        self.needs_host = _has_penalty(asked) or bool(wants)


class Sampler:
    """Draws tokens for a vocabulary of ``vocab_size`` on ``device``. Holds no state of any sequence."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._noise = GumbelNoise(vocab_size, device)

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        """One token a row. ``logits`` [rows, vocab_size] float32 on the sampler's device stay as they are.

        Log-probabilities come from these raw logits. Raises :class:`SamplingError` for a row with NaN, with +inf, or
        with nothing but -inf.
        """
        if logits.shape != (len(rows), self._vocab_size) or logits.dtype != torch.float32:
            want = f"[{len(rows)}, {self._vocab_size}] float32"
            raise ValueError(f"logits are {list(logits.shape)} {logits.dtype}, must be {want}")
        sampled = []
        for start in range(0, len(rows), SAMPLED_ROWS):
            stop = start + SAMPLED_ROWS
            sampled += self._sample(logits[start:stop], rows[start:stop])
        return sampled

    def _sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        adjusted = self._adjust(logits, rows)
        peaks = adjusted.amax(dim=-1, keepdim=True)
        if not bool(peaks.isfinite().all()):
            raise self._explain(peaks, logits, rows)
        token_ids = self._choose(adjusted, peaks, rows)
        logprobs = self._logprobs(logits, rows, token_ids)
        return [SampledToken(row.seq_id, token_ids[i], logprobs.get(i)) for i, row in enumerate(rows)]

    def _adjust(self, logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
        """The logits with biases, masks and penalties; a copy if there is any."""
        biases = {i: self._biases(row) for i, row in enumerate(rows) if row.sampling.logit_bias}
        masks = {i: self._masked_ids(row) for i, row in enumerate(rows) if row.sampling.min_tokens}
        penalized = [(i, row.sampling, _counts(row)) for i, row in enumerate(rows) if _has_penalty(row.sampling)]
        if not (biases or masks or penalized):
            return logits
        logits = logits.clone()
        if biases:
            add_biases_(logits, biases)
        if masks:
            mask_tokens_(logits, masks)
        if penalized:
            apply_penalties_(logits, penalized)
        return logits

    def _biases(self, row: SamplingRow) -> Mapping[int, float]:
        if (largest := max(row.sampling.logit_bias)) >= self._vocab_size:
            message = (
                f"sequence {row.seq_id} has a logit_bias for token {largest}, allowed: 0 to {self._vocab_size - 1}"
            )
            raise SamplingError(message, [row.seq_id], hint="leave that token out of logit_bias")
        return row.sampling.logit_bias

    def _masked_ids(self, row: SamplingRow) -> list[int]:
        if row.position - row.num_prompt_tokens >= row.sampling.min_tokens:
            return []
        # a stop id beyond the vocabulary can never be drawn
        return [token_id for token_id in row.stop_token_ids if token_id < self._vocab_size]

    def _choose(self, logits: Tensor, peaks: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
        greedy = [i for i, row in enumerate(rows) if row.sampling.is_greedy]
        if len(greedy) == len(rows):
            return _to_list(argmax(logits))
        plain = [i for i, row in enumerate(rows) if not row.sampling.is_greedy and not is_truncated(row.sampling)]
        cut = [i for i, row in enumerate(rows) if not row.sampling.is_greedy and is_truncated(row.sampling)]
        chosen = dict(zip(greedy, _to_list(argmax(logits[greedy])), strict=True)) if greedy else {}
        for members, draw in ((plain, self._draw_plain), (cut, self._draw_truncated)):
            if members:
                among = [rows[i] for i in members]
                chosen |= zip(members, _to_list(draw(self._scores(logits, peaks, rows, members), among)), strict=True)
        return [chosen[i] for i in range(len(rows))]

    def _scores(self, logits: Tensor, peaks: Tensor, rows: Sequence[SamplingRow], members: list[int]) -> Tensor:
        """``[members, vocab]``: (logit - largest) / temperature; the largest goes first, for float32's sake."""
        temperatures = torch.tensor([[rows[i].sampling.temperature] for i in members], device=self._device)
        return (_take(logits, members) - _take(peaks, members)).div_(temperatures)

    def _draw_plain(self, scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
        return argmax(self._noise.add_(scores, self._keys(rows)))

    def _draw_truncated(self, scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
        cut = build_truncation([row.sampling for row in rows], self._vocab_size, self._device)
        return draw_truncated(scores, cut, self._keys(rows), self._noise)

    def _keys(self, rows: Sequence[SamplingRow]) -> Tensor:
        return draw_keys([(row.seed, row.position) for row in rows], self._device)

    def _logprobs(self, logits: Tensor, rows: Sequence[SamplingRow], token_ids: list[int]) -> dict[int, TokenLogprobs]:
        asking = {i: row.sampling.logprobs for i, row in enumerate(rows) if row.sampling.logprobs is not None}
        if not asking:
            return {}
        members = list(asking)
        entries = token_logprobs(_take(logits, members), [token_ids[i] for i in members], list(asking.values()))
        return dict(zip(members, entries, strict=True))

    def _explain(self, peaks: Tensor, logits: Tensor, rows: Sequence[SamplingRow]) -> SamplingError:
        bad = [i for i, is_sound in enumerate(peaks.isfinite().squeeze(1).tolist()) if not is_sound]
        first = rows[bad[0]]
        if bool(logits[bad[0]].amax().isfinite()):
            found, hint = "no token is left by logit_bias and min_tokens", "allow a token that is no stop token"
        else:
            found, hint = f"the largest logit is {float(logits[bad[0]].amax())}", "try --dtype float32 or bfloat16"
        where = f"sequence {first.seq_id} at position {first.position}"
        others = f" (and {len(bad) - 1} more sequences of this step)" if len(bad) > 1 else ""
        return SamplingError(f"{where} has no token to draw: {found}{others}", [rows[i].seq_id for i in bad], hint=hint)


def sampled_result(step_id: int, sampled: list[SampledToken], prompt_logprobs: list[PromptLogprobs]) -> StepResult:
    """The answer to a step whose tokens, in the plan's order, are these."""
    logprobs = {index: token.logprobs for index, token in enumerate(sampled) if token.logprobs is not None}
    return StepResult(step_id, [token.token_id for token in sampled], logprobs, prompt_logprobs)


def _has_penalty(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0


def _counts(row: SamplingRow) -> TokenCounts:
    if row.counts is None:
        row.counts = TokenCounts()
    row.counts.catch_up(row.token_ids, row.num_prompt_tokens)
    return row.counts


def _take(x: Tensor, members: list[int]) -> Tensor:
    """Rows of ``x`` in ascending order; no copy if that is all of them."""
    return x if len(members) == len(x) else x[members]


def _to_list(tokens: Tensor) -> list[int]:
    token_ids: list[int] = tokens.tolist()
    return token_ids
