"""Tokens from logits on the device: arg-max, or temperature, min_p, top_k, top_p and a draw, without a sort.

What is drawn is a function of (seed, position) and the row's logits alone: Gumbel noise hashed from seed, position and
token is added to the scores and the largest wins. The integers are those of ``aphro_core.worker.gumbel``, whose head
gives the formula. Scores are (logit - largest logit) / temperature. A token survives if its score is at least
log(min_p), at least the k-th largest, and if the probability strictly above it, among those that these two leave, is
less than top_p; ties at a border all survive.

Three launches whatever the rows ask (two if all are greedy; one less where the largest logits of blocks are known),
none of which the host needs to see: fit for CUDA graphs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from aphro_kernels.language import chain_options, next_power_of_2, runs_kernels
from aphro_kernels.sample_kernels import BLOCK, choose_kernel, draw_kernel, peaks_kernel
from aphro_kernels.step_rows import RowsEnd, end_rows_reference

_TILE: Final = 4096  # tokens that a program of a draw looks at at once
_MOST_PROGRAMS: Final = 1024  # of a draw: as many as run at once
_MASK32: Final = 2**32 - 1


@dataclass(frozen=True, slots=True)
class SamplingDials:
    """What each row asks, ``[rows]`` on the device."""

    temperature: Tensor  # float32, 0: the largest logit
    log_min_p: Tensor  # float32, -inf: off
    top_k: Tensor  # int32, the size of the vocabulary or more: off
    top_p: Tensor  # float32, inf: off
    seed_hashes: Tensor  # int64: splitmix64(seed), the bits of the unsigned number


@dataclass(frozen=True, slots=True)
class SampleWorkspace:
    """Scratch memory of a call; calls that share one must follow each other on one stream."""

    peaks: Tensor  # [rows, blocks] float32: largest logit of each block of the vocabulary
    best: Tensor  # [rows, tiles] float32
    best_ids: Tensor  # [rows, tiles] int32
    mass: Tensor  # [rows, tiles] float32
    listed: Tensor  # [rows, blocks] int32


def build_sample_workspace(max_rows: int, vocab_size: int, device: torch.device) -> SampleWorkspace:
    blocks, tiles = -(-vocab_size // BLOCK), -(-vocab_size // _TILE)

    def buffer(width: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(max_rows, width, dtype=dtype, device=device)

    return SampleWorkspace(
        buffer(blocks, torch.float32),
        buffer(tiles, torch.float32),
        buffer(tiles, torch.int32),
        buffer(tiles, torch.float32),
        buffer(blocks, torch.int32),
    )


def sample_reference(logits: Tensor, positions: Tensor, dials: SamplingDials) -> tuple[Tensor, Tensor]:
    logits = logits.float()
    vocab_size = logits.shape[1]
    peaks = logits.amax(dim=-1, keepdim=True)
    is_bad = ~peaks.isfinite().squeeze(1)
    is_greedy = dials.temperature == 0
    scores = (logits - peaks) / torch.where(is_greedy, 1.0, dials.temperature)[:, None]
    ordered = scores.sort(dim=-1, descending=True).values
    kth = ordered.gather(1, dials.top_k.long().clamp(1, vocab_size)[:, None] - 1)
    floor = torch.maximum(dials.log_min_p[:, None], torch.where(dials.top_k[:, None] < vocab_size, kth, -math.inf))
    weights = ordered.exp() * (ordered >= floor)
    above = weights.cumsum(dim=-1) - weights
    is_kept = (above < dials.top_p[:, None] * weights.sum(dim=-1, keepdim=True)) & (ordered >= floor)
    last = torch.where(is_kept, ordered, math.inf).amin(dim=-1, keepdim=True)
    noisy = torch.where(scores >= last, scores + gumbel_reference(dials.seed_hashes, positions, vocab_size), -math.inf)
    token_ids = torch.where(is_greedy, logits.argmax(dim=-1), noisy.argmax(dim=-1))
    return torch.where(is_bad, 0, token_ids), is_bad


def gumbel_reference(seed_hashes: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """``[rows, vocab_size]`` float32 noise. int64 holds the words: products wrap, shifts are masked to be logical."""
    keys = _splitmix64(seed_hashes + positions)[:, None]
    mixed = _lowbias32((torch.arange(vocab_size, device=positions.device) + 0x9E3779B9) & _MASK32, 0)
    bits = _lowbias32(mixed ^ _shift(keys, 32), keys & _MASK32)
    v = (bits & 0x7FFFFFFF).float() * (2.0**-31 * (1 - 2.0**-23)) + 2.0**-32
    return -(-torch.log1p(-v)).log()


def _shift(words: Tensor, by: int) -> Tensor:
    shifted: Tensor = (words >> by) & (2 ** (64 - by) - 1)
    return shifted


def _splitmix64(state: Tensor) -> Tensor:
    z = state + (0x9E3779B97F4A7C15 - 2**64)
    z = (z ^ _shift(z, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ _shift(z, 27)) * (0x94D049BB133111EB - 2**64)
    return z ^ _shift(z, 31)


def _lowbias32(bits: Tensor, key: Tensor | int) -> Tensor:
    bits = ((bits ^ (bits >> 16)) * 0x7FEB352D + key) & _MASK32
    bits = ((bits ^ (bits >> 15)) * 0x846CA68B) & _MASK32
    return bits ^ (bits >> 16)


def hash_seeds(seeds: list[int]) -> Tensor:
    """``[len(seeds)]`` int64 for ``SamplingDials.seed_hashes``, on the host. Seeds from 0 to 2**63 - 1."""
    return _splitmix64(torch.tensor(seeds, dtype=torch.int64))


def sample(
    logits: Tensor,
    positions: Tensor,
    dials: SamplingDials,
    *,
    workspace: SampleWorkspace,
    position_offset: int = 0,
    all_greedy: bool = False,
    peaks: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    end: RowsEnd | None = None,
) -> tuple[Tensor, Tensor]:
    """Token ids ``[rows]`` int64, and ``[rows]`` bool: where none can be chosen (NaN, +inf, or -inf alone; token 0).

    ``logits`` [rows, vocab_size] of any float dtype, rows may be strided; ``positions`` [rows] int64, plus
    ``position_offset``, are those of the tokens to draw. ``all_greedy`` promises that every temperature is 0.
    ``peaks`` [at least rows, blocks] float32: the largest of each block, where they are known (peer_columns.py); of a
    row of temperature 0 only the first block with the largest of all is read then. ``out`` takes the answers. With
    ``end`` they are told too, as :func:`aphro_kernels.step_rows.end_rows_` does.
    """
    num_rows = logits.shape[0]
    if out is None:
        out = (
            torch.empty(num_rows, dtype=torch.int64, device=logits.device),
            torch.empty(num_rows, dtype=torch.bool, device=logits.device),
        )
    if runs_kernels(logits):
        _launch(logits, positions, dials, workspace, position_offset, all_greedy, out, end, peaks)
    else:
        for answer, found in zip(out, sample_reference(logits, positions + position_offset, dials), strict=True):
            answer[:num_rows] = found
        if end is not None:
            end_rows_reference(end, out[0][:num_rows], out[1][:num_rows])
    return out[0][:num_rows], out[1][:num_rows]


def _launch(
    logits: Tensor,
    positions: Tensor,
    dials: SamplingDials,
    workspace: SampleWorkspace,
    position_offset: int,
    all_greedy: bool,
    out: tuple[Tensor, Tensor],
    end: RowsEnd | None = None,
    peaks: Tensor | None = None,
) -> None:
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1
    num_blocks, num_tiles = workspace.peaks.shape[1], workspace.best.shape[1]
    assert num_blocks == -(-vocab_size // BLOCK)
    assert num_rows <= workspace.peaks.shape[0]
    if not num_rows:
        return
    common = {"VOCAB": vocab_size, "BLOCKS": num_blocks, "BLOCKS_PADDED": next_power_of_2(num_blocks)}
    row_dials = (dials.temperature, dials.log_min_p, dials.top_k, dials.top_p, dials.seed_hashes)
    chain = chain_options(logits)
    if peaks is None:
        peaks = workspace.peaks
        peaks_kernel[(num_rows, -(-num_blocks // 32))](
            logits, peaks, logits.stride(0), VOCAB=vocab_size, BLOCKS=num_blocks, num_warps=4, **chain
        )
    assert peaks.shape[1] == num_blocks
    if not all_greedy:
        # of greedy rows programs do nothing, but there are as many: few of them where there are many rows
        tiles_each = min(-(-num_rows * num_tiles // _MOST_PROGRAMS), num_tiles)
        draw_kernel[(num_rows, -(-num_tiles // tiles_each))](
            logits,
            *row_dials,
            positions,
            peaks,
            workspace.best,
            workspace.best_ids,
            workspace.mass,
            logits.stride(0),
            position_offset,
            tiles_each,
            **common,
            TILES=num_tiles,
            TILE=_TILE,
            num_warps=8,
            **chain,
        )
    choose_kernel[(num_rows,)](
        logits,
        *row_dials,
        positions,
        peaks,
        workspace.best,
        workspace.best_ids,
        workspace.mass,
        workspace.listed,
        *out,
        *((None, None, None, 0, 0) if end is None else _places(end)),
        logits.stride(0),
        position_offset,
        **common,
        TILES=num_tiles,
        TILES_PADDED=next_power_of_2(num_tiles),
        ALL_GREEDY=all_greedy,
        num_warps=8,
        **chain,
    )


def _places(end: RowsEnd) -> tuple[Tensor, Tensor, Tensor, int, int]:
    assert end.rows.is_contiguous()
    return end.rows, end.last_token_ids, end.answers, end.answers.stride(0), end.answers.numel()
