"""Figures that real servers printed, reproduced: each row is one published log."""

from __future__ import annotations

from typing import Any

import pytest

from aphro_core.estimate.cards import GIB
from aphro_core.estimate.report import assumptions
from tests.core.estimate.asking import ask
from tests.core.estimate.configs import (
    DEEPSEEK_LITE,
    GEMMA3_27B,
    GPT_OSS_20B,
    LLAMA_8B,
    MIXTRAL,
    QWEN_32B,
    QWEN_72B,
)

H100: dict[str, Any] = {"gib": 79.19, "utilization": 0.95, "max_model_len": 8192}


@pytest.mark.parametrize(
    ("config", "tp", "pp", "changes", "blocks", "tolerance"),
    [
        (LLAMA_8B, 1, 1, H100, 29_751, 0.0005),
        (LLAMA_8B, 1, 1, H100 | {"kv_cache_dtype": "fp8"}, 59_502, 0.0005),
        (LLAMA_8B, 1, 1, H100 | {"dtype": "float32"}, 10_956, 0.001),
        (LLAMA_8B, 1, 2, H100, 67_207, 0.0005),
        (LLAMA_8B, 1, 4, H100, 141_079, 0.0005),
        (LLAMA_8B, 2, 1, H100, 65_293, 0.0005),
        (LLAMA_8B, 4, 1, H100, 138_112, 0.0005),
        (QWEN_72B, 2, 1, H100, 1_245, 0.01),
        (MIXTRAL, 2, 1, H100, 29_121, 0.001),
        (DEEPSEEK_LITE, 1, 1, H100, 94_097, 0.001),
        (GEMMA3_27B, 1, 1, H100, 15_997, 0.005),
        (GPT_OSS_20B, 2, 1, H100 | {"utilization": 0.9}, 323_972, 0.005),
    ],
)
def test_blocks_are_those_of_the_log(
    config: dict[str, Any], tp: int, pp: int, changes: dict[str, Any], blocks: int, tolerance: float
) -> None:
    found = ask(config, tp, pp, **changes)
    assert found.num_blocks == pytest.approx(blocks, rel=tolerance)
    assert found.fits


@pytest.mark.parametrize(
    ("version", "peak", "other"),
    [("0.15.0", 5.64, 0.13), ("0.16.0", 5.64, 0.13), ("0.17.0", 2.23, 0.13), ("0.18.0", 2.23, 0.25)],
)
def test_one_model_four_versions(version: str, peak: float, other: float) -> None:
    config = LLAMA_8B | {"hidden_size": 5120, "num_attention_heads": 40, "num_hidden_layers": 40,
                         "intermediate_size": 17408, "vocab_size": 151936}  # fmt: skip
    rank = ask(config, engine=f"vllm:{version}", **H100).limiting
    assert rank.activation_bytes / GIB == pytest.approx(peak, abs=0.02)
    assert rank.overhead_bytes / GIB == pytest.approx(other, abs=0.01)


def test_last_stage_limits() -> None:
    found = ask(LLAMA_8B, 1, 4, **H100)
    weights = [round(rank.weights_bytes / GIB, 2) for rank in found.ranks]
    assert weights == [4.26, 3.28, 3.28, 4.26]
    assert found.limiting.rank == 3


def test_refusal_for_want_of_cache() -> None:
    changes: dict[str, Any] = {"gpu": "4090", "engine": "vllm:0.8.3", "utilization": 0.95, "max_model_len": 32768}
    found = ask(QWEN_32B, 4, 1, **changes)
    assert not found.fits
    assert ask(QWEN_32B, 4, 1, max_num_seqs=256, **changes).fits


def test_sized_then_out_of_memory() -> None:
    tight = ask(GPT_OSS_20B, 1, 1, **H100)
    assert tight.num_blocks > 100_000
    assert tight.dies_after_sizing
    assert not tight.fits
    assert ask(GPT_OSS_20B, 1, 1, **(H100 | {"utilization": 0.85})).fits


def test_sliding_layers_have_their_own_groups() -> None:
    found = ask(GEMMA3_27B, **H100)
    assert found.limiting.layout.num_groups == 7
    assert found.limiting.layout.block_bytes == 1.25 * 2**20
    assert found.max_concurrency == pytest.approx(4.46, rel=0.005)
    assert found.tokens == pytest.approx(36_560, rel=0.005)


def test_aphro_allocates_no_more_blocks_than_its_requests_can_use() -> None:
    found = ask(LLAMA_8B, engine="aphro", max_num_seqs=4, max_model_len=1000)
    assert found.num_blocks == 4 * 63 < found.limiting.num_blocks
    assert found.max_concurrency == 4
    assert any("the memory would hold" in note for note in assumptions(found))
    servers = ask(LLAMA_8B, max_num_seqs=4, max_model_len=1000)
    assert servers.num_blocks == servers.limiting.num_blocks > 4 * 63


def test_latent_attention_was_cached_whole_before_its_rows_were() -> None:
    before, since = (ask(DEEPSEEK_LITE, engine=f"vllm:{version}", max_model_len=8192) for version in ("0.6.6", "0.7.1"))
    assert before.limiting.layout.block_bytes == 16 * DEEPSEEK_LITE["num_hidden_layers"] * 2 * 16 * 256 * 2
    assert since.limiting.layout.block_bytes < before.limiting.layout.block_bytes / 10


def test_the_first_profiler_of_free_memory_counts_reduced_activations_of_all_layers() -> None:
    """Llama-2-70B on 4 x A100 printed 20,865 blocks with it, and 31,615 without (vllm#2031)."""
    llama_70b = LLAMA_8B | {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
                            "vocab_size": 32000, "intermediate_size": 28672,
                            "max_position_embeddings": 4096}  # fmt: skip
    blocks = [ask(llama_70b, 4, gpu="A100", engine=f"vllm:{version}").num_blocks for version in ("0.2.4", "0.2.5")]
    assert blocks == [pytest.approx(31_615, rel=0.01), pytest.approx(20_865, rel=0.02)]


@pytest.mark.parametrize(("version", "by_concurrency"), [("0.19.0", False), ("0.22.0", True)])
def test_printed_size_of_hybrids(version: str, by_concurrency: bool) -> None:
    found = ask(GEMMA3_27B, engine=f"vllm:{version}", **H100)
    expected = found.max_concurrency * 8192 if by_concurrency else found.num_blocks // 7 * 16
    assert found.tokens == pytest.approx(expected, abs=1)


def test_an_encoder_runs_its_largest_image_however_short_requests_are() -> None:
    long, short = (ask(GEMMA3_27B, **H100 | {"max_model_len": length}) for length in (8192, 512))
    assert short.limiting.activation_bytes == long.limiting.activation_bytes
