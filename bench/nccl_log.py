"""MB/s of the NCCL log scanner on generated logs: ``python bench/nccl_log.py [MB]``. One process, one core."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator

from aphro_core.doctor.nccl_log.facts import LogFacts
from aphro_core.doctor.nccl_log.scan import Scan
from aphro_core.doctor.nccl_log.verdict import judge

_BLOCK = 1 << 20


def channels(rng: random.Random) -> Iterator[str]:
    """Channel lists of 512 ranks on 64 hosts, 32 channels a peer: what a large start prints."""
    while True:
        rank = rng.randrange(512)
        head = f"node{rank // 8}:{4000 + rank % 8}:{5000 + rank % 8} [{rank % 8}] NCCL INFO "
        peer = (rank + 8) % 512
        for channel in range(32):
            way = f"{rank}[{rank % 8}] -> {peer}[{peer % 8}] [send]"
            yield f"{head}Channel {channel:02}/0 : {way} via NET/IB/{rank % 8}/GDRDMA"


def stamped_channels(rng: random.Random) -> Iterator[str]:
    """The same behind kubectl's timestamps and Ray's prefix."""
    for number, line in enumerate(channels(rng)):
        time = f"2026-01-02T10:24:{number % 60:02}.{number % 1000000:06}Z"
        yield f"{time} (RayWorkerWrapper pid={number % 97}, ip=10.0.0.2) {line}"


def collectives(rng: random.Random) -> Iterator[str]:
    """NCCL_DEBUG_SUBSYS=COLL: a line a call."""
    count = 0
    while True:
        count += 1
        yield (
            f"node1:4000:5000 [0] NCCL INFO AllReduce: opCount {count:x} sendbuff {rng.getrandbits(47):#x} recvbuff"
            f" {rng.getrandbits(47):#x} acc (nil) count {rng.randrange(1 << 20)} datatype 7 op 0 root 0 comm"
            f" 0x55d3023a6950 [nranks=8] stream {rng.getrandbits(40):#x}"
        )


def training(rng: random.Random) -> Iterator[str]:
    """A training loop's own lines, hardly any of NCCL."""
    for step, line in enumerate(channels(rng)):
        if step % 100 == 0:
            yield line
        figures = f"step={step} loss={rng.random():.4f} tokens/s={rng.randrange(90000)}"
        yield f"2026-01-02 10:24:27,{step % 1000:03} INFO trainer.py:99] {figures}"


def prose(rng: random.Random) -> Iterator[str]:
    """Free text, no line like another: the slowest case."""
    letters = "etaoinshrdlucmfwypvbgk      "
    while True:
        yield "".join(rng.choices(letters, k=90))


def generate(lines: Callable[[random.Random], Iterator[str]], size: int) -> bytes:
    parts, total = [], 0
    for line in lines(random.Random(1)):
        parts.append(line)
        total += len(line) + 1
        if total >= size:
            break
    return ("\n".join(parts) + "\n").encode()


def main() -> None:
    size = int(float(sys.argv[1]) * 1e6) if len(sys.argv) > 1 else 50_000_000
    for lines in (channels, stamped_channels, collectives, training, prose):
        log = generate(lines, size)
        best = float("inf")
        for _ in range(3):
            facts = LogFacts()
            start = time.process_time()
            Scan(facts).read_file("log", (log[at : at + _BLOCK] for at in range(0, len(log), _BLOCK)))
            best = min(best, time.process_time() - start)
        print(f"{lines.__name__:18} {len(log) / best / 1e6:6.0f} MB/s  {judge(facts).verdict}")


if __name__ == "__main__":
    main()
