"""What aphro itself will allocate: the engine's own memory model where it runs the family, else the general one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from aphro_core.config import EngineConfig
from aphro_core.estimate.activations import Law, Run, activation_peak
from aphro_core.estimate.balance import RankBalance, Sizes
from aphro_core.estimate.facts import LayerFacts, ModelFacts, QuantizationFacts
from aphro_core.estimate.kv_layout import Group, KvLayout, build_layout
from aphro_core.estimate.parameters import RankSlice, rank_heads
from aphro_core.estimate.weights import DTYPE_BYTES, rotary_bytes, weight_bytes
from aphro_core.models.spec import DecoderSpec
from aphro_core.parallel import memory
from aphro_core.parallel.placement import near_groups, place_ranks
from aphro_core.parallel.shard import RankShard, ShardingPlan, build_plan, split_layers

GIB: Final = 2**30
_LAW: Final = Law(  # memory.activation_bytes in a law's terms
    memory.LOGITS_COPIES, 0, 5.0, keeps_expert_space=False, spread=(memory.SPREAD_ROWS, memory.SPREAD_FROM)
)


@dataclass(frozen=True)
class AphroEngine:
    """``spec`` None: a model that aphro does not run. ``device_bytes`` of one rank's device; on CPUs this rank's share
    of the host's free memory. ``foreign_bytes``: what other processes hold of a GPU."""

    spec: DecoderSpec | None
    device_bytes: int
    is_gpu: bool
    foreign_bytes: int = 0
    per_host: int | None = None  # ranks on a host, where there are several
    devices_per_host: int | None = None  # None: as many as there are ranks
    slots: tuple[int, ...] = ()  # devices of each host, where they are known

    def balances(self, facts: ModelFacts, sizes: Sizes, quantization: QuantizationFacts | None) -> list[RankBalance]:
        """In rank order. Raises PlacementError for sizes that the model's shapes forbid."""
        if self.spec is not None:
            plan = build_plan(self.spec, sizes.tp, sizes.pp, sizes.pp_layers, expert_parallel=sizes.expert_parallel)
            return self.balances_of(plan, sizes)
        known: dict[tuple[object, ...], RankBalance] = {}
        balances, near = [], self._near_stages(sizes)
        for stage, layers in enumerate(split_layers(facts.num_layers, sizes.pp, sizes.pp_layers)):
            for tp_rank in range(sizes.tp):
                ends = (stage == 0, stage == sizes.pp - 1)
                part = RankSlice(layers, tp_rank, sizes.tp, *ends, expert_parallel=sizes.expert_parallel)
                heads = rank_heads(facts.num_heads, facts.num_kv_heads, sizes.tp, tp_rank)
                held = len(layers) if facts.is_uniform else layers
                kind = (held, *ends, heads, tp_rank if sizes.expert_parallel else 0, near[stage])
                known[kind] = known.get(kind) or self._general(facts, sizes, quantization, part, near[stage])
                rank = stage * sizes.tp + tp_rank
                balances.append(known[kind].at(rank=rank, stage=stage, tp_rank=tp_rank, layers=layers))
        return balances

    def balances_of(self, plan: ShardingPlan, sizes: Sizes) -> list[RankBalance]:
        """Each rank's balance by the engine's own memory model (parallel/memory.py)."""
        assert self.spec is not None
        known: dict[tuple[object, ...], RankBalance] = {}
        balances, near = [], self._near_stages(sizes)
        is_whole = self.is_gpu and self._is_on_one_host(sizes)
        shares_head = is_whole and memory.shares_head(self.spec, sizes.tp, sizes.pp)
        for shard in plan.ranks:
            is_near = near[shard.pp_rank]
            kind = (*_kind(self.spec, shard), is_near)
            known[kind] = known.get(kind) or self._balance(shard, sizes, is_near, shares_head=shares_head)
            place = known[kind].at
            balances.append(place(rank=shard.rank, stage=shard.pp_rank, tp_rank=shard.tp_rank, layers=shard.layers))
        return balances

    def budget_bytes(self, sizes: Sizes) -> int:
        ranks = 1 if self.is_gpu else sizes.tp * sizes.pp  # ranks on a host's CPUs share what is free there
        ranks = ranks if self.per_host is None else min(ranks, self.per_host)
        return int(self.device_bytes * sizes.utilization / ranks)

    def _is_on_one_host(self, sizes: Sizes) -> bool:
        num_ranks = sizes.tp * sizes.pp
        if sum(self.slots) < num_ranks:
            return num_ranks <= (self.devices_per_host or num_ranks)
        return len({place.host for place in place_ranks(self.slots, sizes.tp, sizes.pp)}) == 1

    def _near_stages(self, sizes: Sizes) -> list[bool]:
        """Of each stage whether its ranks are on one host, and have memory of each other's."""
        if sum(self.slots) < sizes.tp * sizes.pp:  # hosts are unknown, or too few
            return [sizes.tp <= (self.devices_per_host or sizes.tp)] * sizes.pp
        places = place_ranks(self.slots, sizes.tp, sizes.pp)
        return near_groups([place.host for place in places], sizes.tp)

    def overhead_bytes(self, sizes: Sizes, hidden_size: int, vocab_size: int, is_near: bool) -> int:
        """Inside the budget, on GPUs: the CUDA context, with several ranks communicators, and where all of a stage are
        on one host peers' buffers. ``vocab_size`` 0: of a rank whose logits, if it has any, go by NCCL."""
        if not self.is_gpu:
            return 0
        outside = self.foreign_bytes + memory.outside_bytes(sizes.tp, sizes.pp)
        if not is_near:
            return outside
        rows, element = max(sizes.max_num_batched_tokens, sizes.max_num_seqs), DTYPE_BYTES[sizes.dtype]
        logits = memory.peer_logits_bytes(vocab_size, sizes.tp, sizes.max_num_seqs, element)
        return outside + memory.peer_bytes(hidden_size, sizes.tp, rows, element) + logits

    def _balance(self, shard: RankShard, sizes: Sizes, is_near: bool, *, shares_head: bool) -> RankBalance:
        spec, element = self.spec, DTYPE_BYTES[sizes.dtype]
        assert spec is not None
        weights = memory.weights_bytes(spec, shard, element)
        weights += memory.tied_head_bytes(spec, shard, sizes.dtype, element, is_gpu=self.is_gpu)
        activations = memory.working_bytes(
            spec,
            shard,
            max_num_batched_tokens=sizes.max_num_batched_tokens,
            max_num_seqs=sizes.max_num_seqs,
            dtype_bytes=element,
            is_gpu=self.is_gpu,
            max_model_len=sizes.max_model_len,
            block_size=sizes.block_size,
            enforce_eager=sizes.enforce_eager,
        )
        block_bytes = memory.kv_block_bytes(spec, shard, sizes.block_size, sizes.cache_bytes)
        vocab_size = spec.vocab_size if shard.has_head and spec.has_plain_logits else 0
        overhead = self.overhead_bytes(sizes, spec.hidden_size, vocab_size, is_near)
        if shares_head:
            overhead += memory.shared_head_bytes(spec, sizes.max_num_seqs, element)
            weights += memory.helped_head_bytes(spec, sizes.max_num_seqs, element) if shard.has_embedding else 0
        return RankBalance(
            rank=shard.rank,
            stage=shard.pp_rank,
            tp_rank=shard.tp_rank,
            layers=shard.layers,
            num_heads=len(shard.heads),
            num_kv_heads=len(shard.kv_heads),
            budget_bytes=self.budget_bytes(sizes),
            weights_bytes=weights,
            activation_bytes=activations,
            overhead_bytes=overhead,
            layout=KvLayout(block_bytes, sizes.block_size, (Group("full", None, 1),)),
        )

    def _general(
        self,
        facts: ModelFacts,
        sizes: Sizes,
        quantization: QuantizationFacts | None,
        part: RankSlice,
        is_near: bool,
    ) -> RankBalance:
        """Of a model that the engine does not run: by the general laws, as the first rank and stage."""
        run = Run.of(sizes, quantization.scheme if quantization else None)
        run = replace(run, max_num_seqs=min(run.max_num_seqs, memory.SAMPLED_ROWS))  # that are looked at at once
        heads, kv_heads = rank_heads(facts.num_heads, facts.num_kv_heads, sizes.tp, part.tp_rank)
        return RankBalance(
            rank=0,
            stage=0,
            tp_rank=part.tp_rank,
            layers=part.layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            budget_bytes=self.budget_bytes(sizes),
            weights_bytes=weight_bytes(facts, part, sizes.dtype, quantization) + rotary_bytes(facts, sizes.dtype),
            activation_bytes=self._general_activations(facts, sizes, run, samples=part.has_head),
            overhead_bytes=self.overhead_bytes(sizes, facts.hidden_size, facts.vocab_size * part.has_head, is_near),
            layout=build_layout(
                facts,
                part.layers,
                tp=sizes.tp,
                tp_rank=part.tp_rank,
                block_size=sizes.block_size,
                cache_bytes=sizes.cache_bytes,
                dtype_bytes=DTYPE_BYTES[sizes.dtype],
            ),
        )

    def _general_activations(self, facts: ModelFacts, sizes: Sizes, run: Run, *, samples: bool) -> int:
        """memory.working_bytes of a model that has no spec."""
        step = activation_peak(facts, run, _LAW, samples=samples).total
        if not self.is_gpu:
            return step
        rows, element = sizes.max_num_seqs, DTYPE_BYTES[sizes.dtype]
        tokens = memory.fitting_graph_tokens(_layer_parameters(facts), sizes.tp, sizes.max_num_batched_tokens)
        tokens = max(tokens, rows)
        tables = memory.tables_bytes(rows, sizes.max_model_len, sizes.block_size)
        fixed = memory.fixed_bytes(tokens, rows, facts.hidden_size, facts.vocab_size * samples, element) + 2 * tables
        held = memory.held_bytes(step + tables) + fixed
        if sizes.enforce_eager:
            return held
        pool = activation_peak(facts, replace(run, max_num_batched_tokens=tokens), _LAW, samples=False).total
        return held + pool + tables + memory.graph_node_bytes(rows)


def _layer_parameters(facts: ModelFacts) -> int:
    """With which a token is multiplied in the largest layer: its experts', not all of them."""

    def width(layer: LayerFacts) -> int:
        attention, mlp = layer.attention, layer.mlp
        chosen = mlp.experts_per_token * mlp.intermediate_size + mlp.shared_size if mlp.num_experts else 0
        heads = 2 * (attention.num_heads + attention.num_kv_heads) * attention.head_dim
        return heads + mlp.num_matrices * (chosen or mlp.intermediate_size)

    return facts.hidden_size * max(map(width, facts.layers))


def expected_balances(
    spec: DecoderSpec, plan: ShardingPlan, config: EngineConfig, device_bytes: int, foreign_bytes: int = 0
) -> tuple[RankBalance, ...]:
    """What ``aphro estimate`` says of a start with this config, for ``run`` to print beside what was measured.

    ``device_bytes``: the total of the smallest GPU, or the host's free memory. ``foreign_bytes``: what other processes
    hold of the fullest GPU.
    """
    parallel, cache, is_gpu = config.parallel, config.cache, config.device == "cuda"
    sizes = Sizes(
        tp=parallel.tensor_parallel_size,
        pp=parallel.pipeline_parallel_size,
        pp_layers=parallel.pp_layers,
        dtype=config.model.dtype,
        cache_bytes=1 if cache.dtype == "fp8" else DTYPE_BYTES[config.model.dtype],
        block_size=cache.block_size,
        max_model_len=config.model.max_model_len,
        max_num_batched_tokens=config.scheduler.most_tokens,
        max_num_seqs=config.scheduler.max_num_seqs,
        utilization=cache.gpu_memory_utilization if is_gpu else cache.cpu_memory_utilization,
        enforce_eager=config.enforce_eager,
        expert_parallel=parallel.expert_parallel,
    )
    engine = AphroEngine(spec, device_bytes, is_gpu, foreign_bytes)
    return tuple(engine.balances_of(plan, sizes))


def _kind(spec: DecoderSpec | None, shard: RankShard) -> tuple[object, ...]:
    """What a rank's balance depends on."""
    is_uniform = spec is not None and (spec.moe is None or spec.moe.layers is None) and memory.are_layers_alike(spec)
    cuts = (shard.heads, shard.kv_heads, shard.mlp, shard.experts, shard.expert_mlp, shard.shared_mlp, shard.vocab)
    ends = (shard.has_embedding, shard.has_head, shard.tp_rank == 0)
    return (len(shard.layers) if is_uniform else shard.layers, *map(len, cuts), *ends)
