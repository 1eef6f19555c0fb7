"""The random number of a token: golden values, uniformity, independence, and the same wherever it is computed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from aphro_core.worker.gumbel import GumbelNoise, draw_keys

CPU = torch.device("cpu")
VOCAB = 49152


def noise_of(draws: list[tuple[int, int]], vocab: int = VOCAB) -> Tensor:
    return GumbelNoise(vocab, CPU).add_(torch.zeros(len(draws), vocab), draw_keys(draws, CPU))


def uniforms(draws: list[tuple[int, int]], vocab: int = VOCAB) -> Tensor:
    """Back from Gumbel noise g to the uniform number behind it: v = 1 - exp(-exp(-g))."""
    return -torch.expm1(-torch.exp(-noise_of(draws, vocab).double()))


def hash_by_hand(seed: int, position: int, token_id: int) -> float:
    """The documented hash in plain Python integers."""
    mask = 2**32 - 1

    def lowbias32(x: int, middle: int) -> int:
        x ^= x >> 16
        x = (x * 0x7FEB352D + middle) & mask
        x ^= x >> 15
        x = (x * 0x846CA68B) & mask
        return x ^ (x >> 16)

    def splitmix64(x: int) -> int:
        z = (x + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    key = splitmix64(splitmix64(seed) + position)
    x = lowbias32(lowbias32((token_id + 0x9E3779B9) & mask, 0) ^ (key >> 32), key & mask) & 0x7FFFFFFF
    return -math.log(-math.log1p(-(x + 0.5) / 2**31))


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**32, 2**63 - 1])
def test_noise_is_the_documented_hash(seed: int) -> None:
    noise = noise_of([(seed, 0), (seed, 7), (seed, 2**31)])
    for row, position in enumerate((0, 7, 2**31)):
        for token_id in (0, 1, 5000, VOCAB - 1):
            assert float(noise[row, token_id]) == pytest.approx(hash_by_hand(seed, position, token_id), abs=2e-5)


def chi_square(values: Tensor, num_bins: int) -> float:
    """The chi-square statistic of uniform bins, in standard deviations from its mean."""
    counts = torch.histc(values, bins=num_bins, min=0.0, max=1.0)
    expected = values.numel() / num_bins
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return (statistic - (num_bins - 1)) / math.sqrt(2 * (num_bins - 1))


def test_uniform_over_tokens_seeds_and_positions() -> None:
    over_tokens = [uniforms([(seed, 40)]).flatten() for seed in (0, 1, 2**62)]
    over_seeds = uniforms([(seed, 17) for seed in range(4096)], vocab=8)[:, 5]
    over_positions = uniforms([(3, position) for position in range(4096)], vocab=8)[:, 2]
    for values in (*over_tokens, over_seeds, over_positions):
        assert abs(chi_square(values, 256)) < 5.0


@pytest.mark.parametrize("other", [(9, 101), (10, 100), (9 + 2**32, 100), (9, 100 + 2**16), (8, 101), (100, 9)])
def test_neighbouring_draws_are_independent(other: tuple[int, int]) -> None:
    first, second = uniforms([(9, 100), other])
    correlation = float(torch.corrcoef(torch.stack([first, second]))[0, 1])
    assert abs(correlation) < 5 / math.sqrt(VOCAB)
    pairs = (first * 16).long() * 16 + (second * 16).long()
    assert abs(chi_square((pairs.double() + 0.5) / 256, 256)) < 5.0


@pytest.mark.parametrize("distance", [1, 2, 256, 16384])
def test_neighbouring_tokens_are_independent(distance: int) -> None:
    values = uniforms([(1, 1)]).flatten()
    pairs = (values[:-distance] * 16).long() * 16 + (values[distance:] * 16).long()
    assert abs(chi_square((pairs.double() + 0.5) / 256, 256)) < 5.0


def test_the_tail_is_fine_and_finite() -> None:
    noise = noise_of([(seed, 0) for seed in range(64)])
    assert bool(noise.isfinite().all())
    assert float(noise.min()) > -2.9
    assert 12.0 < float(noise.max()) < 22.3  # of 3.1 million numbers the largest is about log(3.1e6) = 15
    top = noise.amax(dim=-1)
    assert len(set(top.tolist())) == 64  # no two rows share their winner: the tail is not a coarse grid


def test_alone_in_a_batch_and_at_chosen_tokens_the_noise_is_equal() -> None:
    draws = [(seed, 11 * seed) for seed in range(21)]  # more rows than one block
    noise = GumbelNoise(VOCAB, CPU)
    together = noise.add_(torch.zeros(21, VOCAB), draw_keys(draws, CPU))
    assert torch.equal(noise.add_(torch.zeros(1, VOCAB), draw_keys(draws[13:14], CPU))[0], together[13])
    token_ids = torch.randint(VOCAB, (21, 37), generator=torch.Generator().manual_seed(0))
    chosen = noise.add_at_(torch.zeros(21, 37), draw_keys(draws, CPU), token_ids)
    assert torch.equal(chosen, together.gather(1, token_ids))


def test_scores_are_added_to() -> None:
    scores = torch.randn(2, 1000)
    expected = scores + noise_of([(1, 2), (3, 4)], vocab=1000)
    noisy = GumbelNoise(1000, CPU).add_(scores, draw_keys([(1, 2), (3, 4)], CPU))
    assert noisy is scores
    torch.testing.assert_close(noisy, expected)
