"""What was asked: one frozen EngineConfig, built once at the door and sent as it is to engine and workers."""

from __future__ import annotations

from typing import Literal

import msgspec

Device = Literal["cpu", "cuda"]
DType = Literal["float32", "bfloat16", "float16"]
CacheDType = Literal["auto", "fp8"]  # auto: as the model's; fp8: float8_e4m3fn
Backend = Literal["inprocess", "mp", "ssh", "ray"]


class FileStamp(msgspec.Struct, frozen=True):
    """What a file of the model was when the server started. A small one has a digest, a large one date and inode."""

    name: str
    num_bytes: int
    digest: str = ""
    changed_ns: int = 0
    inode: int = 0


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Which checkpoint, and how it is read. ``path`` is a local folder or ``.gguf`` file (ids are resolved before)."""

    path: str
    served_name: str
    dtype: DType
    max_model_len: int  # tokens, prompt and output together
    fit_max_model_len: bool = False  # shorten max_model_len to what the memory holds, instead of refusing
    load_format: Literal["auto", "dummy"] = "auto"
    quantization: str | None = None  # as asked with -q; None = as the checkpoint is
    seed: int = 0  # of dummy weights
    model_from: Literal["nodes", "head"] = "nodes"  # head: hosts that lack it read what they need from the engine's
    verify: Literal["headers", "full"] = "headers"  # what is compared of every host's files
    stamps: tuple[FileStamp, ...] = ()  # of this host's files: an engine that is started again loads no others


class HostSlots(msgspec.Struct, frozen=True):
    """A host to start ranks on, as ssh or Ray knows it, and how many of its devices they may take."""

    name: str
    num_slots: int


class RayCluster(msgspec.Struct, frozen=True, kw_only=True):
    """A Ray cluster to start ranks in. ``address``: of its GCS, IP:port, or "auto" for the one that runs here."""

    address: str
    node_address: str = ""  # this host's in it; "" = the one that Ray finds
    token_path: str = ""  # of a file; "" = what Ray's own variables say
    placement_group: str = ""  # id in hex; ranks then take what it has reserved, and nothing else
    url: str = ""  # of the server, for those who ask the cluster what runs in it


class ParallelConfig(msgspec.Struct, frozen=True, kw_only=True):
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    pp_layers: tuple[int, ...] | None = None  # layers of each stage, in order; None = the stated rule
    expert_parallel: bool = False  # tp ranks hold whole experts instead of columns of each
    backend: Backend = "inprocess"
    hosts: tuple[HostSlots, ...] = ()  # of the ssh backend; of ray, the nodes as they were found before the start
    ray: RayCluster | None = None
    environment: dict[str, str] = {}  # of every rank, on top of all other; may hold secrets
    connect_timeout_seconds: float = 10.0  # to each host, over ssh

    @property
    def world_size(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size


class CacheConfig(msgspec.Struct, frozen=True, kw_only=True):
    block_size: int = 16  # tokens
    gpu_memory_utilization: float = 0.90  # of the device's total memory, weights included
    cpu_memory_utilization: float = 0.50  # of the host memory that is free at start, all local ranks together
    num_blocks: int | None = None  # set = no sizing by memory
    enable_prefix_caching: bool = True
    dtype: CacheDType = "auto"


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048  # of a step in which sequences decode: they wait for all of it
    max_num_prefill_tokens: int | None = None  # of a step in which none does; None = the same
    context_per_token: int | None = None  # tokens of context that take as long to read as one of a prompt to compute
    free_context: int = 0  # tokens of it for which a step of max_num_batched_tokens leaves the time
    tokens_unit: int = 1  # of what is left of a step then

    @property
    def most_tokens(self) -> int:
        """Of any step."""
        return max(self.max_num_batched_tokens, self.max_num_prefill_tokens or 0)


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    device: Device = "cpu"
    enforce_eager: bool = False  # no CUDA graphs
    deterministic: bool = False  # a token does not depend on what else is computed (CPU)
    distributed_timeout_seconds: float = 300.0  # rendezvous and every collective
    start_timeout_seconds: float = 1800.0  # from the first worker started to the last one ready
    step_timeout_seconds: float = 10.0  # a step has this long, or a multiple of what steps of its size take

    @property
    def run_ahead(self) -> int:
        """Steps of a sequence that are planned before its last token is read: those of a GPU, which keeps the token.

        A CPU computes while it is asked.
        """
        return 1 if self.device == "cuda" else 0


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The HTTP edge. An empty ``api_keys`` means that anybody who reaches the port may ask."""

    host: str = "127.0.0.1"
    port: int = 2242
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()  # whose pages browsers let ask; none: no CORS at all
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    chat_template: str | None = None  # the template's text; None = the checkpoint's own
    max_queued_requests: int = 1024
    max_num_seqs: int = 256  # that the engine computes at once
    queue_timeout_seconds: float = 600.0  # to a request's first token
    request_timeout_seconds: float = 3600.0  # to its last one
    drain_seconds: float = 30.0
    json_ready: str | None = None  # file that receives the ready record
