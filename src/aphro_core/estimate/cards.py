"""Real cards: the memory that their drivers report, and what bounds their speed."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Final

from aphro_core.errors import UsageError

GIB: Final = 2**30


@dataclass(frozen=True)
class Card:
    """``total_gib`` as servers' logs print it (the mean where they differ); bandwidth and dense 16-bit rate by its
    data sheet. ``has_fused_all_reduce``: servers allocate work space for it (Hopper on)."""

    name: str
    total_gib: float
    bandwidth_gb: float  # 10^9 bytes a second
    tflops: float  # 16 bit, without sparsity
    capability: float
    fused_all_reduce: bool = False
    is_nvidia: bool = True

    @property
    def total_bytes(self) -> int:
        return round(self.total_gib * GIB)


CARDS: Final[tuple[Card, ...]] = (
    Card("T4", 14.70, 320, 65, 7.5),
    Card("V100-16GB", 15.77, 900, 125, 7.0),
    Card("V100-32GB", 31.73, 900, 125, 7.0),
    Card("GTX 1080", 7.92, 320, 9, 6.1),
    Card("P100-16GB", 15.89, 732, 19, 6.0),
    Card("P40", 23.87, 346, 12, 6.1),
    Card("GTX 1080 Ti", 10.91, 484, 11, 6.1),
    Card("TITAN RTX", 23.64, 672, 130, 7.5),
    Card("Quadro RTX 8000", 47.46, 672, 130, 7.5),
    Card("RTX 2080 Ti", 10.75, 616, 54, 7.5),
    Card("RTX 3060", 11.76, 360, 51, 8.6),
    Card("RTX 3070", 7.66, 448, 81, 8.6),
    Card("RTX 3080", 9.77, 760, 59, 8.6),
    Card("RTX 3080 Ti", 11.65, 912, 68, 8.6),
    Card("RTX 3090", 23.65, 936, 71, 8.6),
    Card("RTX 3090 Ti", 23.65, 1008, 80, 8.6),
    Card("RTX 4060", 8.00, 272, 61, 8.9),
    Card("RTX 4060 Ti 8GB", 7.62, 288, 88, 8.9),
    Card("RTX 4060 Ti 16GB", 15.60, 288, 88, 8.9),
    Card("RTX 4070", 11.60, 504, 117, 8.9),
    Card("RTX 4070 Ti Super", 15.59, 672, 176, 8.9),
    Card("RTX 4070 Ti", 11.60, 504, 160, 8.9),
    Card("RTX 4080", 15.59, 717, 97, 8.9),
    Card("RTX 4090", 23.64, 1008, 165, 8.9),
    Card("RTX 4090D", 23.55, 1008, 147, 8.9),
    Card("RTX 4090 48GB", 47.50, 1008, 165, 8.9),
    Card("RTX 5060 Ti 16GB", 15.47, 448, 95, 12.0),
    Card("RTX 5070", 11.48, 672, 123, 12.0),
    Card("RTX 5070 Ti", 15.47, 896, 88, 12.0),
    Card("RTX 5080", 15.47, 960, 112, 12.0),
    Card("RTX 5090", 31.36, 1792, 210, 12.0),
    Card("RTX A4000", 15.73, 448, 77, 8.6),
    Card("RTX A2000 12GB", 11.74, 288, 32, 8.6),
    Card("RTX A4500", 19.68, 640, 95, 8.6),
    Card("RTX A5000", 23.68, 768, 111, 8.6),
    Card("RTX A6000", 47.5, 768, 155, 8.6),
    Card("RTX 4000 Ada", 19.55, 360, 107, 8.9),
    Card("RTX 5000 Ada", 31.49, 576, 261, 8.9),
    Card("RTX 6000 Ada", 47.5, 960, 364, 8.9),
    Card("RTX PRO 6000", 95.0, 1792, 500, 12.0),
    Card("GB10", 121.63, 273, 125, 12.1),  # DGX Spark: one memory for CPU and GPU
    Card("A2", 14.54, 200, 18, 8.6),
    Card("A16", 14.54, 200, 18, 8.6),
    Card("L4", 22.05, 300, 121, 8.9),
    Card("L20", 44.4, 864, 119, 8.9),
    Card("L40", 44.4, 864, 181, 8.9),
    Card("L40S", 44.4, 864, 362, 8.9),
    Card("A10", 22.06, 600, 125, 8.6),
    Card("A10G", 22.06, 600, 70, 8.6),
    Card("A30", 23.5, 933, 165, 8.0),
    Card("A40", 44.4, 696, 150, 8.6),
    Card("A100-40GB", 39.45, 1555, 312, 8.0),
    Card("A100-80GB", 79.18, 2039, 312, 8.0),
    Card("A800-80GB", 79.2, 2039, 312, 8.0),
    Card("MI210", 63.98, 1638, 181, 9.0, is_nvidia=False),
    Card("MI250X", 63.98, 1638, 192, 9.0, is_nvidia=False),  # of one of its two dies, which is a device
    Card("MI300X", 191.98, 5300, 1307, 9.4, is_nvidia=False),
    Card("MI308X", 191.98, 5300, 376, 9.4, is_nvidia=False),
    Card("MI325X", 255.98, 6000, 1307, 9.4, is_nvidia=False),
    Card("MI350X", 287.98, 8000, 2300, 9.5, is_nvidia=False),
    Card("MI355X", 287.98, 8000, 2500, 9.5, is_nvidia=False),
    Card("RX 7900 XTX", 23.98, 960, 123, 11.0, is_nvidia=False),
    Card("RX 7900 XT", 19.98, 800, 103, 11.0, is_nvidia=False),
    Card("Radeon PRO W7900", 44.98, 864, 123, 11.0, is_nvidia=False),
    Card("H20", 95.1, 4000, 148, 9.0, fused_all_reduce=True),
    Card("H100-80GB", 79.18, 3350, 989, 9.0, fused_all_reduce=True),
    Card("H100-94GB", 93.1, 3900, 989, 9.0, fused_all_reduce=True),
    Card("GH200-96GB", 94.5, 4000, 989, 9.0, fused_all_reduce=True),
    Card("H20-141GB", 139.8, 4800, 148, 9.0, fused_all_reduce=True),
    Card("H200", 139.8, 4800, 989, 9.0, fused_all_reduce=True),
    Card("B200", 178.0, 8000, 2250, 10.0, fused_all_reduce=True),
    Card("GB200", 184.0, 8000, 2500, 10.0, fused_all_reduce=True),
    Card("B300", 267.0, 8000, 2250, 10.3, fused_all_reduce=True),
)

_ALIASES: Final[dict[str, str]] = {
    "h100": "H100-80GB",
    "h800": "H100-80GB",
    "h80080gb": "H100-80GB",
    "h100sxm": "H100-80GB",
    "h100pcie": "H100-80GB",
    "h10080gbhbm3": "H100-80GB",
    "h100nvl": "H100-94GB",
    "h2096gb": "H20",
    "h200141gb": "H200",
    "h203e": "H20-141GB",
    "mi250": "MI250X",
    "mi300": "MI300X",
    "instinctmi300x": "MI300X",
    "w7900": "Radeon PRO W7900",
    "7900xtx": "RX 7900 XTX",
    "7900xt": "RX 7900 XT",
    "rtx8000": "Quadro RTX 8000",
    "8000": "Quadro RTX 8000",
    "titanrtx": "TITAN RTX",
    "1080ti": "GTX 1080 Ti",
    "rtxa2000": "RTX A2000 12GB",
    "rtx4060ti": "RTX 4060 Ti 16GB",
    "rtx5060ti": "RTX 5060 Ti 16GB",
    "4000ada": "RTX 4000 Ada",
    "5000ada": "RTX 5000 Ada",
    "gh200": "GH200-96GB",
    "a100": "A100-80GB",
    "a100sxm": "A100-80GB",
    "a800": "A800-80GB",
    "a10080gbpcie": "A100-80GB",
    "v100": "V100-32GB",
    "a6000": "RTX A6000",
    "a5000": "RTX A5000",
    "a4000": "RTX A4000",
    "6000ada": "RTX 6000 Ada",
    "rtx6000": "RTX 6000 Ada",
    "rtxpro6000blackwell": "RTX PRO 6000",
    "teslat4": "T4",
    "dgxspark": "GB10",
    "spark": "GB10",
    "rtx5090d": "RTX 5090",
    "5090d": "RTX 5090",
    "1080": "GTX 1080",
}


def find_card(name: str) -> Card:
    """The card of that name: ``H100``, ``NVIDIA H100 80GB HBM3``, ``4090``, ``A100 3g.40gb`` ... Raises UsageError."""
    sliced = re.fullmatch(r"(.+?)[\W_]*(?:mig)?[\W_]*([1-7])g\.(\d+)gb(?:\+\w+)?", name.strip(), re.IGNORECASE)
    if sliced:
        return _slice(find_card(sliced[1]), int(sliced[2]), int(sliced[3]))
    wanted = _normal(name)
    by_name = {_normal(card.name): card for card in CARDS}
    if wanted in _ALIASES:
        return by_name[_normal(_ALIASES[wanted])]
    for key in (wanted, f"rtx{wanted}", re.sub(r"\d+gb$", "", wanted)):
        if key in by_name:
            return by_name[key]
        if key in _ALIASES:
            return by_name[_normal(_ALIASES[key])]
    contained = [key for key in by_name if wanted.startswith(key)]
    if contained:
        return by_name[max(contained, key=len)]
    near = [by_name[key].name for key in difflib.get_close_matches(wanted, by_name, n=5, cutoff=0.3)]
    named = f"near it: {', '.join(near)}" if near else ", ".join(card.name for card in CARDS)
    raise UsageError(
        f"--gpu {name!r} is not in the table of {len(CARDS)} cards; {named}",
        hint=(f"--gpu '{near[0]}', or " if near else "") + f"--gpu '{name}' --gpu-memory 24GiB, for any card",
    )


_IN_QUARTERS: Final = ("A30", "RTX PRO 6000")
_SLICES: Final[dict[int, dict[int, tuple[int, ...]]]] = {  # parts of memory -> compute slices -> parts that they get
    8: {1: (1, 2), 2: (2,), 3: (4,), 4: (4,), 7: (8,)},
    4: {1: (1,), 2: (2,), 4: (4,)},
}


def _slice(card: Card, compute: int, label_gb: int) -> Card:
    """A MIG instance: its share of memory and bandwidth in eighths (quarters of an A30), of arithmetic in sevenths.

    A model that is sold with less memory too (A100) is the one whose slices bear that label. Raises UsageError.
    """
    stem = card.name.split("-")[0]
    for whole in (card, *(each for each in CARDS if each.name.startswith(f"{stem}-"))):
        parts = 4 if whole.name in _IN_QUARTERS else 8
        label = whole.total_gib + (1.2 if whole.total_gib > 30 else 0.5)
        share = round(label_gb / label * parts) / parts
        if share * parts in _SLICES[parts].get(compute, ()) and abs(label * share - label_gb) <= 0.6:
            return Card(
                f"{whole.name} MIG {compute}g.{label_gb}gb",
                round(whole.total_gib * share - (0.35 if share < 1 else 0), 2),
                whole.bandwidth_gb * share,
                whole.tflops * compute / (parts - (parts == 8)),
                whole.capability,
            )
    raise UsageError(
        f"--gpu: {card.name} has no MIG slice {compute}g.{label_gb}gb",
        hint="nvidia-smi mig -lgip lists the profiles; --gpu-memory SIZE takes any",
    )


def card_of_size(total_bytes: int) -> Card | None:
    """The card whose printed total is nearest, None if none is within 2 %: what --gpu-memory alone may mean.

    Of equals the fastest: an 80 GB card is taken for an H100, whose servers start with larger batches.
    """
    near = [card for card in CARDS if abs(card.total_bytes - total_bytes) <= 0.02 * total_bytes]
    return min(
        near, key=lambda card: (abs(card.total_bytes - total_bytes) // (GIB // 4), -card.bandwidth_gb), default=None
    )


def _normal(name: str) -> str:
    text = re.sub(
        r"\b(nvidia|amd|instinct|radeon|tesla|geforce|quadro|sxm\d?|pcie|hbm\de?|generation|edition)\b",
        "",
        name.lower(),
    )
    return re.sub(r"[^a-z0-9]", "", text)
