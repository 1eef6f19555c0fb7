"""Draws tokens on the device: greedy, or by temperature, min_p, top_k and top_p, without a word from the host."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from aphro_kernels.sample import SamplingDials, build_sample_workspace, hash_seeds, sample
from torch import Tensor

from aphro_core.request import SamplingParams
from aphro_core.worker.sampler import SamplingRow


class DeviceSampler:
    """The dials of a step's rows are sent when the rows change, which decode steps seldom do."""

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._workspace = build_sample_workspace(max_rows, vocab_size, device)
        self._rows: list[SamplingRow] = []
        self._all_greedy = True
        self._greedy = self._send(max_rows * [SamplingRow(-1, SamplingParams(temperature=0.0), 0, 0, [], 0)])
        self._dials = self._greedy

    def draw(self, logits: Tensor, positions: Tensor, rows: list[SamplingRow]) -> Tensor:
        """Token ids ``[rows]`` int64, -1 for a row without a finite largest logit.

        ``logits`` [rows, vocab]; ``positions`` [rows] int64 of the tokens that were read: one comes behind each.
        ``rows``: the list of the call before where it says the same.
        """
        if rows is not self._rows:
            self._rows = rows
            self._all_greedy = all(row.sampling.is_greedy for row in rows)
            self._dials = first_rows(self._greedy, len(rows)) if self._all_greedy else self._send(rows)
        tokens, is_bad = sample(
            logits,
            positions,
            self._dials,
            workspace=self._workspace,
            position_offset=1,
            all_greedy=self._all_greedy,
        )
        return tokens.masked_fill_(is_bad, -1)

    def _send(self, rows: Sequence[SamplingRow]) -> SamplingDials:
        params = [row.sampling for row in rows]
        floats = [
            [0.0 if p.is_greedy else p.temperature for p in params],
            [math.log(p.min_p) if p.min_p > 0.0 else -math.inf for p in params],
            [p.top_p if p.top_p < 1.0 else math.inf for p in params],
        ]
        top_k = [p.top_k if 0 < p.top_k < self._vocab_size else self._vocab_size for p in params]
        width = -(-len(rows) // 16) * 16  # what Triton compiles must not depend on how a pointer is aligned
        words = np.zeros((4, width), dtype=np.int32)
        words[:3, : len(rows)] = np.array(floats, dtype=np.float32).view(np.int32)
        words[3, : len(rows)] = top_k
        seeds = np.zeros(width, dtype=np.int64)
        seeds[: len(rows)] = hash_seeds([row.seed for row in rows]).numpy()
        sent = torch.from_numpy(np.concatenate([words.reshape(-1), seeds.view(np.int32)]))
        sent = (sent if self._device.type == "cpu" else sent.pin_memory()).to(self._device, non_blocking=True)
        dials = sent[: 4 * width].view(4, width)
        whole = SamplingDials(
            temperature=dials[0].view(torch.float32),
            log_min_p=dials[1].view(torch.float32),
            top_k=dials[3],
            top_p=dials[2].view(torch.float32),
            seed_hashes=sent[4 * width :].view(torch.int64),
        )
        return first_rows(whole, len(rows))


def first_rows(dials: SamplingDials, n: int) -> SamplingDials:
    return SamplingDials(
        dials.temperature[:n], dials.log_min_p[:n], dials.top_k[:n], dials.top_p[:n], dials.seed_hashes[:n]
    )
