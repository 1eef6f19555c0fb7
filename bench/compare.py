"""aphro beside its peers on this machine, in one run: single stream, 16 streams, prefill of 2,000 tokens.

    python bench/compare.py MODEL.gguf [--rounds 3] [--llama-cpp] [--json FILE]

The same random prompts for every engine, greedy, end-of-sequence ignored. One untimed run of each, then ``--rounds``
rounds that alternate the engines; medians. aphro multiplies the weights expanded to 16 bits and packed as the file has
them. transformers generates in float32 and in bfloat16 and the better figure
counts; its 16 streams are one static batch. llama.cpp runs through the package llama-cpp-python on the same file.
Every engine lives in a process of its own, so that nothing one of them sets reaches another.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aphro_core.host import num_cores

VOCAB = 49_000  # ids below every special token's end of the vocabulary are not needed: ids are only counted
NEW_TOKENS = 64
SCENARIOS: dict[str, tuple[int, int, int]] = {  # requests, prompt tokens, new tokens
    "1 stream": (1, 64, NEW_TOKENS),
    "16 streams": (16, 64, NEW_TOKENS),
    "prefill 2,000": (1, 2000, 1),
}
ENGINES = ("aphro bfloat16", "aphro packed", "transformers float32", "transformers bfloat16", "llama.cpp")


def prompts(scenario: str, round_number: int) -> list[list[int]]:
    """Fresh ids every round, so that no prefix cache helps; the same for every engine."""
    count, length, _ = SCENARIOS[scenario]
    source = random.Random(f"{scenario} {round_number}")
    return [[source.randrange(100, VOCAB) for _ in range(length)] for _ in range(count)]


def rate(scenario: str, seconds: float) -> float:
    """Tokens a second: new tokens, or prompt tokens in the prefill scenario."""
    count, length, new = SCENARIOS[scenario]
    return count * (length if new == 1 else new) / seconds


# ---------------------------------------------------------------- one engine, in a process of its own


def aphro_engine(path: str, quantization: str | None) -> Callable[[list[list[int]], int], None]:
    from aphro_core.llm import LLM
    from aphro_core.request import SamplingParams

    sizes = {"max_num_seqs": 32, "cpu_memory_utilization": 0.2}
    llm = LLM(path, device="cpu", skip_tokenizer_init=True, quantization=quantization, **sizes)

    def generate(ids: list[list[int]], new: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        outputs = llm.generate(ids, params, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == new for output in outputs)

    return generate


def transformers_engine(path: str, threads: int, dtype: str) -> Callable[[list[list[int]], int], None]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from aphro_core.checkpoint.open import open_checkpoint

    torch.set_num_threads(threads)
    with open_checkpoint(Path(path)) as checkpoint:
        settings = dict(checkpoint.hf_config)
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
        missing = model.load_state_dict({n: checkpoint.read(n) for n in checkpoint.tensor_names}, strict=False)
        assert not missing.unexpected_keys, missing
        assert set(missing.missing_keys) <= {"lm_head.weight"}, missing
        model.tie_weights()

    def generate(ids: list[list[int]], new: int) -> None:
        batch = torch.tensor(ids)
        with torch.inference_mode():
            output = model.generate(
                batch, attention_mask=torch.ones_like(batch), do_sample=False, min_new_tokens=new, max_new_tokens=new
            )
        assert output.shape[1] == batch.shape[1] + new

    return generate


def llama_cpp_engine(path: str, threads: int) -> Callable[[list[list[int]], int], None]:
    import llama_cpp

    def generate(ids: list[list[int]], new: int) -> None:
        """One context with all sequences decoded as one batch, as its server does."""
        params = llama_cpp.llama_context_default_params()
        total = sum(len(one) + new for one in ids)
        params.n_ctx, params.n_batch, params.n_ubatch = total + 64 * len(ids), 2048, 512
        params.n_seq_max, params.n_threads, params.n_threads_batch = len(ids), threads, threads
        params.kv_unified = True
        context = llama_cpp.llama_init_from_model(model, params)
        batch = llama_cpp.llama_batch_init(2048, 0, 1)
        vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

        def decode(rows: list[tuple[int, int, int, bool]]) -> None:
            for i, (token, position, sequence, wants_logits) in enumerate(rows):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
                batch.seq_id[i][0], batch.logits[i] = sequence, int(wants_logits)
            batch.n_tokens = len(rows)
            assert llama_cpp.llama_decode(context, batch) == 0

        import numpy

        def greedy(row: int) -> int:
            pointer = llama_cpp.llama_get_logits_ith(context, row)
            return int(numpy.ctypeslib.as_array(pointer, shape=(vocab_size,)).argmax())

        try:
            last: list[int] = []
            for sequence, one in enumerate(ids):
                decode([(t, p, sequence, p == len(one) - 1) for p, t in enumerate(one)])
                last.append(greedy(len(one) - 1))
            for step in range(1, new):
                decode([(last[s], len(one) + step - 1, s, True) for s, one in enumerate(ids)])
                last = [greedy(row) for row in range(len(ids))]
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)

    llama_cpp.llama_backend_init()
    model_params = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
    return generate


def serve_engine(engine: str, path: str, threads: int) -> None:
    """Child process: one JSON line in (scenario, round), one JSON line out (seconds)."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not mix with the answers
    if engine.startswith("aphro"):
        generate = aphro_engine(path, None if engine == "aphro packed" else "none")
    elif engine.startswith("transformers"):
        generate = transformers_engine(path, threads, engine.split()[1])
    else:
        generate = llama_cpp_engine(path, threads)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        scenario, round_number = json.loads(line)
        ids, new = prompts(scenario, round_number), SCENARIOS[scenario][2]
        started = time.perf_counter()
        generate(ids, new)
        print(time.perf_counter() - started, file=answers, flush=True)


# ---------------------------------------------------------------- the run


class Peer:
    def __init__(self, engine: str, path: str, threads: int, python: str) -> None:
        self.engine = engine
        command = [python, __file__, path, "--child", engine, "--threads", str(threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)} if not engine.startswith("aphro") else None
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self._read()

    def time(self, scenario: str, round_number: int) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([scenario, round_number]) + "\n")
        self._process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(
                f"{self.engine} ended: run `{sys.executable} {__file__} MODEL --child '{self.engine}'` to see why"
            )
        return line.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a .gguf file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="an interpreter that has llama-cpp-python (compared too)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        serve_engine(arguments.child, arguments.model, arguments.threads)
        return
    figures = measure(arguments)
    show(figures, arguments.rounds, arguments.threads)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=1))


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """engine -> scenario -> median tokens a second."""
    pythons = dict.fromkeys(ENGINES, sys.executable)
    engines = [engine for engine in ENGINES if engine != "llama.cpp" or arguments.llama_cpp]
    pythons["llama.cpp"] = arguments.llama_cpp
    seconds: dict[tuple[str, str], list[float]] = {}
    peers = [Peer(engine, arguments.model, arguments.threads, pythons[engine]) for engine in engines]
    for scenario in SCENARIOS:
        for round_number in range(-1, arguments.rounds):
            for peer in peers:
                taken = peer.time(scenario, round_number)
                print(f"{scenario:14} round {round_number} {peer.engine:22} {taken:7.2f} s", file=sys.stderr)
                if round_number >= 0:
                    seconds.setdefault((peer.engine, scenario), []).append(taken)
    for peer in peers:
        peer.close()
    return {
        engine: {scenario: rate(scenario, statistics.median(seconds[engine, scenario])) for scenario in SCENARIOS}
        for engine in engines
    }


def show(figures: dict[str, dict[str, float]], rounds: int, threads: int) -> None:
    best = {s: max(figures[e][s] for e in figures if e.startswith("transformers")) for s in SCENARIOS}
    print(f"tokens/s, median of {rounds} rounds, {threads} threads")
    print("| engine | " + " | ".join(SCENARIOS) + " |")
    print("| --- |" + " ---: |" * len(SCENARIOS))
    rows: dict[str, Any] = {e: [f"{figures[e][s]:.1f}" for s in SCENARIOS] for e in figures}
    for ours in ("aphro bfloat16", "aphro packed"):
        rows[f"{ours} / transformers (better of the two)"] = [f"{figures[ours][s] / best[s]:.2f}x" for s in SCENARIOS]
        if "llama.cpp" in figures:
            rows[f"{ours} / llama.cpp"] = [f"{figures[ours][s] / figures['llama.cpp'][s]:.2f}x" for s in SCENARIOS]
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
