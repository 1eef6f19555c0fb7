"""Where a step's time goes on this CPU: microseconds of each part of a decode step and of a prefill.

    python bench/decode_step.py [MODEL.gguf] [--dtype bfloat16] [--threads 2] [--rows 1 16] [--context 128]
                                [--prefill 512 2048] [--rounds 20] [--cpu-time] [--expand]

Without a model: dummy weights of SmolLM2-135M's shape. One row a part (its own time, without the parts inside it), one
column a case; medians over the rounds. ``host`` is everything outside the parts: plan, batch, sampler. For this the
steps are computed call by call; "step, not watched" is what a server does, which makes decode steps again as a whole
where it can (worker/replayed_steps.py). The last rows count the operations of torch in a step, and those of one layer,
call by call. ``--cpu-time`` counts the calling thread's time instead of the wall clock's: with one thread that is
steadier beside a busy neighbour. ``--expand``: the file's weights in 16 bits, not as they are packed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from aphro_core.checkpoint.open import open_checkpoint
from aphro_core.distributed.links import Links
from aphro_core.distributed.stage_links import StageLink
from aphro_core.distributed.tensor_group import TensorParallelGroup
from aphro_core.layers import gathered_attention
from aphro_core.layers.attention import Attention
from aphro_core.layers.block import Block
from aphro_core.layers.decoder import Decoder
from aphro_core.layers.embedding import VocabEmbedding, VocabHead
from aphro_core.layers.gathered_attention import GatheredAttention
from aphro_core.layers.linear import Linear
from aphro_core.layers.mlp import GatedMLP
from aphro_core.layers.norm import RMSNorm
from aphro_core.layers.rotary import RotaryEmbedding, Rotation
from aphro_core.messages.steps import NewSequence, ScheduledSequence, StepPlan
from aphro_core.models.registry import load_spec
from aphro_core.models.spec import DecoderSpec, RopeSpec
from aphro_core.parallel.shard import build_plan
from aphro_core.quantization.linear import QuantizedLinear
from aphro_core.request import SamplingParams
from aphro_core.worker.batch import BatchBuilder
from aphro_core.worker.kv_cache import allocate_kv_cache
from aphro_core.worker.loader import dummy_weights, load_weights
from aphro_core.worker.model_runner import ModelRunner
from aphro_core.worker.sampler import Sampler

BLOCK_SIZE = 16
SMOLLM2 = DecoderSpec(
    architecture="LlamaForCausalLM",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    norm_eps=1e-5,
    rope=RopeSpec(theta=100_000.0, rotary_dim=64),
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
PARTS: dict[str, tuple[Any, str]] = {  # row of the table -> where the call lives
    "linear": (Linear, "__call__"),
    "gate, up": (Linear, "gated"),
    "packed linear": (QuantizedLinear, "__call__"),
    "packed gate, up": (QuantizedLinear, "gated"),
    "norm": (RMSNorm, "__call__"),
    "residual": (RMSNorm, "add_"),
    "rotation": (Rotation, "apply_"),
    "gather": (gathered_attention, "_gather"),
    "attention": (GatheredAttention, "__call__"),
    "attention views": (Attention, "__call__"),
    "activation": (GatedMLP, "__call__"),
    "block": (Block, "__call__"),
    "angles": (RotaryEmbedding, "at"),
    "embedding": (VocabEmbedding, "__call__"),
    "head": (VocabHead, "__call__"),
    "batch": (BatchBuilder, "build"),
    "sampler": (Sampler, "sample"),
}


class Stopwatch:
    """Own time of nested calls."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._inner = [0.0]
        self.seconds: dict[str, float] = {}

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            started = self._clock()
            try:
                return function(*args, **kwargs)
            finally:
                taken = self._clock() - started
                self.seconds[name] = self.seconds.get(name, 0.0) + taken - self._inner.pop()
                self._inner[-1] += taken

        return timed

    @contextmanager
    def watching(self) -> Iterator[None]:
        kept = {name: getattr(owner, attribute) for name, (owner, attribute) in PARTS.items()}
        for name, (owner, attribute) in PARTS.items():
            setattr(owner, attribute, self.wrap(name, kept[name]))
        try:
            yield
        finally:
            for name, (owner, attribute) in PARTS.items():
                setattr(owner, attribute, kept[name])


class OperationCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.views = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        self.views += func.is_view
        return func(*args, **(kwargs or {}))


class Stepper:
    """One rank on its own, driven by hand-made plans."""

    def __init__(self, spec: DecoderSpec, weights: dict[str, Tensor], dtype: torch.dtype, num_blocks: int) -> None:
        shard, device = build_plan(spec, 1, 1).ranks[0], torch.device("cpu")
        group = TensorParallelGroup(0, 1)
        decoder = Decoder(spec, shard, weights, group)
        caches = allocate_kv_cache(shard, spec, num_blocks, BLOCK_SIZE, dtype, device)
        links = Links(group, StageLink(None, None))
        self._runner = ModelRunner(
            spec, shard, decoder, caches, links, block_size=BLOCK_SIZE, dtype=dtype, device=device
        )
        self.steps = self._runner.steps
        self._num_blocks = num_blocks
        self._vocab_size = spec.vocab_size
        self._step = 0
        self._live: list[int] = []

    def begin(self, rows: int, context: int) -> None:
        """Forget all sequences, then prefill ``rows`` new ones of ``context`` tokens, in shuffled blocks."""
        self._position = context
        self._free = torch.randperm(self._num_blocks).tolist()
        self._next_tokens = [1] * rows
        for row in range(rows):
            self.prefill(context, release=row == 0)

    def prefill(self, length: int, release: bool = True) -> None:
        if release:
            released, self._live = self._live, []
            self._free = torch.randperm(self._num_blocks).tolist()
        else:
            released = []
        self._step += 1
        blocks = [self._free.pop() for _ in range(-(-length // BLOCK_SIZE))]
        prompt = torch.randint(0, self._vocab_size, (length,)).tolist()
        new = NewSequence(self._step, prompt, length, SamplingParams(temperature=0.0), 0)
        self._live.append(self._step)
        scheduled = [ScheduledSequence(self._step, 0, length, [], blocks, True)]
        self._runner.execute(StepPlan(self._step, scheduled, [new], released))

    def decode(self) -> None:
        starts_block = self._position % BLOCK_SIZE == 0
        self._step += 1
        scheduled = [
            ScheduledSequence(seq_id, self._position, 1, [token], [self._free.pop()] if starts_block else [], True)
            for seq_id, token in zip(self._live, self._next_tokens, strict=True)
        ]
        result = self._runner.execute(StepPlan(self._step, scheduled))
        assert result is not None
        self._next_tokens = result.token_ids
        self._position += 1


def measure(
    stepper: Stepper, run: Callable[[], None], rounds: int, clock: Callable[[], float]
) -> tuple[float, dict[str, float]]:
    """Median seconds of the untouched step, and of each part while all parts are watched."""
    whole, parts = [], []
    can_replay = stepper.steps.can_replay
    for _ in range(3):
        run()
    for _ in range(rounds):
        started = clock()
        run()
        whole.append(clock() - started)
    stepper.steps.can_replay = False
    for _ in range(rounds):
        watch = Stopwatch(clock)
        with watch.watching():
            started = clock()
            run()
            watch.seconds["host"] = clock() - started - sum(watch.seconds.values())
        parts.append(watch.seconds)
    stepper.steps.can_replay = can_replay
    names = dict.fromkeys(name for part in parts for name in part)
    return statistics.median(whole), {n: statistics.median(part.get(n, 0.0) for part in parts) for n in names}


def count_operations(stepper: Stepper, run: Callable[[], None]) -> tuple[int, int, int, int]:
    """(operations, views) of a step, and of one of its layers, call by call."""
    can_replay, stepper.steps.can_replay = stepper.steps.can_replay, False
    with OperationCounter() as step:
        run()
    block, layer = Block.__call__, OperationCounter()

    def counted(*args: Any) -> Any:
        layer.count = layer.views = 0
        with layer:
            return block(*args)

    Block.__call__ = counted  # type: ignore[method-assign]
    try:
        run()
    finally:
        Block.__call__ = block  # type: ignore[method-assign]
        stepper.steps.can_replay = can_replay
    return step.count, step.views, layer.count, layer.views


def load(
    model: str | None, dtype: torch.dtype, quantization: str | None = None
) -> tuple[DecoderSpec, dict[str, Tensor]]:
    device = torch.device("cpu")
    if model is None:
        return SMOLLM2, dummy_weights(SMOLLM2, build_plan(SMOLLM2, 1, 1).ranks[0], dtype, device, 0)
    with open_checkpoint(Path(model)) as checkpoint:
        spec = load_spec(checkpoint.hf_config, quantization)
        return spec, load_weights(checkpoint, spec, build_plan(spec, 1, 1).ranks[0], dtype, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a checkpoint folder or a .gguf file")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--expand", action="store_true", help="weights of the file in 16 bits, not as they are packed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--context", type=int, default=128, help="tokens behind each row when decoding begins")
    parser.add_argument("--prefill", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--cpu-time", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    spec, weights = load(arguments.model, dtype, "none" if arguments.expand else None)
    longest = max([*arguments.prefill, arguments.context + 2 * arguments.rounds + 12])
    num_rows = max([*arguments.rows, 1])
    stepper = Stepper(spec, weights, dtype, num_rows * (longest // BLOCK_SIZE + 2))
    columns: dict[str, tuple[float, dict[str, float], tuple[int, int, int, int]]] = {}
    for rows in arguments.rows:
        stepper.begin(rows, arguments.context)
        seconds, parts = measure(stepper, stepper.decode, arguments.rounds, clock)
        columns[f"decode {rows}"] = seconds, parts, count_operations(stepper, stepper.decode)
    for length in arguments.prefill:
        seconds, parts = measure(
            stepper, lambda length=length: stepper.prefill(length), max(3, arguments.rounds // 6), clock
        )
        columns[f"prefill {length}"] = (
            seconds,
            parts,
            count_operations(stepper, lambda length=length: stepper.prefill(length)),
        )
    show(columns)


def show(columns: dict[str, tuple[float, dict[str, float], tuple[int, int, int, int]]]) -> None:
    print("| microseconds | " + " | ".join(columns) + " |")
    print("| --- |" + " ---: |" * len(columns))
    for name in (*PARTS, "host"):
        print(
            f"| {name} | " + " | ".join(f"{parts.get(name, 0.0) * 1e6:.0f}" for _, parts, _ in columns.values()) + " |"
        )
    print("| sum | " + " | ".join(f"{sum(parts.values()) * 1e6:.0f}" for _, parts, _ in columns.values()) + " |")
    print("| step, not watched | " + " | ".join(f"{seconds * 1e6:.0f}" for seconds, _, _ in columns.values()) + " |")
    for at, name in enumerate(("operations a step", "views a step", "operations a layer", "views a layer")):
        print(f"| {name} | " + " | ".join(str(counts[at]) for _, _, counts in columns.values()) + " |")


if __name__ == "__main__":
    main()
