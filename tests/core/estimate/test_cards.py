"""The tables of cards, versions and schemes: every row is found by the names that people use."""

from __future__ import annotations

from typing import Any

import pytest

from aphro_core.errors import UsageError
from aphro_core.estimate.cards import CARDS, GIB, Card, card_of_size, find_card
from aphro_core.estimate.config_keys import ConfigKeys
from aphro_core.estimate.quantization import SCHEMES, parse_quantization, read_quantization
from aphro_core.estimate.vllm_versions import GENERATIONS, batch_defaults, parse_version


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_each_card_is_found(card: Card) -> None:
    for name in (card.name, card.name.lower(), card.name.replace(" ", "-"), f"NVIDIA {card.name}"):
        assert find_card(name) == card
    near = card_of_size(card.total_bytes)
    assert near is not None
    assert abs(near.total_gib - card.total_gib) < 1


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("H100", "H100-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H200", "H200"),
        ("A100", "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("A100-PCIE-40GB", "A100-40GB"),
        ("Tesla V100-SXM2-32GB", "V100-32GB"),
        ("Tesla T4", "T4"),
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("RTX 4090 48GB", "RTX 4090 48GB"),
        ("RTX 4090D", "RTX 4090D"),
        ("H20-96GB", "H20"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("L40S", "L40S"),
        ("NVIDIA A800-SXM4-80GB", "A800-80GB"),
        ("RTX PRO 6000 Blackwell", "RTX PRO 6000"),
        ("AMD Instinct MI300X", "MI300X"),
        ("MI355X", "MI355X"),
        ("Radeon RX 7900 XTX", "RX 7900 XTX"),
        ("NVIDIA GeForce RTX 3090 Ti", "RTX 3090 Ti"),
        ("Quadro RTX 8000", "Quadro RTX 8000"),
        ("4070 Ti Super", "RTX 4070 Ti Super"),
    ],
)
def test_names_that_people_use(name: str, card: str) -> None:
    assert find_card(name).name == card


@pytest.mark.parametrize(
    ("name", "card", "gib"),
    [
        ("A100 3g.20gb", "A100-40GB MIG 3g.20gb", 19.5),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", "A100-80GB MIG 3g.40gb", 39.25),
        ("h100-1g.10gb", "H100-80GB MIG 1g.10gb", 9.7),
        ("H100 MIG 1g.20gb+me", "H100-80GB MIG 1g.20gb", 19.5),
        ("H200 2g.35gb", "H200 MIG 2g.35gb", 34.5),
        ("A30 2g.12gb", "A30 MIG 2g.12gb", 11.5),
    ],
)
def test_slices_of_cards(name: str, card: str, gib: float) -> None:
    found = find_card(name)
    assert (found.name, found.total_gib) == (card, pytest.approx(gib, abs=0.3))
    assert not found.fused_all_reduce


def test_a_slice_that_a_card_does_not_have_is_refused() -> None:
    with pytest.raises(UsageError, match="no MIG slice 3g"):
        find_card("H100 3g.17gb")


def test_unknown_card_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError) as raised:
        find_card("RTX 4091")
    assert raised.value.hint is not None
    assert "RTX 40" in raised.value.hint
    assert card_of_size(5 * GIB) is None


def test_generations_are_in_order() -> None:
    assert [row.since for row in GENERATIONS] == sorted({row.since for row in GENERATIONS})
    assert GENERATIONS[0].since == (0, 0, 0)


@pytest.mark.parametrize(
    ("text", "gpu", "since"),
    [
        ("0.2.4", "A100", (0, 0, 0)),
        ("PR #2031 (0.2.5)", "A100", (0, 2, 5)),
        ("0.6.3.post1", "A100", (0, 4, 0)),
        ("v0.6.4", "A100", (0, 6, 4)),
        ("0.8.5.post1", "A100", (0, 8, 0)),
        ("0.8.5.post1-v0", "A100", (0, 7, 1)),
        ("0.9.2", "T4", (0, 7, 1)),  # the new engine needs Ampere
        ("0.11.0", "T4", (0, 9, 1)),
        ("0.19", "H100", (0, 18, 0)),
        ("0.23.0", "H100", (0, 21, 0)),
        ("", "H100", (0, 21, 0)),
        ("0.6.6", "H100", (0, 6, 5)),
        ("0.3.3", "H100", (0, 3, 0)),
        ("v0", "H100", (0, 7, 1)),
        ("v1", "H100", (0, 9, 1)),
        ("bfde49e28", "H100", (0, 21, 0)),
    ],
)
def test_versions(text: str, gpu: str, since: tuple[int, int, int]) -> None:
    assert parse_version(text).generation(find_card(gpu)).since == since


def test_guessed_version_is_late_enough_for_the_model() -> None:
    assert parse_version("v1").for_model("qwen3_5_text").generation(find_card("H100")).since == (0, 21, 0)
    assert parse_version("0.11.0").for_model("qwen3_5_text").numbers == (0, 11, 0)


@pytest.mark.parametrize(
    ("version", "gpu", "length", "sizes"),
    [
        ("0.19.0", "H100", 8192, (8192, 1024)),
        ("0.19.0", "A100-80GB", 8192, (2048, 256)),
        ("0.19.0", "A800", 8192, (8192, 1024)),
        ("0.19.0", "4090", 8192, (2048, 256)),
        ("0.8.3", "4090", 8192, (2048, 1024)),
        ("0.7.0", "4090", 8192, (8192, 256)),
        ("0.7.0", "4090", 512, (2048, 256)),
        ("0.7.0", "4090", 65536, (2048, 256)),
        ("0.6.0", "4090", 65536, (512, 256)),
        ("0.5.0", "4090", 65536, (65536, 256)),
        ("0.1.7", "A100", 2048, (2560, 256)),
    ],
)
def test_defaults_of_servers(version: str, gpu: str, length: int, sizes: tuple[int, int]) -> None:
    card, parsed = find_card(gpu), parse_version(version)
    assert batch_defaults(parsed, parsed.generation(card), card, length) == sizes


@pytest.mark.parametrize("name", SCHEMES)
def test_each_scheme_is_parsed(name: str) -> None:
    facts = parse_quantization(name)
    assert facts is not None
    assert facts.scheme == name
    assert 0.2 < SCHEMES[name].bytes_per_weight() < 1.1


def test_bytes_per_weight() -> None:
    assert SCHEMES["awq-int4"].bytes_per_weight() == pytest.approx(0.5195, abs=1e-4)
    assert SCHEMES["awq-int4"].bytes_per_weight(32) == pytest.approx(0.578, abs=1e-3)
    assert parse_quantization("awq:32") == parse_quantization("awq-g32")
    assert parse_quantization("none") is None


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq-int4"),
        ({"quant_method": "gptq", "bits": 8}, "gptq-int8"),
        ({"quant_method": "awq", "w_bit": 4}, "awq-int4"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8-block"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bnb-4bit"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
        ({"quant_method": "compressed-tensors",
          "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}}}, "fp8"),
        ({"quant_method": "compressed-tensors",
          "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int"}}}}, "int8"),
        ({"quant_method": "compressed-tensors",
          "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 64}}}}, "w4a16"),
        ({"quant_method": "unheard of"}, None),
    ],
)  # fmt: skip
def test_configs_name_their_scheme(config: dict[str, Any], scheme: str | None) -> None:
    found = read_quantization(ConfigKeys({"model_type": "llama", "quantization_config": config}))
    assert (found.scheme if found else None) == scheme
