"""Draws tokens on the device: greedy, or by temperature, min_p, top_k and top_p, without a word from the host."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from aphro_kernels.peer_columns import PeerColumns
from aphro_kernels.sample import SamplingDials, build_sample_workspace, hash_seeds, sample
from aphro_kernels.step_rows import RowsEnd
from torch import Tensor

from aphro_core.request import SamplingParams
from aphro_core.worker.sampler import SamplingRow


class DeviceSampler:
    """Its dials and its answers stand in fixed memory, so that a CUDA graph draws for any rows. Dials are sent when the
    rows change, which decode steps seldom do, and some are not greedy."""

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device, place: PeerColumns | None = None) -> None:
        """``place``: of logits that several ranks write; each of them prepares its own sampler, one draws."""
        self.rows: list[SamplingRow] = []
        self.tokens = torch.zeros(max_rows, dtype=torch.int64, device=device)  # of the last call
        self._is_bad = torch.zeros(max_rows, dtype=torch.bool, device=device)
        self._vocab_size, self._max_rows, self._device = vocab_size, max_rows, device
        self._workspace = build_sample_workspace(max_rows, vocab_size, device)
        self._width = -(-max_rows // 16) * 16  # what Triton compiles must not depend on how a pointer is aligned
        self._sent = torch.zeros(6 * self._width, dtype=torch.int32, device=device)
        words = self._sent[: 4 * self._width].view(4, self._width)[:, :max_rows]
        self._dials = SamplingDials(
            temperature=words[0].view(torch.float32),
            log_min_p=words[1].view(torch.float32),
            top_k=words[3],
            top_p=words[2].view(torch.float32),
            seed_hashes=self._sent[4 * self._width :].view(torch.int64)[:max_rows],
        )
        self._place = place
        self._is_sent = False  # what ``rows`` and the next two say, else the last prepare has failed
        self._is_plain = True  # greedy rows, of which no logits are needed
        self._needs_logits = False
        self.prepare([])

    def prepare(self, rows: list[SamplingRow], *, needs_logits: bool = False) -> None:
        """The next calls of :meth:`draw` draw for ``rows``: the list of the call before where it says the same.
        ``needs_logits``: somebody else reads the logits of a step, those of greedy rows too."""
        needs_logits = needs_logits and self._place is not None
        is_same = rows is self.rows or not (rows or self.rows)
        if self._is_sent and is_same and needs_logits == self._needs_logits:
            return
        is_plain = not needs_logits and all(row.sampling.is_greedy for row in rows)
        has_to_send = not (self._is_sent and is_plain and self._is_plain)
        self.rows, self._needs_logits, self._is_plain = rows, needs_logits, is_plain
        if has_to_send:
            self._is_sent = False
            self._send(rows)
            self._is_sent = True

    def draw(
        self, logits: Tensor, positions: Tensor, end: RowsEnd | None = None, *, peaks: Tensor | None = None
    ) -> None:
        """Into the first ``tokens``, and to whom ``end`` says: -1 for a row without a finite largest logit (with
        ``end`` it is 0 in ``tokens``). ``peaks``: where the ``logits`` of ``place`` came with them.

        ``logits`` [rows, vocab]; ``positions`` [rows] int64 of the tokens that were read: one comes behind each. There
        may be more rows than were prepared; of these nothing is asked. Fit for a CUDA graph.
        """
        n = len(logits)
        dials = first_rows(self._dials, n)
        out = tokens, is_bad = self.tokens[:n], self._is_bad[:n]
        sample(logits, positions, dials, workspace=self._workspace, position_offset=1, peaks=peaks, out=out, end=end)
        if end is None:
            tokens.masked_fill_(is_bad, -1)

    def _send(self, rows: Sequence[SamplingRow]) -> None:
        """``rows``, and greedy ones behind them."""
        params = [row.sampling for row in rows] + (self._max_rows - len(rows)) * [SamplingParams(temperature=0.0)]
        floats = [
            [0.0 if p.is_greedy else p.temperature for p in params],
            [math.log(p.min_p) if p.min_p > 0.0 else -math.inf for p in params],
            [p.top_p if p.top_p < 1.0 else math.inf for p in params],
        ]
        top_k = [p.top_k if 0 < p.top_k < self._vocab_size else self._vocab_size for p in params]
        words = np.zeros((4, self._width), dtype=np.int32)
        words[:3, : len(params)] = np.array(floats, dtype=np.float32).view(np.int32)
        words[3, : len(params)] = top_k
        seeds = np.zeros(self._width, dtype=np.int64)
        seeds[: len(rows)] = hash_seeds([row.seed for row in rows]).numpy()
        sent = torch.from_numpy(np.concatenate([words.reshape(-1), seeds.view(np.int32)]))
        self._sent.copy_(self._pin(sent), non_blocking=True)
        if self._place is not None:
            is_whole = torch.tensor([self._needs_logits or not p.is_greedy for p in params], dtype=torch.int32)
            self._place.is_whole.copy_(self._pin(is_whole), non_blocking=True)

    def _pin(self, values: Tensor) -> Tensor:
        return values if self._device.type == "cpu" else values.pin_memory()


def first_rows(dials: SamplingDials, n: int) -> SamplingDials:
    return SamplingDials(
        dials.temperature[:n], dials.log_min_p[:n], dials.top_k[:n], dials.top_p[:n], dials.seed_hashes[:n]
    )
