"""Run on a host: copies a pattern between each pair of GPUs, both ways, and compares. A JSON line a pair; may hang."""

from __future__ import annotations

import json
import time
from itertools import permutations

import torch

from aphro_core.lifeline import die_with_parent

NUM_ELEMENTS = 16 << 20  # 64 MiB
REPEATS = 8


def pattern(device: str) -> torch.Tensor:
    return torch.arange(NUM_ELEMENTS, dtype=torch.int32, device=device)


def copy(source: str, target: str) -> dict[str, object]:
    x, expected = pattern(source), pattern(target)
    y = torch.zeros_like(expected)
    y.copy_(x)
    is_right = torch.equal(y, expected)
    torch.cuda.synchronize(source)
    torch.cuda.synchronize(target)
    started = time.perf_counter()
    for _ in range(REPEATS):
        y.copy_(x, non_blocking=True)
    torch.cuda.synchronize(source)
    torch.cuda.synchronize(target)
    seconds = (time.perf_counter() - started) / REPEATS
    return {"is_right": is_right, "bytes_per_second": 4 * NUM_ELEMENTS / seconds}


if __name__ == "__main__":
    die_with_parent()
    count = torch.cuda.device_count()
    print(json.dumps({"num_gpus": count}), flush=True)
    for a, b in permutations(range(count), 2):
        is_peer = torch.cuda.can_device_access_peer(a, b)
        print(json.dumps({"source": a, "target": b, "is_peer": is_peer}), flush=True)
        print(json.dumps(copy(f"cuda:{a}", f"cuda:{b}")), flush=True)
