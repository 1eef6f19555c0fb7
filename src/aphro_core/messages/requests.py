"""What crosses between the API process and the engine: requests in, tokens, progress and health out."""

from __future__ import annotations

import msgspec

from aphro_core.config import EngineConfig
from aphro_core.messages.steps import TokenLogprobs, WorkerLoaded
from aphro_core.request import FinishReason, SamplingParams


class StartEngine(msgspec.Struct, frozen=True, tag="start_engine"):
    """``epoch`` counts the engines of a server: each has a channel of its own, so that none hears of another's."""

    config: EngineConfig
    epoch: int = 1


class AddSequence(msgspec.Struct, frozen=True, tag="add"):
    """One choice of a request (``n`` choices are ``n`` sequences with seeds of their own).

    ``output_token_ids`` are tokens that the client has already got: after an engine restart the sequence goes on
    behind them. ``stop_token_ids`` includes end-of-sequence unless ``sampling.ignore_eos``.
    """

    seq_id: int
    prompt_token_ids: list[int]
    sampling: SamplingParams
    seed: int
    max_tokens: int  # output tokens, the earlier ones included; resolved against the context length
    stop_token_ids: list[int]
    output_token_ids: list[int] = []
    cache_salt: str = ""


class AbortSequences(msgspec.Struct, frozen=True, tag="abort"):
    """Forget these sequences; no output follows for them. Unknown ids are ignored."""

    seq_ids: list[int]


class ResumeEngine(msgspec.Struct, frozen=True, tag="resume"):
    """The answer to StepFailed: what was sent before it is void, all that is still open follows."""


class StopEngine(msgspec.Struct, frozen=True, tag="stop_engine"):
    pass


class EngineProgress(msgspec.Struct, frozen=True, tag="engine_progress"):
    rank: int
    phase: str
    done: int
    total: int


class EngineReady(msgspec.Struct, frozen=True, tag="engine_ready"):
    """The engine serves. ``ranks`` in rank order; ``num_blocks`` is the minimum over them."""

    num_blocks: int
    max_model_len: int  # less than asked only where the length may follow the memory
    ranks: list[WorkerLoaded]


class EngineFailed(msgspec.Struct, frozen=True, tag="engine_failed"):
    """The first cause of a failed start or of a death in service; nothing follows.

    ``is_external``: somebody killed or stopped a process, no request did. ``seq_ids`` were in a step just then.
    """

    message: str
    hint: str | None
    exit_code: int
    detail: str = ""  # the failing rank's traceback
    is_external: bool = False
    seq_ids: list[int] = []
    lost_host: str = ""  # of --hosts, that does not answer any more


class EnginePulse(msgspec.Struct, frozen=True, tag="pulse"):
    """Sent a few times a second: the engine's loop runs. ``stalled`` names what keeps a step from advancing."""

    step: int
    stalled: str = ""


class StepFailed(msgspec.Struct, frozen=True, tag="step_failed"):
    """A step failed and the group survived it: every sequence is forgotten, and commands are until ResumeEngine.

    ``seq_ids`` are the sequences that may be the reason.
    """

    message: str
    seq_ids: list[int]
    detail: str = ""


class SequenceOutput(msgspec.Struct, frozen=True, array_like=True):
    """What one sequence gained in a step."""

    seq_id: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the one that ended it, when finish_reason is "stop"
    prompt_logprobs: list[TokenLogprobs] | None = None  # on its first output, for prompt positions 1 ...
    num_cached_tokens: int = 0


class EngineStats(msgspec.Struct, frozen=True, array_like=True):
    """Gauges and counters of the engine, sent with every batch of outputs."""

    step: int
    num_running: int
    num_waiting: int
    num_blocks_used: int
    num_preemptions: int
    num_prefix_queries: int  # prompt tokens looked up in the prefix cache
    num_prefix_hits: int  # prompt tokens found there


class Gains(msgspec.Struct, frozen=True, array_like=True):
    """What the sequences of a step gained. Those of ``seq_ids`` gained the one of ``token_ids`` and nothing else."""

    outputs: list[SequenceOutput] = []
    seq_ids: list[int] = []
    token_ids: list[int] = []


class StepOutputs(msgspec.Struct, frozen=True, tag="outputs"):
    gains: Gains
    stats: EngineStats


ToEngine = StartEngine | AddSequence | AbortSequences | ResumeEngine | StopEngine
FromEngine = EngineProgress | EngineReady | EngineFailed | EnginePulse | StepFailed | StepOutputs
