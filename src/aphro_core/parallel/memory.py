"""The memory model: bytes of weights, activations and KV blocks on one rank, before anything is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from aphro_core.models.packed import dequantised_weights, is_packed, parameter_bytes, tied_copy_bytes
from aphro_core.models.registry import family_of
from aphro_core.models.spec import DecoderSpec
from aphro_core.models.tensors import rules_of_rank
from aphro_core.parallel.shard import VOCAB_UNIT, RankShard, build_plan, head_halves

# Float32 copies of the sampled rows' logits that live at once in the worst step, one with top-p and penalties: the
# ranks' parts, gathered, with penalties, divided by the temperature, with noise, probabilities, and two while cutting.
LOGITS_COPIES: Final = 8
SAMPLED_ROWS: Final = 256  # that the sampler looks at at once
_GIB: Final = 2**30
# What bench/gpu_memory.py found of a GPU's memory (H100, driver 580, torch 2.11). Outside torch, before the cache is
# sized: the driver's context with torch's own kernels 0.60 GiB; at tp 2 a rank's communicator with its channels and the
# peers' buffers 0.84 GiB, at pp 2 the same and 0.33 GiB for the lines between stages; a second communicator of the same
# ranks 0.48 GiB (tp 2 x pp 2 itself was not measured). By peer memory lines take two steps' hidden states: less, unless
# a step's have more than 0.16 GiB. Outside torch, later: our kernels' modules 0.07 GiB. In torch: a step of 8,192
# tokens reserves 1.45 times what is in use at its peak, because blocks are rounded and fragments of the last step do
# not fit the next.
CONTEXT_BYTES: Final = round(0.6 * _GIB)
COMMUNICATOR_BYTES: Final = round(0.84 * _GIB)
_LINES_BYTES: Final = round(0.33 * _GIB)
_STAGE_GROUP_BYTES: Final = round(0.48 * _GIB)
_MODULE_BYTES: Final = round(0.08 * _GIB)
_ALLOCATOR_SHARE: Final = 1.4  # of the bound below, which is 1.07 times the peak
PRODUCT_BYTES: Final = 2**24 + 2**17  # of products that follow each other (aphro_kernels/skinny_linear.py)
_TABLE_UNIT: Final = 16
_GRAPH_BYTES: Final = 2 * 2**20  # of the driver, a graph of 16 rows
_MOST_MIXED_GRAPHS: Final = 45
GRAPH_TOKENS: Final = (256, 16384)  # of a step with prompts that is a CUDA graph, at least and at most
REPLAYED_BYTES: Final = 64 * 2**20  # of a CPU rank's recorded decode steps, all together
SPREAD_FROM: Final = 24  # rows an expert, on average, from which they may stand by expert on a GPU
SPREAD_ROWS: Final = 128  # of a tile there, of which an expert's last may be padded but for one
_LAYER_TOKENS: Final = 450_000_000_000  # tokens times a layer's parameters that a Hopper GPU computes in 1.3 ms


@dataclass(frozen=True, slots=True)
class RankMemory:
    """One rank's balance in bytes: ``budget`` is what weights, activations and KV cache may take together."""

    rank: int
    budget: int
    weights: int
    activations: int
    block: int

    @property
    def kv_bytes(self) -> int:
        return max(self.budget - self.weights - self.activations, 0)

    @property
    def num_blocks(self) -> int:
        return num_blocks(self.kv_bytes, self.block)


def limiting_rank(ranks: Iterable[RankMemory]) -> RankMemory:
    """The rank with the fewest KV blocks, the first of equals: its number is the whole group's."""
    return min(ranks, key=lambda memory: (memory.num_blocks, memory.rank))


def weights_bytes(spec: DecoderSpec, shard: RankShard, dtype_bytes: int) -> int:
    """Bytes of the parameters on a rank, vocabulary padding included: the sum over the loader's own shapes.

    One layer of each kind stands for all that are alike: a table of plans asks hundreds of times.
    """
    tensors = family_of(spec).tensors
    if not are_layers_alike(spec):
        return parameter_bytes(tensors, spec, shard, dtype_bytes)
    outside = parameter_bytes(tensors, spec, replace(shard, layers=range(0)), dtype_bytes)
    num_layers = Counter(map(spec.has_experts, shard.layers))
    each = {
        kind: parameter_bytes(tensors, spec, example, dtype_bytes) - outside
        for kind, example in _layer_of_each_kind(spec, shard).items()
    }
    return outside + sum(each[kind] * number for kind, number in num_layers.items())


def dequantised_bytes(spec: DecoderSpec, shard: RankShard, dtype_bytes: int) -> int:
    """Of the copy that a GPU makes of one quantised matrix to multiply many rows with: the largest of the rank's."""
    if spec.quantization is None:
        return 0
    parts = _layer_of_each_kind(spec, shard).values() if are_layers_alike(spec) else [shard]
    tensors = family_of(spec).tensors
    return max((dequantised_weights(tensors, spec, part) for part in parts), default=0) * dtype_bytes


def _layer_of_each_kind(spec: DecoderSpec, shard: RankShard) -> dict[bool, RankShard]:
    """By whether it has experts: the rank with one such layer of its own."""
    return {spec.has_experts(layer): replace(shard, layers=range(layer, layer + 1)) for layer in shard.layers}


def are_layers_alike(spec: DecoderSpec) -> bool:
    """Whether every layer of a kind takes as much: not with formats or exceptions of single tensors."""
    found = spec.quantization
    return found is None or (found.layout != "gguf" and not found.ignored)


def tied_head_bytes(spec: DecoderSpec, shard: RankShard, dtype: str, dtype_bytes: int, *, is_gpu: bool) -> int:
    """Bytes of a head that is the embedding's tensor too: what is kept once more, in the order it is multiplied in."""
    return tied_copy_bytes(family_of(spec).tensors, spec, shard, dtype, dtype_bytes, is_gpu=is_gpu)


def kv_block_bytes(spec: DecoderSpec, shard: RankShard, block_size: int, kv_dtype_bytes: int) -> int:
    """Bytes of one block on a rank: K and V of ``block_size`` tokens in each of its layers and KV heads.

    2 x layers x KV heads x block_size x head_dim x bytes; a copied KV head counts on every rank that has it.
    """
    return 2 * len(shard.layers) * len(shard.kv_heads) * block_size * spec.head_dim * kv_dtype_bytes


def working_bytes(
    spec: DecoderSpec,
    shard: RankShard,
    *,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    dtype_bytes: int,
    is_gpu: bool,
    max_model_len: int,
    block_size: int,
    enforce_eager: bool = False,
) -> int:
    """All that a rank keeps free beside weights and cache: what engine and estimate alike call its activations.

    A step's activations; on GPUs with its block tables, what the allocator holds unused, a dequantised matrix, modules,
    what padded steps begin and end in, and what captured graphs keep.

    Not counted of a CPU rank, which leaves half of the free memory alone (``cpu_memory_utilization``): its recorded
    decode steps, at most ``REPLAYED_BYTES``; and the last huge page of each mapping that weights are copied to, less
    than 2 MiB in 32 MiB or in a matrix that is larger.
    """
    step = activation_bytes(spec, shard, max_num_batched_tokens, max_num_seqs, dtype_bytes)
    if not is_gpu:
        return step
    tables = tables_bytes(max_num_seqs, max_model_len, block_size)
    padded = max(max_num_seqs, graph_tokens(spec, shard.tp_size, max_num_batched_tokens))
    vocab_size = len(shard.vocab) * shard.tp_size if shard.has_head else 0
    fixed = fixed_bytes(padded, max_num_seqs, spec.hidden_size, vocab_size, dtype_bytes) + 2 * tables
    graphs = 0 if enforce_eager else graph_bytes(spec, shard, padded, max_num_seqs, dtype_bytes) + tables
    copies = 1 if enforce_eager else 2  # of a step's and, in their pool, of the graphs'
    dequantised = copies * dequantised_bytes(spec, shard, dtype_bytes)
    return held_bytes(step + tables) + dequantised + fixed + graphs


def held_bytes(step_bytes: int) -> int:
    """Of a GPU whose steps allocate so much: with what the allocator holds unused, and modules."""
    return round(step_bytes * _ALLOCATOR_SHARE) + _MODULE_BYTES


def outside_bytes(tp_size: int, pp_size: int) -> int:
    """What a rank's process holds of its GPU outside torch once its weights are loaded."""
    if tp_size == pp_size == 1:
        return CONTEXT_BYTES
    between_stages = _LINES_BYTES + (_STAGE_GROUP_BYTES if tp_size > 1 else 0)
    return CONTEXT_BYTES + COMMUNICATOR_BYTES + (between_stages if pp_size > 1 else 0)


def peer_bytes(hidden_size: int, tp_size: int, most_tokens: int, dtype_bytes: int) -> int:
    """Outside torch too, of GPUs that sum many rows in each other's memory: the others' summands of a rank's
    own rows, and the rows that others own (aphro_kernels/peer_rows.py)."""
    share = -(-most_tokens // tp_size)
    return (2 * tp_size - 1) * share * hidden_size * dtype_bytes if tp_size > 1 else 0


def peer_logits_bytes(vocab_size: int, tp_size: int, max_num_seqs: int, dtype_bytes: int) -> int:
    """Outside torch too, of the ranks that have a head: where all write the logits that rank 0 draws from, memory that
    each of them has, and the largest of each block (aphro_kernels/peer_columns.py)."""
    peaks = -(-vocab_size // VOCAB_UNIT) * 4
    return max_num_seqs * (vocab_size * dtype_bytes + peaks) if tp_size > 1 else 0


def shares_head(spec: DecoderSpec, tp_size: int, pp_size: int) -> bool:
    """Whether the first stage of a pipeline of GPUs of one host makes half of a decode step's logits
    (worker/shared_head.py)."""
    if tp_size > 1 or pp_size == 1 or not spec.has_plain_logits or spec.vocab_size < 2 * VOCAB_UNIT:
        return False
    last = replace(build_plan(spec, 1, 2).ranks[-1], layers=range(0))  # its head may be the embedding's tensor
    rules = rules_of_rank(family_of(spec).tensors, spec, last)
    return not any(rule.parameter == "lm_head.weight" and is_packed(rule, spec) for rule in rules)


def helped_head_bytes(spec: DecoderSpec, max_num_seqs: int, dtype_bytes: int) -> int:
    """Of the first stage, besides its weights: the outputs of a shared head that it makes, rows to multiply, and what
    its products need."""
    rows = len(head_halves(spec.vocab_size)[1]) + max_num_seqs
    return rows * spec.hidden_size * dtype_bytes + PRODUCT_BYTES


def shared_head_bytes(spec: DecoderSpec, max_num_seqs: int, dtype_bytes: int) -> int:
    """Outside torch, of each rank of such a pipeline: where the logits of both are written, and a line for rows."""
    logits = peer_logits_bytes(spec.vocab_size, 2, max_num_seqs, dtype_bytes)
    return logits + 2 * max_num_seqs * spec.hidden_size * dtype_bytes


def activation_bytes(
    spec: DecoderSpec, shard: RankShard, max_num_batched_tokens: int, max_num_seqs: int, dtype_bytes: int
) -> int:
    """Upper bound of what one step allocates besides weights and cache, in bytes.

    With T tokens, H hidden, q/kv the local head widths and I the local MLP columns, a step holds for its whole length
    the residual and its normed copy (2 T H) and, with pp, a received and a sent one (2 T H); at its peak the larger of
    - attention: qkv, its rotated q and k, the output of attention, o_proj: T (2 q + 4 kv + q + H)
    - MLP: gate and up, their product, down_proj: T (3 I + H); with experts, of which a token takes k, besides the
      shared one's as much: T k (3 I + 2 H), its rows copied in and out; or, where rows stand by expert, each expert's
      padded to whole tiles, T H + (T k + SPREAD_ROWS experts) (2 I + H)
    - head: LOGITS_COPIES float32 copies of the logits of min(max_num_seqs, SAMPLED_ROWS, T) rows, whole vocabulary
    plus a float32 copy of the hidden states inside a norm (T H 4) and the step's indices (T x 64 bytes).
    The terms are those of the profiled peaks of served models (forward = T e (3 I + 3 H), sampler = F S V 4). Not
    counted: the K and V that attention copies on CPUs, one layer at a time, at most the cache divided by its layers.
    """
    tokens, hidden = max_num_batched_tokens, spec.hidden_size
    query, kv = len(shard.heads) * spec.head_dim, len(shard.kv_heads) * spec.head_dim
    kept = (2 + 2 * (shard.pp_size > 1)) * tokens * hidden * dtype_bytes
    attention = tokens * (3 * query + 4 * kv + hidden) * dtype_bytes
    mlp = max(tokens * _mlp_width(spec, shard), _spread_size(spec, shard, tokens)) * dtype_bytes
    vocab = len(shard.vocab) * shard.tp_size
    head = LOGITS_COPIES * min(max_num_seqs, SAMPLED_ROWS, tokens) * vocab * 4 if shard.has_head else 0
    return kept + max(attention, mlp, head) + tokens * hidden * 4 + tokens * 64


def _mlp_width(spec: DecoderSpec, shard: RankShard) -> int:
    """Elements a token at the peak of the widest MLP of the rank's layers."""
    dense = 3 * len(shard.mlp) + spec.hidden_size
    if spec.moe is None:
        return dense
    each = 3 * len(shard.expert_mlp) + 2 * spec.hidden_size
    experts = spec.moe.experts_per_token * each + 3 * len(shard.shared_mlp) + 2 * spec.hidden_size
    return experts if all(map(spec.has_experts, shard.layers)) else max(dense, experts)


def _spread_size(spec: DecoderSpec, shard: RankShard, tokens: int) -> int:
    """Elements at the peak of experts whose rows stand by expert (layers/moe.py; 0 where they would be too few)."""
    moe = spec.moe
    if moe is None or tokens * moe.experts_per_token < SPREAD_FROM * moe.num_experts:
        return 0
    places = tokens * moe.experts_per_token + SPREAD_ROWS * len(shard.experts)
    return tokens * spec.hidden_size + places * (2 * len(shard.expert_mlp) + spec.hidden_size)


def graph_tokens(spec: DecoderSpec, tp_size: int, most_tokens: int) -> int:
    """Tokens up to which a step with prompts is a CUDA graph: where launching kernels one by one would take more than
    a good part of the time in which a GPU computes them (1 ms a layer was seen). The same on every rank."""
    moe = spec.moe
    mlp = moe.experts_per_token * moe.intermediate_size + moe.shared_intermediate_size if moe else 0
    width = 2 * (spec.num_heads + spec.num_kv_heads) * spec.head_dim + 3 * max(mlp, spec.intermediate_size)
    return fitting_graph_tokens(spec.hidden_size * width, tp_size, most_tokens)


def fitting_graph_tokens(layer_parameters: int, tp_size: int, most_tokens: int) -> int:
    """:func:`graph_tokens` of layers that multiply each token with so many parameters, over all ranks."""
    least = GRAPH_TOKENS[0]
    fitting = _LAYER_TOKENS * tp_size // layer_parameters // least * least  # 8B: 2,048, as its steps have
    return min(max(fitting, least), GRAPH_TOKENS[1], most_tokens)


def table_width(max_model_len: int, block_size: int) -> int:
    """Blocks of a sequence that its row of a block table has room for. Rows are whole multiples of 16 bytes: Triton
    compiles a kernel again for a pointer that is none."""
    return -(-max_model_len // (block_size * _TABLE_UNIT)) * _TABLE_UNIT


def tables_bytes(max_num_seqs: int, max_model_len: int, block_size: int) -> int:
    """Of a GPU's block tables: two stand in fixed memory, by slot and by row, and a step with chunks makes a third."""
    return (max_num_seqs + 1) * table_width(max_model_len, block_size) * 4


def fixed_bytes(padded_tokens: int, max_num_seqs: int, hidden_size: int, vocab_size: int, dtype_bytes: int) -> int:
    """Upper bound of what padded steps of a GPU begin and end in, captured or not, besides block tables: hidden states
    of as many tokens as the largest has, its numbers, and on a rank that draws from rows of ``vocab_size`` logits
    these, float32, and what the draw keeps of their parts. ``vocab_size`` 0: another rank draws."""
    numbers = padded_tokens * 24 + max_num_seqs * 512 + 4096
    draws = max_num_seqs * (vocab_size * 4 + vocab_size // 12)
    return padded_tokens * hidden_size * dtype_bytes + numbers + draws


def graph_bytes(spec: DecoderSpec, shard: RankShard, padded_tokens: int, max_num_seqs: int, dtype_bytes: int) -> int:
    """Upper bound of what captured graphs keep besides: their own activations, and each graph's nodes.

    All graphs share one pool, as large as the largest needs: the step of ``max_num_seqs`` rows or :func:`graph_tokens`.
    Beside it stands the driver's memory for the graphs.
    """
    return activation_bytes(spec, shard, padded_tokens, 0, dtype_bytes) + graph_node_bytes(max_num_seqs)


def graph_node_bytes(max_num_seqs: int) -> int:
    """Of the driver, for the graphs of as many rows, and of steps with prompts."""
    return (max_num_seqs // 16 + 16 + _MOST_MIXED_GRAPHS) * _GRAPH_BYTES


def num_blocks(budget_bytes: int, block_bytes: int) -> int:
    """Whole blocks in a budget; none in a negative one."""
    return max(budget_bytes // block_bytes, 0)


def blocks_per_request(tokens: int, block_size: int) -> int:
    """Blocks that a request of so many tokens fills, the last one perhaps in part."""
    return -(-tokens // block_size)


def max_useful_blocks(max_num_seqs: int, max_model_len: int, block_size: int) -> int:
    """Blocks that requests can hold at once at most; memory beyond them would never be used."""
    return max_num_seqs * blocks_per_request(max_model_len, block_size)
