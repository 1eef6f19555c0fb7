"""The generations of vLLM (Aphrodite's main follows them): what each subtracts from the budget besides the weights."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final

from aphro_core.errors import UsageError
from aphro_core.estimate.activations import Law
from aphro_core.estimate.cards import Card

GIB: Final = 2**30
_MIB: Final = 2**20

# Copies of float32 logits that a sampler holds: sorting (values, int64 indices, sort buffers, softmax, cumsum), or the
# Triton top-k/top-p kernel with its small buffers. Hidden copies: inputs, residual, norm, attention's output and
# (without a compiled graph) the tensors that Python still names. Read off the printed peaks of estimate_cases.
_OLDEST: Final = Law(9.6, 0, 5.0, keeps_expert_space=False)
_SORTING_V0: Final = Law(9.6, 0, 4.0, keeps_expert_space=False, reduced_copies=1.9)
_SORTING_V1: Final = Law(9.6, 0, 4.25, keeps_expert_space=False, samples_beside_tower=False)
_TRITON: Final = Law(3.61, 50 * _MIB, 4.25, keeps_expert_space=True)


@dataclass(frozen=True)
class Generation:
    """Versions from ``since`` to the next row's. Bytes unless named otherwise.

    ``slack`` multiplies the peak where allocator slack was inside what was measured; ``counts_context`` and
    ``counts_graphs`` say what else was. ``non_torch`` on one GPU is ``kernels`` (by the card) + ``more``.
    """

    since: tuple[int, int, int]
    is_v1: bool
    law: Law
    slack: float = 1.0
    counts_context: bool = False
    counts_non_torch: bool = True
    counts_graphs: bool = False
    has_graphs: bool = True
    graph_gib_per_layer: float = 0.02
    more_non_torch: int = 0
    group_non_torch: int = round(0.35 * GIB)  # with tp > 1, fused all-reduce apart
    has_fused_all_reduce: bool = False
    has_kv_groups: bool = False
    prints_by_concurrency: bool = False
    has_latent_cache: bool = True  # else latent attention keeps whole keys and values, in heads of 256
    retains_reduced: bool = False  # outputs of all-reduces wait for their stream and are not used again in a step
    mxfp4_padding: float = 1.0627
    splits_awq: bool = False  # AWQ products of every size in eight parts of K, summed afterwards
    utilization: float = 0.90


_OLD: Final = Generation(
    (0, 4, 0),
    False,
    _OLDEST,
    slack=1.2,
    counts_context=True,
    group_non_torch=0,
    graph_gib_per_layer=0.006,
    has_latent_cache=False,
)
GENERATIONS: Final[tuple[Generation, ...]] = (
    Generation(
        (0, 0, 0), False, _OLDEST, counts_non_torch=False, has_graphs=False, has_latent_cache=False, splits_awq=True
    ),
    replace(_OLD, since=(0, 2, 5), splits_awq=True, retains_reduced=True),
    replace(_OLD, since=(0, 3, 0), splits_awq=True),
    _OLD,
    replace(_OLD, since=(0, 6, 4), law=replace(_SORTING_V0, hidden_copies=3.0), slack=1.0),
    Generation((0, 6, 5), False, _SORTING_V0, graph_gib_per_layer=0.006, has_latent_cache=False),
    Generation((0, 7, 1), False, _SORTING_V0, graph_gib_per_layer=0.006),
    Generation((0, 8, 0), True, _SORTING_V1, group_non_torch=round(0.545 * GIB)),
    Generation((0, 9, 1), True, _SORTING_V1, group_non_torch=round(0.545 * GIB), has_kv_groups=True),
    Generation(
        (0, 11, 1), True, _SORTING_V1, group_non_torch=round(0.5 * GIB), has_kv_groups=True, mxfp4_padding=1.0904
    ),
    Generation((0, 17, 0), True, _TRITON, group_non_torch=round(0.545 * GIB), has_kv_groups=True, mxfp4_padding=1.0904),
    Generation(
        (0, 18, 0),
        True,
        _TRITON,
        more_non_torch=round(0.12 * GIB),
        group_non_torch=round(0.5 * GIB),
        has_fused_all_reduce=True,
        has_kv_groups=True,
        mxfp4_padding=1.0904,
    ),
    Generation(
        (0, 21, 0),
        True,
        _TRITON,
        more_non_torch=round(0.12 * GIB),
        group_non_torch=round(0.5 * GIB),
        counts_graphs=True,
        has_fused_all_reduce=True,
        has_kv_groups=True,
        prints_by_concurrency=True,
        mxfp4_padding=1.0904,
        utilization=0.92,
    ),
)
_LAST_OF_V0: Final = (0, 11, 0)  # versions below may still have run the old engine
# The release that first runs a model type: what a log without a version can be of at the earliest.
_FIRST_OF_MODEL: Final[tuple[tuple[str, tuple[int, int, int]], ...]] = (
    ("gemma3", (0, 8, 0)),
    ("llama4", (0, 8, 3)),
    ("qwen3", (0, 8, 4)),
    ("gpt_oss", (0, 10, 1)),
    ("glm4_moe", (0, 10, 0)),
    ("qwen3_next", (0, 10, 2)),
    ("qwen3_vl", (0, 11, 0)),
    ("qwen3_5", (0, 21, 0)),
    ("gemma4", (0, 19, 0)),
)
_NAMED: Final[dict[str, tuple[int, int, int]]] = {
    "": (0, 21, 0),
    "latest": (0, 21, 0),
    "main": (0, 21, 0),
    "v0": (0, 7, 1),
    "v1": (0, 11, 0),
}


@dataclass(frozen=True)
class Version:
    """A parsed ``--engine vllm:VERSION``. ``numbers`` decide the generation; ``mode`` the engine where both existed."""

    text: str
    numbers: tuple[int, int, int]
    mode: str | None  # "v0", "v1"
    assumed: str | None = None  # what had to be guessed of it

    def for_model(self, model_type: str) -> Version:
        """The same, or for a version that was guessed the first one that can run the model, if that is later."""
        first = max((since for prefix, since in _FIRST_OF_MODEL if model_type.startswith(prefix)), default=(0, 0, 0))
        return replace(self, numbers=first) if self.assumed and first > self.numbers else self

    def generation(self, card: Card | None) -> Generation:
        """The row that applies. Cards before Ampere ran the old engine up to 0.10, whatever the default was."""
        row = [each for each in GENERATIONS if each.since <= self.numbers][-1]
        is_old_card = card is not None and card.capability < 8.0
        wants_v0 = self.mode == "v0" or (self.mode is None and is_old_card)
        if row.is_v1 and wants_v0 and self.numbers < _LAST_OF_V0:
            return [each for each in GENERATIONS if not each.is_v1][-1]
        if not row.is_v1 and self.mode == "v1":
            return next(each for each in GENERATIONS if each.is_v1)
        return row


def parse_version(text: str) -> Version:
    """``0.19.0``, ``0.8.5.post1``, ``0.9.2-v0``, ``v1``, ``latest``, a commit. Raises UsageError."""
    spelled = text.strip().lower()
    mode = None
    found_mode = re.search(r"(?:^|[-:/ ])(v[01])$", spelled)
    if found_mode:
        mode, spelled = found_mode[1], spelled[: found_mode.start()].strip("-:/ ")
        if not spelled:
            which = "0.7.1 to 0.10" if mode == "v0" else "0.11"
            return Version(text, _NAMED[mode], mode, f"vLLM {mode.upper()} without a version: taken as {which}")
    if spelled in _NAMED:
        return Version(text or "latest", _NAMED[spelled], mode)
    numbers = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", spelled)
    if numbers:
        return Version(text, (int(numbers[1]), int(numbers[2]), int(numbers[3] or 0)), mode)
    if re.fullmatch(r"[0-9a-f]{7,40}", spelled):
        return Version(text, _NAMED["main"], mode, f"commit {spelled[:10]}: taken as the newest version known")
    raise UsageError(
        f"--engine has version {text!r}, allowed: a release such as 0.19.0 or 0.9.2-v0, v0, v1, latest or a commit",
        hint="--engine vllm:0.19.0",
    )


def batch_defaults(version: Version, generation: Generation, card: Card | None, max_model_len: int) -> tuple[int, int]:
    """(max_num_batched_tokens, max_num_seqs) of a server that is told neither (vLLM's get_batch_defaults)."""
    if not generation.is_v1:
        if version.numbers < (0, 2, 0):
            return 2560, 256
        is_chunked = version.numbers >= (0, 5, 4) and max_model_len > 32_768
        chunk = 512 if version.numbers < (0, 6, 4) else 2048
        return (chunk if is_chunked else max(max_model_len, 2048)), 256
    is_large = card is not None and card.total_gib >= 70 and not card.name.startswith("A100")
    max_num_seqs = 1024 if is_large or version.numbers < (0, 8, 4) else 256
    return (8192 if is_large else 2048), max_num_seqs
