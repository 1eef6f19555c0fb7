"""Times the sampler: milliseconds a step by kind of sampling and number of rows, on a peaked and on a flat row."""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from typing import Any

import torch

from aphro_core.request import SamplingParams
from aphro_core.worker.sampler import Sampler, SamplingRow

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top_k 50, top_p 0.95": {"top_k": 50, "top_p": 0.95},
    "top_p 0.9": {"top_p": 0.9},
    "min_p 0.05": {"min_p": 0.05},
    "top_k 400": {"top_k": 400},
    "greedy, penalties": {"temperature": 0.0, "repetition_penalty": 1.1, "presence_penalty": 0.5},
    "greedy, 5 logprobs": {"temperature": 0.0, "logprobs": 5},
}


def milliseconds(sampler: Sampler, logits: torch.Tensor, rows: list[SamplingRow], repeats: int = 15) -> float:
    times = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        sampler.sample(logits, rows)  # its answer is a list: the device has finished
        times.append((time.perf_counter() - start) * 1000)
    return statistics.median(times[3:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab-size", type=int, default=49152)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, on a CPU")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"--device {device}: torch {torch.__version__} sees no CUDA GPU", file=sys.stderr)
        return 1
    sampler = Sampler(args.vocab_size, device)
    randomness = random.Random(0)
    print(f"vocabulary {args.vocab_size}, {device}, {args.threads} threads; milliseconds a step")
    print(f"{'kind':24}" + "".join(f"{f'{n} peaked':>12}{f'{n} flat':>12}" for n in args.rows))
    for name, dials in KINDS.items():
        cells = []
        for num_rows in args.rows:
            for spread in (4.0, 0.5):
                logits = torch.randn(num_rows, args.vocab_size, device=device) * spread
                tokens = [[randomness.randrange(args.vocab_size) for _ in range(1000)] for _ in range(num_rows)]
                rows = [SamplingRow(i, SamplingParams(**dials), i, 1000, tokens[i], 500) for i in range(num_rows)]
                cells.append(f"{milliseconds(sampler, logits, rows):12.2f}")
        print(f"{name:24}" + "".join(cells), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
