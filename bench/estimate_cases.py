"""``python bench/estimate_cases.py [CASES.json]``: estimates against published server logs, as a table of errors.

A case is a server's printed figures with the configuration that produced them; each is asked with ``--engine
vllm:VERSION`` and what the log shows, the rest by that version's defaults. ``--json`` prints one row a case.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aphro_core.errors import AphroError, PlacementError
from aphro_core.estimate.cards import GIB, Card, find_card
from aphro_core.estimate.config_reader import read_facts
from aphro_core.estimate.estimate import Estimate, estimate
from aphro_core.estimate.quantization import parse_quantization
from aphro_core.estimate.question import DeviceFacts, ModelSource, Question, parse_engine

# cases in which something decides that neither a config nor a command line shows
FAMILIES = {
    "gemma-2": "gemma2",
    "gemma-3": "gemma3_text",
    "gemma-": "gemma",
    "granite": "granite",
    "llama-4": "llama4_text",
}
_RESULT = dict.fromkeys(
    ("gpu_blocks", "kv_cache_tokens", "kv_cache_gib", "weights_gib_per_gpu", "activation_peak_gib", "non_torch_gib")
)
_EMPTY: dict[str, Any] = dict.fromkeys(
    ("engine_version", "engine_mode", "dtype", "kv_cache_dtype", "quantization", "gpu_memory_utilization", "lora",
     "max_model_len", "max_num_batched_tokens", "max_num_seqs", "enforce_eager", "extra")
) | {"engine": "vllm", "tp": 1, "pp": 1, "block_size": 16, "tags": []}  # fmt: skip
SKIPPED_TAGS = {"incomplete", "weights-only", "kv-rate-only", "arch-unknown", "sglang"}


@dataclass(frozen=True)
class Row:
    """One case: relative ``error`` of the printed tokens (of KV GiB where only they are shown), and the verdicts."""

    case: Mapping[str, Any]
    found: Estimate | None
    error: float | None
    fits: bool | None  # as estimated
    why: str = ""

    @property
    def truth(self) -> bool | None:
        fits: bool | None = self.case["result"]["fits"]
        return fits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    beside = Path(__file__).with_name("estimate_held_out.json")
    parser.add_argument("cases", type=Path, nargs="?", default=beside, help=f"default: {beside.name}")
    parser.add_argument("--json", action="store_true", help="one JSON line a case instead of the table")
    parser.add_argument("--all", action="store_true", help="a line a case, before the table")
    arguments = parser.parse_args()
    text = json.loads(arguments.cases.read_text())
    rows = [judge(complete(case), text["architectures"]) for case in text["cases"]]
    if arguments.json:
        for row in rows:
            print(json.dumps({"id": row.case["id"], "error": row.error, "fits": row.fits, "why": row.why}))
        return
    if arguments.all:
        for row in rows:
            print(describe(row))
    print_table(rows)


def complete(case: Mapping[str, Any]) -> dict[str, Any]:
    """With None for what its source does not show."""
    gpu = {"name": None, "total_gib_printed": None, "label_gib": None} | case["gpu"]
    return _EMPTY | dict(case) | {"gpu": gpu, "result": _RESULT | {"fits": None} | case["result"]}


def judge(case: Mapping[str, Any], architectures: Mapping[str, Any]) -> Row:
    """One case asked as its command line would; what cannot be asked says why."""
    result = case["result"]
    architecture = architectures.get(case["arch"] or "")
    config = config_of(architecture, case["arch"]) if architecture else None
    is_other = config is not None and "moe" in case["tags"] and not read_facts(config).is_moe
    if SKIPPED_TAGS & set(case["tags"]) or config is None or is_other or case["engine"] != "vllm":
        return Row(case, None, None, None, "cannot be computed: " + ", ".join(case["tags"] or ["no architecture"]))
    try:
        found = estimate(question_of(case, config), case["tp"] or 1, case["pp"] or 1)
    except PlacementError as error:
        return Row(case, None, None, False, error.message)
    except AphroError as error:
        return Row(case, None, None, None, error.message)
    error = None
    tokens = result["kv_cache_tokens"] or (result["gpu_blocks"] or 0) * case["block_size"]
    if tokens:
        error = found.tokens / tokens - 1
    elif result["kv_cache_gib"] and result["kv_cache_gib"] > 0:
        error = max(found.limiting.left_bytes, 0) / GIB / result["kv_cache_gib"] - 1
    return Row(case, found, error, found.fits)


def question_of(case: Mapping[str, Any], config: Mapping[str, Any]) -> Question:
    """What a user would type: the log's figures, and nothing where the log shows none."""
    version = str(case["engine_version"] or "")
    mode = str(case["engine_mode"] or "").lower()
    engine = "-".join(part for part in (version, mode) if part)
    lora = case["lora"] or {}
    extra = case["extra"] or {}
    return Question(
        source=ModelSource(name=case["model"], facts=read_facts(config), file_bytes=extra.get("file_bytes")),
        device=device_of(case),
        version=parse_engine(f"vllm:{engine}"),
        dtype=case["dtype"] or "auto",
        kv_cache_dtype=case["kv_cache_dtype"] or "auto",
        quantization=parse_quantization(case["quantization"]),
        max_model_len=case["max_model_len"],
        max_num_batched_tokens=case["max_num_batched_tokens"],
        max_num_seqs=case["max_num_seqs"],
        block_size=case["block_size"],
        utilization=case["gpu_memory_utilization"],
        enforce_eager=bool(case["enforce_eager"]),
        max_loras=(lora.get("max_loras") or 1) if lora.get("enabled") else 0,
        max_lora_rank=lora.get("max_rank") or 16,
        prefix_caching=extra.get("prefix_caching"),
        draft_layers=extra.get("extra_kv_layers", 0),
        draft_tokens=extra.get("draft_tokens", 0),
        pp_layers=tuple(extra["pp_layers"]) if extra.get("pp_layers") else None,
    )


def device_of(case: Mapping[str, Any]) -> DeviceFacts:
    gpu = case["gpu"]
    card: Card | None = None
    if gpu["name"]:
        try:
            card = find_card(gpu["name"])
        except AphroError:
            card = None
    total = gpu["total_gib_printed"] or (card.total_gib if card else gpu["label_gib"])
    return DeviceFacts(kind="cuda", total_bytes=round(total * GIB), card=card)


def config_of(architecture: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """The config.json, or one written from the numbers in the keys of its family where the file has none."""
    found: Mapping[str, Any] | None = architecture.get("config_json")
    if found is not None:
        return found
    if architecture["intermediate"] is None or architecture["tied_embeddings"] is None:
        return None
    family = next((kind for prefix, kind in FAMILIES.items() if name.startswith(prefix)), "llama")
    text = {
        "model_type": family,
        "architectures": [family],
        "hidden_size": architecture["hidden"],
        "num_hidden_layers": architecture["num_layers"],
        "num_attention_heads": architecture["heads"],
        "num_key_value_heads": architecture["kv_heads"],
        "head_dim": architecture["head_dim"],
        "vocab_size": architecture["vocab"],
        "intermediate_size": architecture["intermediate"],
        "max_position_embeddings": architecture["max_position"],
        "tie_word_embeddings": architecture["tied_embeddings"],
        "sliding_window": architecture["sliding_window"],
        "torch_dtype": "bfloat16",
    }
    if family == "gemma3_text":  # as all its published configs with images have
        text["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    if architecture["experts"]:
        text |= {
            "num_local_experts": architecture["experts"],
            "num_experts_per_tok": architecture["experts_per_token"],
            "intermediate_size": architecture["moe_intermediate"],
        }
    if architecture["vision_params_est"]:
        whole = family.removesuffix("_text")
        return {"model_type": whole, "architectures": [whole], "text_config": text, "vision_config": {}}
    return text


def print_table(rows: Sequence[Row]) -> None:
    errors = sorted((row for row in rows if row.error is not None), key=lambda row: -abs(row.error or 0.0))
    print(f"{len(rows)} cases, {len(errors)} with a printed size that can be computed")
    for name, chosen in groups_of(errors).items():
        if chosen:
            sizes = sorted(abs(row.error or 0.0) for row in chosen)
            print(f"  {name:34} {len(sizes):3}  median {statistics.median(sizes):7.2%}  p90 {percentile(sizes):7.2%}")
    print_implied(rows)
    judged = [row for row in rows if row.truth is not None and row.fits is not None]
    wrong = [row for row in judged if row.truth != row.fits]
    print(f"fits / does not fit: {len(judged) - len(wrong)} of {len(judged)} right")
    for row in wrong:
        print(f"  wrong: {row.case['id']}: the log says {row.truth}, the estimate {row.fits}")
    print("the five worst:")
    for row in errors[:5]:
        print("  " + describe(row))


def print_implied(rows: Sequence[Row]) -> None:
    """A log that prints a size of at least one request, and no refusal, is of a server that started."""
    started = [row for row in rows if row.truth is None and row.error is not None and row.found is not None]
    wrong = []
    for row in started:
        length, tokens = row.case["max_model_len"], row.case["result"]["kv_cache_tokens"]
        tokens = tokens or (row.case["result"]["gpu_blocks"] or 0) * row.case["block_size"]
        if length and tokens >= length and not row.fits:
            wrong.append(row)
    print(f"started without saying so: {len(started) - len(wrong)} of {len(started)} not refused")
    for row in wrong:
        print(f"  refused: {describe(row)}")


def groups_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    def tagged(*tags: str) -> list[Row]:
        return [row for row in rows if set(tags) & set(row.case["tags"])]

    special = {"vision", "moe", "mla", "hybrid-swa", "hybrid-gdn", "lora", "pathology", "spec-decode"}
    return {
        "all": list(rows),
        "without the sweep": [row for row in rows if not row.case["id"].startswith("sweep")],
        "one per source": one_per_thread(rows),
        "dense text": [row for row in rows if not special & set(row.case["tags"])],
        "tp x pp > 1": [row for row in rows if (row.case["tp"] or 1) * (row.case["pp"] or 1) > 1],
        "experts": tagged("moe"),
        "sliding or linear hybrids": tagged("hybrid-swa", "hybrid-gdn"),
        "vision": tagged("vision"),
        "LoRA": tagged("lora"),
        "second batch": tagged("second batch"),
    }


def one_per_thread(rows: Sequence[Row]) -> list[Row]:
    """Each source counts once, with its median case."""
    threads: dict[str, list[Row]] = {}
    for row in rows:
        threads.setdefault(row.case["thread"], []).append(row)
    return [sorted(each, key=lambda row: abs(row.error or 0.0))[len(each) // 2] for each in threads.values()]


def percentile(sizes: Sequence[float]) -> float:
    """The 90th, by the nearest rank."""
    return sizes[min(int(0.9 * len(sizes)), len(sizes) - 1)]


def describe(row: Row) -> str:
    if row.found is None or row.error is None:
        return f"{row.case['id']:52} -- {row.why or 'fits ' + str(row.fits)}"
    limiting, result = row.found.limiting, row.case["result"]
    terms = []
    for name, ours, theirs in (
        ("weights", limiting.weights_bytes, result["weights_gib_per_gpu"]),
        ("peak", limiting.activation_bytes, result["activation_peak_gib"]),
        ("other", limiting.overhead_bytes, result["non_torch_gib"]),
        ("KV", limiting.left_bytes, result["kv_cache_gib"]),
    ):
        terms.append(f"{name} {ours / GIB:.2f}" + (f" ({theirs:.2f})" if theirs is not None else ""))
    tags = ", ".join(tag for tag in row.case["tags"] if tag != "breakdown")
    return f"{row.case['id']:52} {row.error:+8.2%}  {'; '.join(terms)}  {tags}"


if __name__ == "__main__":
    main()
