"""S1 to S5 for three model shapes (X1 to X256 for Mixtral's) with dummy weights: rates, latencies, shares of the limit.

    python bench/scenarios.py [--models llama3-8b qwen2.5-0.5b] [--scenarios S1 S2] [--rounds 3] [-tp 2] [--json FILE]
                              [--http | --generate] [-q fp8|int8|int4] [--kv-cache-dtype fp8] [--layers 8]

One untimed run of each scenario, then ``--rounds``; medians. Throughput counts from the first submission to the last
token; TTFT and ITL (time between a stream's tokens) are those of each stream as its client sees them, pooled over the
rounds. "of limit" is the share of what the card's bandwidth and FLOPs allow (bench/workloads.py), "x vLLM" the ratio to
vLLM's recorded figure on an H200: on another card only the share of the limit means anything. ``--http`` asks a server,
``aphro run``, with a stream a request from four client processes; ITL is then the time between a stream's chunks.
``--generate`` hands all requests to ``LLM.generate``, which begins with the longest; it has rates alone.
``--layers``: only so many of the model's, for cards that do not hold all; the limit and the first column say so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
from workloads import CEILINGS, MODELS, SCENARIOS, VLLM, WEIGHT_BYTES, limit, requests

from aphro import LLM
from aphro_core.prepare import EngineOptions, prepare
from aphro_core.reporter import SilentReporter
from aphro_core.request import Request, SamplingParams
from aphro_core.session import Session, open_session

NUM_CLIENTS = 4  # processes of --http


@dataclass
class Round:
    """One run of a scenario: seconds of the whole, of each first token, and between the tokens of a stream."""

    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)


async def run_round(session: Session, scenario: str, repeat: int) -> Round:
    vocab_size = session.frontend.vocab_size
    asked = requests(scenario, vocab_size, repeat)
    round_ = Round()
    started = time.perf_counter()

    async def client(number: int, prompt: list[int], max_tokens: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        request = Request(request_id=f"{scenario}-{number}", prompt=None, prompt_token_ids=prompt, sampling=params)
        last, count = 0.0, 0
        async with session.frontend.stream(request) as deltas:
            async for delta in deltas:
                now = time.perf_counter()
                if count == 0:
                    round_.first.append(now - started)
                elif delta.token_ids:
                    round_.between += [(now - last) / len(delta.token_ids)] * len(delta.token_ids)
                last, count = now, count + len(delta.token_ids)
        assert count == max_tokens, f"request {number} gave {count} of {max_tokens} tokens"

    async with anyio.create_task_group() as tasks:
        for number, (prompt, max_tokens) in enumerate(asked):
            tasks.start_soon(client, number, prompt, max_tokens)
    round_.seconds = time.perf_counter() - started
    return round_


@dataclass(frozen=True)
class Row:
    """What is printed of a scenario. Rates in tokens/s (prompt tokens/s in S4), times in milliseconds."""

    model: str
    scenario: str
    rate: float
    least: float
    most: float
    of_limit: float
    of_vllm: float
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float


def summarise(
    model: str, scenario: str, rounds: list[Round], ceilings: tuple[float, float], tp: int, kept: dict[str, Any]
) -> Row:
    sizes = requests(scenario, 4096, 0)
    tokens = sum(len(prompt) if SCENARIOS[scenario].is_prefill else output for prompt, output in sizes)
    rates = [tokens / one.seconds for one in rounds]
    rate = statistics.median(rates)
    first = [1e3 * value for one in rounds for value in one.first]
    between = [1e3 * value for one in rounds for value in one.between]
    return Row(
        model,
        scenario,
        rate,
        min(rates),
        max(rates),
        rate / limit(model, scenario, *ceilings, tp, **kept),
        rate / VLLM.get((model, tp), {}).get(scenario, float("nan")),
        percentile(first, 50),
        percentile(first, 99),
        percentile(between, 50),
        percentile(between, 99),
    )


def percentile(values: list[float], share: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) * share // 100, len(ordered) - 1)] if ordered else float("nan")


@asynccontextmanager
async def served(model: str, options: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """A server of its own process; yields where it is."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODELS[model]))
        ready = Path(folder) / "ready.json"
        words = ["--load-format", "dummy", "--skip-tokenizer-init", "--port", "0", "--json-ready", str(ready)]
        for name, value in options.items():
            flag = f"--{name.replace('_', '-')}"
            words += [flag] if value is True else [f"--no-{flag[2:]}"] if value is False else [flag, str(value)]
        command = [sys.executable, "-m", "aphro_cli.main", "run", folder, *words]
        log = Path(folder) / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out)  # noqa: ASYNC220
        try:
            while not ready.exists():
                assert process.poll() is None, log.read_text()[-2000:]
                await anyio.sleep(0.05)
            host, port = json.loads(ready.read_text())["url"].removeprefix("http://").rsplit(":", 1)
            yield {"host": host, "port": int(port), "model": Path(folder).name}
        finally:
            process.terminate()
            process.wait(timeout=60)


async def run_http_round(where: dict[str, Any], vocab_size: int, scenario: str, repeat: int) -> Round:
    asked = requests(scenario, vocab_size, repeat)
    clients = min(NUM_CLIENTS, len(asked))
    start = time.monotonic() + 1.0 + len(asked) / 500
    round_ = Round()

    async def client(number: int) -> None:
        job = json.dumps({**where, "start": start, "requests": asked[number::clients]}) + "\n"
        command = [sys.executable, str(Path(__file__).with_name("http_client.py"))]
        done = await anyio.run_process(command, input=job.encode(), stderr=None)
        for times in json.loads(done.stdout):
            round_.first.append(times[0])
            round_.between += [after - before for before, after in pairwise(times)]
            round_.seconds = max(round_.seconds, times[-1])

    async with anyio.create_task_group() as tasks:
        for number in range(clients):
            tasks.start_soon(client, number)
    return round_


@asynccontextmanager
async def generating(model: str, options: dict[str, Any]) -> AsyncIterator[LLM]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODELS[model]))
        with LLM(folder, load_format="dummy", skip_tokenizer_init=True, **options) as llm:
            yield llm


async def run_generate_round(llm: LLM, vocab_size: int, scenario: str, repeat: int) -> Round:
    asked = requests(scenario, vocab_size, repeat)
    common = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
    params = [SamplingParams(max_tokens=most, **common) for _, most in asked]
    prompts = [prompt for prompt, _ in asked]
    started = time.perf_counter()
    outputs = await anyio.to_thread.run_sync(lambda: llm.generate(prompts, params, use_tqdm=False))
    took = time.perf_counter() - started
    assert [len(output.outputs[0].token_ids) for output in outputs] == [most for _, most in asked]
    return Round(took)


@asynccontextmanager
async def opened(model: str, options: dict[str, Any]) -> AsyncIterator[Session]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODELS[model]))
        asked = EngineOptions(model=folder, load_format="dummy", skip_tokenizer_init=True, **options)
        prepared = prepare(asked, SilentReporter())
        async with open_session(prepared, asked, SilentReporter(), max_queued_requests=2**31) as session:
            await session.wait_ready()
            yield session


async def measure(model: str, arguments: argparse.Namespace, ceilings: tuple[float, float]) -> list[Row]:
    options: dict[str, Any] = {
        "tensor_parallel_size": arguments.tp,
        "pipeline_parallel_size": arguments.pp,
        "enable_prefix_caching": False,
        "kv_cache_dtype": arguments.kv_cache_dtype,
        **({"quantization": arguments.q} if arguments.q else {}),
        **json.loads(arguments.options),
    }
    rows = []
    started = time.perf_counter()
    open_target = served if arguments.http else generating if arguments.generate else opened
    async with open_target(model, options) as target:
        print(f"{model}: ready after {time.perf_counter() - started:.1f} s", flush=True)
        for scenario in arguments.scenarios:
            vocab_size = MODELS[model]["vocab_size"]
            if isinstance(target, Session):
                run = partial(run_round, target, scenario)
            elif isinstance(target, LLM):
                run = partial(run_generate_round, target, vocab_size, scenario)
            else:
                run = partial(run_http_round, target, vocab_size, scenario)
            await run(-1)
            rounds = [await run(repeat) for repeat in range(arguments.rounds)]
            kept = {"quantization": arguments.q, "kv_dtype_bytes": 1 if arguments.kv_cache_dtype == "fp8" else 2}
            rows.append(summarise(model, scenario, rounds, ceilings, arguments.tp * arguments.pp, kept))
            print(line(rows[-1]), flush=True)
    return rows


HEADER = (
    "| model | | tokens/s (least-most) | of limit | x vLLM | TTFT ms p50 / p99 | ITL ms p50 / p99 |\n"
    "| --- | --- | ---: | ---: | ---: | ---: | ---: |"
)


def line(row: Row) -> str:
    return (
        f"| {row.model} | {row.scenario} | {row.rate:,.0f} ({row.least:,.0f}-{row.most:,.0f}) | {row.of_limit:.0%} | "
        f"{row.of_vllm:.2f} | {row.ttft_p50:.1f} / {row.ttft_p99:.1f} | {row.itl_p50:.2f} / {row.itl_p99:.2f} |"
    )


def with_layers(model: str, layers: int) -> str:
    """The name of the same shape with so many layers, which has no figure of vLLM's."""
    name = f"{model} ({layers} of {MODELS[model]['num_hidden_layers']} layers)"
    MODELS[name] = {**MODELS[model], "num_hidden_layers": layers}
    return name


def card() -> str:
    """The first GPU's name, or "CPU"."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=list(MODELS), default=["llama3-8b", "qwen2.5-7b", "qwen2.5-0.5b"]
    )
    parser.add_argument("--scenarios", nargs="+", choices=list(SCENARIOS), default=["S1", "S2", "S3", "S4", "S5"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-tp", type=int, default=1)
    parser.add_argument("-pp", type=int, default=1)
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--http", action="store_true", help="over HTTP, with streaming clients")
    way.add_argument("--generate", action="store_true", help="through LLM.generate")
    parser.add_argument("-q", choices=[name for name in WEIGHT_BYTES if name], help="quantise the weights")
    parser.add_argument("--kv-cache-dtype", choices=["auto", "fp8"], default="auto")
    parser.add_argument("--layers", type=int, help="of the model, to fit a card that does not hold all")
    parser.add_argument("--options", default="{}", help="further EngineOptions as JSON")
    parser.add_argument("--json", help="file that gets the rows")
    arguments = parser.parse_args()
    if arguments.layers:
        arguments.models = [with_layers(model, arguments.layers) for model in arguments.models]
    name = card()
    ceilings = next((value for key, value in CEILINGS.items() if key in name), CEILINGS["H200"])
    print(
        f"{name}: limits from {ceilings[0] / 1e12:.1f} TB/s and {ceilings[1] / 1e12:.0f} TFLOP/s\n{HEADER}", flush=True
    )
    rows = [row for model in arguments.models for row in anyio.run(measure, model, arguments, ceilings)]
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"card": name, "rows": [asdict(row) for row in rows]}) + "\n")


if __name__ == "__main__":
    main()
