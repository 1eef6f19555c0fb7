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
    Card("RTX 2080 Ti", 10.75, 616, 54, 7.5),
    Card("RTX 3060", 11.76, 360, 51, 8.6),
    Card("RTX 3080", 9.77, 760, 59, 8.6),
    Card("RTX 3090", 23.65, 936, 71, 8.6),
    Card("RTX 4060", 8.00, 272, 61, 8.9),
    Card("RTX 4060 Ti 16GB", 15.60, 288, 88, 8.9),
    Card("RTX 4070 Ti", 11.60, 504, 160, 8.9),
    Card("RTX 4080", 15.59, 717, 97, 8.9),
    Card("RTX 4090", 23.64, 1008, 165, 8.9),
    Card("RTX 4090D", 23.55, 1008, 147, 8.9),
    Card("RTX 4090 48GB", 47.50, 1008, 165, 8.9),
    Card("RTX 5070 Ti", 15.47, 896, 88, 12.0),
    Card("RTX 5080", 15.47, 960, 112, 12.0),
    Card("RTX 5090", 31.36, 1792, 210, 12.0),
    Card("RTX A4000", 15.73, 448, 77, 8.6),
    Card("RTX A5000", 23.68, 768, 111, 8.6),
    Card("RTX A6000", 47.5, 768, 155, 8.6),
    Card("RTX 6000 Ada", 47.5, 960, 364, 8.9),
    Card("RTX PRO 6000", 95.0, 1792, 500, 12.0),
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
    Card("MI300X", 191.5, 5300, 1307, 9.4, is_nvidia=False),
    Card("H20", 95.1, 4000, 148, 9.0, fused_all_reduce=True),
    Card("H100-80GB", 79.18, 3350, 989, 9.0, fused_all_reduce=True),
    Card("H100-94GB", 93.1, 3900, 989, 9.0, fused_all_reduce=True),
    Card("GH200-96GB", 94.5, 4000, 989, 9.0, fused_all_reduce=True),
    Card("H200", 139.8, 4800, 989, 9.0, fused_all_reduce=True),
    Card("B200", 178.0, 8000, 2250, 10.0, fused_all_reduce=True),
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
    "1080": "GTX 1080",
}


def find_card(name: str) -> Card:
    """The card of that name: ``H100``, ``h100-80gb``, ``NVIDIA H100 80GB HBM3``, ``4090`` ... Raises UsageError."""
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
    near = difflib.get_close_matches(wanted, by_name, n=1, cutoff=0.3)
    raise UsageError(
        f"--gpu {name!r} is not in the table of cards: {', '.join(card.name for card in CARDS)}",
        hint=f"--gpu '{by_name[near[0]].name}'" if near else "--gpu-memory 24GiB, for a card that is not listed",
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
    text = re.sub(r"\b(nvidia|tesla|geforce|quadro|sxm\d?|pcie|hbm\de?|generation|edition)\b", "", name.lower())
    return re.sub(r"[^a-z0-9]", "", text)
