"""Two hosts against one with the same number of ranks: seconds from `run` to ready, and tokens/s.

    python bench/hosts.py MODEL --hosts a:1,b:1        # yours, over ssh; one host is this one
    python bench/hosts.py MODEL [--ray]                # hosts made of network namespaces here (root): the same cores,
                                                       # so that what differs is the way between the ranks
    options: [--requests 8] [--tokens 64] [--rounds 2] [--device cpu] [--link 1gbit] [--splits="-tp 2,-pp 2"]
             [-- further options of `run`]

The server is started by the command line, as an operator does, and asked over HTTP. The best of the rounds counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx

ROOT = Path(__file__).parent.parent
PROMPT_TOKENS = 64


class Measured(NamedTuple):
    ready_seconds: float
    one_stream: float  # tokens/s
    all_streams: float


def measure(model: str, words: Sequence[str], options: argparse.Namespace) -> Measured:
    with tempfile.TemporaryDirectory() as folder, running(Path(folder), model, words) as (url, ready_seconds):
        ask(url, 1, 8)  # the first step is not like the others
        rates = [(ask(url, 1, options.tokens), ask(url, options.requests, options.tokens)) for _ in range(2)]
    return Measured(ready_seconds, max(one for one, _ in rates), max(many for _, many in rates))


@contextmanager
def running(folder: Path, model: str, words: Sequence[str]) -> Iterator[tuple[str, float]]:
    ready, began = folder / "ready.json", time.monotonic()
    command = [sys.executable, "-m", "aphro_cli.main", "run", model, "--port", "0", "--json-ready", str(ready), *words]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, "--skip-tokenizer-init"], stdout=log, stderr=log)
    try:
        while not ready.exists():
            if process.poll() is not None:
                sys.exit((folder / "log").read_text())
            time.sleep(0.01)
        yield json.loads(ready.read_text())["url"], time.monotonic() - began
    finally:
        process.terminate()
        process.wait(30)


def ask(url: str, num_requests: int, num_tokens: int) -> float:
    """Tokens/s of so many requests at once, prompts included in the time."""

    def complete(number: int) -> int:
        prompt = [3 + (number * 31 + at * 7) % 1000 for at in range(PROMPT_TOKENS)]
        body = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=600).json()
        return int(answer["usage"]["completion_tokens"])

    began = time.monotonic()
    with ThreadPoolExecutor(num_requests) as threads:
        total = sum(threads.map(complete, range(num_requests)))
    return total / (time.monotonic() - began)


@contextmanager
def made_hosts(options: argparse.Namespace) -> Iterator[dict[str, list[str]]]:
    """Name of a way between ranks -> the words of `run` for it."""
    with ExitStack() as stack:
        if options.hosts:
            yield {"ssh": ["--hosts", options.hosts]}
            return
        sys.path.insert(0, str(ROOT))
        from tests.netns.hosts import hosts

        nodes = stack.enter_context(hosts(2))
        for node in nodes:
            if options.link:
                node.slow_link(options.link)
        ways = {"ssh": ["--hosts", ",".join(f"{node.name}:1" for node in nodes)]}
        if options.ray:
            from tests.netns.ray_nodes import ray_nodes

            stack.enter_context(ray_nodes(nodes, {node.name: 1 for node in nodes}))
            ways["ray"] = ["--distributed-executor-backend", "ray"]
        yield ways


def main() -> None:
    parser = argparse.ArgumentParser(usage=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("model")
    parser.add_argument("--hosts", default="")
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--link", default="")
    parser.add_argument("--splits", default="-tp 2,-pp 2")
    parser.add_argument("rest", nargs="*")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(f"| split | ranks | ready after | tokens/s, 1 stream | tokens/s, {options.requests} streams |")
    print("| --- | --- | ---: | ---: | ---: |")
    with made_hosts(options) as ways:
        for split in options.splits.split(","):
            best: dict[str, Measured] = {}
            for _ in range(options.rounds):  # side by side: a busy moment meets every way
                for way, words in {"one host (mp)": ["--distributed-executor-backend", "mp"], **ways}.items():
                    found = measure(
                        options.model, [*split.split(), "--device", options.device, *words, *options.rest], options
                    )
                    old = best.get(way, found)
                    best[way] = Measured(min(found[0], old[0]), max(found[1], old[1]), max(found[2], old[2]))
            for way, found in best.items():
                name = way if way in ("one host (mp)",) else f"two hosts ({way})"
                print(f"| `{split}` | {name} | {found[0]:.1f} s | {found[1]:.1f} | {found[2]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
