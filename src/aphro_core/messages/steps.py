"""What crosses between the engine and a worker: the start-up dialogue, step plans and their results."""

from __future__ import annotations

from typing import Literal

import msgspec

from aphro_core.config import EngineConfig
from aphro_core.messages.model_source import FetchModel, ModelBytes, ModelSource
from aphro_core.request import SamplingParams


class StartWorker(msgspec.Struct, frozen=True, tag="start_worker"):
    """Engine to worker, first frame: who you are. ``store`` is the file where the ranks of the group meet.

    Over hosts there is no such file: ranks meet through their channels (StoreCall). ``environment`` is then set before
    anything is imported that reads it, and the route to ``peers`` decides the interface for collectives.
    """

    config: EngineConfig
    rank: int
    local_rank: int  # index of the device on this host
    store: str
    memory_bytes: int  # this rank's share of the host's memory, measured before any rank started (used on CPUs)
    environment: dict[str, str] = {}
    peers: list[str] = []  # addresses of the other hosts
    address: str = ""  # of this one, among their peers
    measures_links: bool = False  # a tensor-parallel group spans hosts: what its sums cost is to be measured
    source: ModelSource | None = None  # of a model that this host reads from the engine's
    log_file: str = ""  # on the worker's host, where what it prints is kept as well
    num_ranks_here: int = 1  # that share this rank's host


class StoreCall(msgspec.Struct, frozen=True, tag="store_call"):
    """Worker to engine: an operation on what the ranks of a group tell each other while they meet.

    ``set`` keys[0] to ``value``; ``get`` keys[0]; ``add`` ``amount`` to keys[0]; ``check`` that all keys exist;
    ``delete`` keys[0].
    """

    op: Literal["set", "get", "add", "check", "delete"]
    keys: list[str]
    value: bytes = b""
    amount: int = 0


class StoreReply(msgspec.Struct, frozen=True, tag="store_reply"):
    """The value of ``get`` (None: no such key); the new number of ``add``; 1 or 0 for ``check`` and ``delete``."""

    value: bytes | None = None
    number: int = 0


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """Engine to a worker on another host: I am alive. Without one for the length of a lease the worker ends itself."""


class DumpStacks(msgspec.Struct, frozen=True, tag="dump_stacks"):
    """Engine to a worker on another host: write the stacks of your threads to stderr."""


class WorkerAlive(msgspec.Struct, frozen=True, tag="alive"):
    """Worker on another host to engine, every few seconds until it comes to meet the others: it is on its way."""

    rank: int


class WorkerLog(msgspec.Struct, frozen=True, tag="log"):
    """Worker on another host to engine: a line that it wrote to stdout or stderr."""

    rank: int
    line: str


class WorkerProgress(msgspec.Struct, frozen=True, tag="progress"):
    """Worker to engine, any number of times before it serves. ``phase``: on a GPU "device", then
    "rendezvous", "weights", "peer memory" among GPUs, "layers", "cache", and on a GPU "kernels", "graphs"."""

    rank: int
    phase: str
    done: int = 0  # bytes, or whatever the phase counts
    total: int = 0


class LinkCost(msgspec.Struct, frozen=True, array_like=True):
    """Of a tensor-parallel group: one sum of a token's activations, and what a rank sends in sums of many."""

    sum_seconds: float
    bytes_per_second: float


class WorkerLoaded(msgspec.Struct, frozen=True, tag="loaded"):
    """Worker to engine: the weights are in place; ``num_blocks`` is what this rank's memory allows."""

    rank: int
    pid: int
    host: str
    device: str
    weights_bytes: int
    activation_bytes: int
    kv_bytes: int  # budget for the KV cache on this rank
    block_bytes: int
    num_blocks: int
    bytes_read: int  # from the checkpoint
    link: LinkCost | None = None  # where it was to be measured
    bytes_fetched: int | None = None  # of these from the engine's host; None: they were all here


class AllocateCache(msgspec.Struct, frozen=True, tag="allocate"):
    """Engine to worker: the number of blocks that every rank of the group allocates (the minimum over ranks)."""

    num_blocks: int


class WorkerReady(msgspec.Struct, frozen=True, tag="ready"):
    rank: int


class WorkerFailed(msgspec.Struct, frozen=True, tag="failed"):
    """Worker to engine: the last frame of a rank that gives up. ``secondary``: a peer was lost, look elsewhere."""

    rank: int
    host: str
    pid: int
    message: str
    hint: str | None
    exit_code: int
    traceback: str
    secondary: bool = False


class NewSequence(msgspec.Struct, frozen=True, array_like=True):
    """A sequence that the workers do not know (new, or again after a preemption)."""

    seq_id: int
    token_ids: list[int]  # prompt, then the output so far
    num_prompt_tokens: int
    sampling: SamplingParams
    seed: int
    stop_token_ids: list[int] = []  # those that ``sampling.min_tokens`` masks


class ScheduledSequence(msgspec.Struct, frozen=True, array_like=True):
    """One sequence's share of a step: tokens at positions ``start`` to ``start + num_tokens``.

    ``token_ids`` are tokens that the workers have not been given yet (the last sampled one, in decode; nothing in
    prefill: NewSequence carried them). ``new_block_ids`` extend its block table. ``samples``: the step reaches the
    last known token, so one token is drawn from the logits of the last row.
    """

    seq_id: int
    start: int
    num_tokens: int
    token_ids: list[int]
    new_block_ids: list[int]
    samples: bool


class RowsAgain(msgspec.Struct, frozen=True, array_like=True):
    """The rows of the plan before, in its order, each one token on: all decode and all sample.

    ``without`` those at these indexes, rising, which have left; ``new_blocks`` are (index among the rows that are left,
    block id). Tokens that were read meanwhile are told with the next plan of another kind.
    """

    num_rows: int  # that are left
    without: list[int] = []
    new_blocks: list[tuple[int, int]] = []


class StepPlan(msgspec.Struct, frozen=True, tag="plan"):
    """One step. Workers apply it in this order: ``released``, ``new``, ``scheduled``. Plans are applied in order.

    ``again`` stands in the place of ``new`` and ``scheduled``, where workers keep the tokens that they draw.

    ``forgets_all``: whatever the workers keep of any sequence is void. The first plan after a step that failed.
    """

    step_id: int
    scheduled: list[ScheduledSequence] = []
    new: list[NewSequence] = []
    released: list[int] = []  # seq_ids that the workers forget (finished, aborted, preempted)
    forgets_all: bool = False
    again: RowsAgain | None = None

    @property
    def num_rows(self) -> int:
        return len(self.scheduled) if self.again is None else self.again.num_rows

    @property
    def num_tokens(self) -> int:
        return sum(entry.num_tokens for entry in self.scheduled) if self.again is None else self.again.num_rows


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-softmax of the model's raw logits at one position: the chosen token first, then the most likely."""

    token_ids: list[int]
    logprobs: list[float]
    rank: int  # of the chosen token, 1 = most likely


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Entries for the prompt tokens at positions ``start + 1 ...`` that rows ``start ...`` of this step predict."""

    seq_id: int
    entries: list[TokenLogprobs]


class StepFailure(msgspec.Struct, frozen=True, array_like=True):
    """Why a step has no tokens, and the sequences of it that may be the reason (None: any). The group goes on."""

    message: str
    seq_ids: list[int] | None
    detail: str = ""  # the traceback


class StepResult(msgspec.Struct, frozen=True, tag="result"):
    """From the last stage's tp rank 0: a token for each scheduled sequence with ``samples``, in plan order.

    ``logprobs`` by index among them, where asked for. With a ``failure`` nothing is sampled, and what the cache holds
    of the step's sequences is not to be used. Other ranks send one with the failure of a step that failed there, alone.
    """

    step_id: int
    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs] = {}
    prompt_logprobs: list[PromptLogprobs] = []
    failure: StepFailure | None = None


class StopWorker(msgspec.Struct, frozen=True, tag="stop"):
    pass


ToWorker = StartWorker | AllocateCache | StepPlan | StopWorker | StoreReply | ModelBytes | Beat | DumpStacks
FromWorker = (
    WorkerProgress
    | WorkerLoaded
    | WorkerReady
    | WorkerFailed
    | StepResult
    | StoreCall
    | FetchModel
    | WorkerAlive
    | WorkerLog
)
