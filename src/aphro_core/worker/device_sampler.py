"""Draws of the common kinds on the device, without a word from the host: greedy, and plain with any temperature."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from aphro_core.request import SamplingParams
from aphro_core.worker.gumbel import GumbelNoise, draw_keys
from aphro_core.worker.sampler import SamplingRow
from aphro_core.worker.truncation import is_truncated


def is_drawn_on_device(params: SamplingParams) -> bool:
    """Whether a row needs nothing that the host knows or wants to know."""
    penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) != (1.0, 0.0, 0.0)
    is_rare = penalties or params.logit_bias or params.min_tokens or params.logprobs is not None
    return not is_rare and (params.is_greedy or not is_truncated(params))


class DeviceSampler:
    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._noise = GumbelNoise(vocab_size, device)

    def draw(self, logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
        """Token ids ``[rows]`` int64, -1 for a row with no finite largest logit. ``logits`` [rows, vocab] float32."""
        peaks, tokens = logits.max(dim=-1, keepdim=True)
        if not all(row.sampling.is_greedy for row in rows):
            dials = np.array([[row.sampling.temperature or 1.0, row.sampling.is_greedy] for row in rows], np.float32)
            sent = self._send(torch.from_numpy(dials))
            keys = draw_keys([(row.seed, row.position) for row in rows], torch.device("cpu"))
            scores = self._noise.add_((logits - peaks).div_(sent[:, :1]), self._send(keys))
            tokens = torch.where(sent[:, 1:] > 0, tokens, scores.argmax(dim=-1, keepdim=True))
        return torch.where(peaks.isfinite(), tokens, -1).squeeze(1)

    def _send(self, values: Tensor) -> Tensor:
        return (values if self._device.type == "cpu" else values.pin_memory()).to(self._device, non_blocking=True)
