"""What a start takes of a GPU, term by term, beside the memory model.

    python bench/gpu_memory.py [SHAPE ...] [-tp N] [-pp N] [--enforce-eager]

Dummy weights of published shapes go the way of ``aphro run``: prepare, load, size, warm up with graphs. A row a rank:
blocks as estimated and as the worker sizes them; what the process holds outside torch (context, then communicators
and peers' buffers, then modules and graphs of the warm-up); torch's peak besides weights and cache against the bound
that is kept free for it; and what was left of the budget at the end. GiB unless named otherwise.

What each rank does is told on stderr. One that takes longer than --patience writes where it stands and ends all.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from aphro_core.config import EngineConfig
from aphro_core.host import available_memory_bytes
from aphro_core.messages.steps import StartWorker, WorkerProgress
from aphro_core.parallel import memory
from aphro_core.prepare import EngineOptions, expect_memory, prepare
from aphro_core.reporter import SilentReporter

GIB = 2**30
_DENSE = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
_DENSE |= {"max_position_embeddings": 32768, "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
_QWEN = _DENSE | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}
_NAMES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")


def _shape(base: dict[str, Any], vocab_size: int, *sizes: int, **more: Any) -> dict[str, Any]:
    return base | dict(zip(_NAMES, sizes, strict=True)) | {"vocab_size": vocab_size, **more}


SHAPES = {
    "trial": _shape(_QWEN, 1024, 256, 2, 4, 2, 512),  # of this script itself, with --device cpu
    "0.5b": _shape(_QWEN, 151_936, 896, 24, 14, 2, 4864, tie_word_embeddings=True),  # Qwen2.5-0.5B
    "7b": _shape(_QWEN, 152_064, 3584, 28, 28, 4, 18_944),  # Qwen2.5-7B
    "8b": _shape(_DENSE, 128_256, 4096, 32, 32, 8, 14_336, head_dim=128, rope_theta=5e5),  # Llama-3.1-8B
}
COLUMNS = (
    "shape", "tp", "pp", "rank", "blocks est", "blocks got", "diff", "context", "+groups", "+warm-up", "model", "bound",
    "peak", "reserved", "spare",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "shapes", nargs="*", metavar="SHAPE", default=[], help=f"of {', '.join(SHAPES)}; default: all but the first"
    )
    parser.add_argument("-tp", type=int, default=1)
    parser.add_argument("-pp", type=int, default=1)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--patience", type=int, default=90, metavar="SECONDS", help="for each shape; default: 90")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a trial of the script itself")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--expected", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--foreign", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        faulthandler.dump_traceback_later(arguments.patience, exit=True)
        row = measure(arguments.folder, arguments.rank, arguments.expected, arguments.foreign)
        print(json.dumps(row), flush=True)
        os._exit(0)  # as workers end: the teardown of process groups would wait for peers that end, too
    print("  ".join(COLUMNS), flush=True)
    for shape in arguments.shapes or list(SHAPES)[1:]:
        for row in run_shape(shape, arguments):
            print("  ".join(f"{row[column]:>{len(column)}}" for column in COLUMNS), flush=True)


def run_shape(shape: str, arguments: argparse.Namespace) -> list[dict[str, str]]:
    """A process a rank, as a start has them."""
    tp, pp = arguments.tp, arguments.pp
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(SHAPES[shape]))
        options = EngineOptions(
            model=name,
            load_format="dummy",
            tensor_parallel_size=tp,
            pipeline_parallel_size=pp,
            device=arguments.device,
            enforce_eager=arguments.enforce_eager,
        )
        prepared = prepare(options, SilentReporter())
        expected = expect_memory(prepared, SilentReporter())
        if expected is None:
            raise SystemExit("nvidia-smi does not answer")
        (folder / "engine.json").write_bytes(msgspec.json.encode(prepared.config))
        limiting = min(expected, key=lambda balance: balance.num_blocks)
        foreign = limiting.overhead_bytes - _outside(prepared.config)
        known = ["--folder", name, "--expected", str(limiting.num_blocks), "--foreign", str(foreign)]
        command = [sys.executable, __file__, *known, "--patience", str(arguments.patience)]
        ranks = [
            subprocess.Popen([*command, "--rank", str(rank)], stdout=subprocess.PIPE, text=True)
            for rank in range(tp * pp)
        ]
        while any(rank.poll() is None for rank in ranks):
            if any(rank.poll() for rank in ranks):
                time.sleep(2)  # for the others' own words
                for rank in ranks:
                    rank.kill()
            time.sleep(0.1)
        answers = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"{shape}: ranks ended with {[rank.returncode for rank in ranks]}; the reasons are above")
    return [{"shape": shape, "tp": str(tp), "pp": str(pp)} | json.loads(answer.splitlines()[-1]) for answer in answers]


def measure(folder: Path, rank: int, expected: int, foreign: int) -> dict[str, str]:
    """One rank's row, all values as they are printed. ``foreign`` bytes were held before any rank started."""
    import torch

    from aphro_core.worker.worker import Worker

    config = msgspec.json.decode((folder / "engine.json").read_bytes(), type=EngineConfig)
    size = config.parallel.world_size
    began = time.monotonic()

    def tell(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  rank {rank}: {text}", file=sys.stderr, flush=True)

    def follow(progress: WorkerProgress) -> None:
        if progress.done in (0, progress.total):
            tell(f"{progress.phase} {progress.done}/{progress.total}")

    on_gpu = config.device == "cuda"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    torch.zeros(1, device=device)
    tell("has a context")

    def outside() -> int:
        if not on_gpu:
            return 0
        free, total = torch.cuda.mem_get_info(device)
        return int(total - free - torch.cuda.memory_reserved(device) - foreign)

    context = outside()
    share = 0 if on_gpu else int(available_memory_bytes() * config.cache.cpu_memory_utilization / size)
    worker = Worker(StartWorker(config, rank, rank, str(folder / "store"), share, num_ranks_here=size), follow)
    loaded = worker.load()
    groups = outside() - context
    blocks = loaded.num_blocks
    if size > 1:  # the engine would tell all ranks the least of their numbers
        blocks = _least(blocks, device)
    tell(f"{blocks} blocks")
    worker.allocate(blocks)
    tell("allocated and warm")
    if not on_gpu:
        return dict.fromkeys(COLUMNS, "-") | {"rank": str(rank), "blocks got": str(loaded.num_blocks)}
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    held = loaded.weights_bytes + blocks * loaded.block_bytes
    spare = total * config.cache.gpu_memory_utilization - (total - free)
    return {
        "rank": str(rank),
        "blocks est": str(expected),
        "blocks got": str(loaded.num_blocks),
        "diff": f"{expected / loaded.num_blocks - 1:+.2%}",
        "context": _gib(context),
        "+groups": _gib(groups),
        "+warm-up": _gib(outside() - context - groups),
        "model": _gib(_outside(config)),
        "bound": _gib(loaded.activation_bytes),
        "peak": _gib(torch.cuda.max_memory_allocated(device) - held),
        "reserved": _gib(torch.cuda.memory_reserved(device) - held),
        "spare": _gib(spare),
    }


def _outside(config: EngineConfig) -> int:
    """What a rank holds outside torch, as it is estimated."""
    from aphro_core.checkpoint.open import read_hf_config
    from aphro_core.models.registry import load_spec

    parallel, scheduler = config.parallel, config.scheduler
    tp, pp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    spec = load_spec(read_hf_config(Path(config.model.path)))
    rows = max(scheduler.most_tokens, scheduler.max_num_seqs)
    element = 4 if config.model.dtype == "float32" else 2
    peers = memory.peer_bytes(spec.hidden_size, tp, rows, element)
    peers += memory.peer_logits_bytes(spec.vocab_size, tp, scheduler.max_num_seqs, element)
    return memory.outside_bytes(tp, pp) + peers


def _least(number: int, device: Any) -> int:
    import torch
    import torch.distributed as dist

    least = torch.tensor([number], device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least.item())


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


if __name__ == "__main__":
    main()
