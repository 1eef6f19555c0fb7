"""The kernels on CPU tensors in Triton's interpreter: small and odd shapes. test_kernels.py runs them."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from aphro_kernels.decode_work import build_decode_work, plan_decode_
from aphro_kernels.float8_linear import Float8Config
from aphro_kernels.peer_line import put
from aphro_kernels.skinny_linear import SkinnyConfig
from aphro_kernels.tile_linear import TileConfig
from hypothesis import given, settings
from hypothesis import strategies as st

from aphro_core.distributed import stage_lines
from aphro_core.distributed.links import Links
from aphro_core.distributed.stage_lines import Messages, by_peer_memory, num_bytes
from aphro_core.distributed.stage_links import StageLink
from aphro_core.distributed.tensor_group import TensorParallelGroup
from aphro_core.parallel.shard import build_plan
from aphro_core.worker import shared_head
from aphro_core.worker.shared_head import HeadHelper, HeadOwner
from tests.core.worker.product import Product
from tests.core.worker.test_batch import SPEC
from tests.kernels.comparisons import (
    compare_attention,
    compare_begin_step,
    compare_drawn_columns,
    compare_end_rows,
    compare_expert_rows,
    compare_grouped_linear,
    compare_grouped_packed_linear,
    compare_list_tiles,
    compare_packed_linear,
    compare_peer_all_reduce,
    compare_peer_columns,
    compare_peer_line,
    compare_peer_two_shot,
    compare_plan_tiles,
    compare_quantise_rows,
    compare_rms_norm,
    compare_rotary,
    compare_rotary_angles,
    compare_route,
    compare_sample,
    compare_silu_and_mul,
    compare_skinny_linear,
    compare_split_places,
)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize(("num_tokens", "width"), [(0, 64), (1, 1), (3, 63), (2, 576), (2, 1500)])
def test_rms_norm(num_tokens: int, width: int, dtype: torch.dtype) -> None:
    compare_rms_norm(num_tokens, width, dtype, "cpu")


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("num_tokens", "width"), [(0, 8), (1, 1), (3, 63), (2, 1500)])
def test_silu_and_mul(num_tokens: int, width: int, dtype: torch.dtype) -> None:
    compare_silu_and_mul(num_tokens, width, dtype, "cpu")


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_kv_heads", "head_dim", "rotary_dim", "dtype"),
    [
        (1, 1, 1, 64, 64, F32),
        (21, 9, 3, 64, 64, F32),  # SmolLM2: 15 heads in all
        (5, 14, 2, 64, 64, BF16),  # 18 heads: two programs a token
        (3, 4, 2, 80, 80, F32),
        (3, 4, 2, 96, 48, F32),  # half of a head rotates
        (2, 4, 1, 256, 256, F16),
        (0, 2, 1, 64, 64, F32),
    ],
)
def test_rotary(
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    dtype: torch.dtype,
    has_norm: bool,
) -> None:
    compare_rotary(num_tokens, num_heads, num_kv_heads, head_dim, rotary_dim, dtype, "cpu", has_norm)


def test_rotary_into_float8() -> None:
    compare_rotary(21, 9, 3, 64, 64, F32, "cpu", is_float8=True)


@pytest.mark.parametrize(("num_tokens", "half"), [(0, 4), (1, 32), (37, 40)])
def test_rotary_angles(num_tokens: int, half: int) -> None:
    compare_rotary_angles(num_tokens, half, "cpu")


@pytest.mark.parametrize("num_rows", [0, 1, 9])
@pytest.mark.parametrize("is_whole", [False, True])
def test_begin_step(num_rows: int, is_whole: bool) -> None:
    compare_begin_step(num_rows, "cpu", is_whole=is_whole)


@pytest.mark.parametrize("num_rows", [0, 1, 150])
def test_end_rows(num_rows: int) -> None:
    compare_end_rows(num_rows, "cpu", has_bad=num_rows != 1)


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("seq_lens", [[1, 16, 63], [257, 0, 400], [0, 0]])
def test_decode(seq_lens: list[int], window: int | None) -> None:
    compare_attention([1] * len(seq_lens), seq_lens, 6, 2, 64, F32, "cpu", window)


@pytest.mark.parametrize(("is_new", "any_new"), [(None, 1), ([0, 0, 0], 0), ([0, 1, 0], 1)])
def test_plan_says_whether_a_row_may_read_what_its_step_writes(is_new: list[int] | None, any_new: int) -> None:
    size = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": F32, "device": torch.device("cpu")}
    work = build_decode_work(3, **size, num_programs=5)
    column = None if is_new is None else torch.tensor([[7, new] for new in is_new])[:, 1]
    plan_decode_(work, torch.tensor([300, 1, 130], dtype=torch.int32), 2, is_new=column)
    assert work.totals.tolist() == [2 * (3 + 1 + 2), 5, any_new]
    assert work.stretches[:, 7].tolist() == [[300, 1, 130][row] for row in work.stretches[:, 2].tolist()]


@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize(
    ("query_lens", "seq_lens"),
    [([5, 1, 33, 1], [5, 70, 50, 1]), ([70, 17, 2], [0, 100, 2])],
)
def test_chunks(query_lens: list[int], seq_lens: list[int], window: int | None) -> None:
    compare_attention(query_lens, seq_lens, 6, 2, 64, F32, "cpu", window)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "dtype"),
    [(3, 3, 80, F32), (7, 1, 96, F32), (32, 1, 128, F16), (2, 1, 256, F32), (4, 2, 8, F32)],
)
def test_heads(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    compare_attention([1, 1], [30, 200], num_heads, num_kv_heads, head_dim, dtype, "cpu")
    compare_attention([9, 20], [9, 40], num_heads, num_kv_heads, head_dim, dtype, "cpu")


@pytest.mark.parametrize(("softcap", "is_float8"), [(0.7, False), (None, True), (0.7, True)])
def test_caps_and_float8(softcap: float | None, is_float8: bool) -> None:
    options = {"softcap": softcap, "is_float8": is_float8}
    compare_attention([1, 1, 1], [70, 0, 129], 6, 2, 64, F32, "cpu", 100, **options)
    compare_attention([5, 1, 33], [5, 70, 50], 6, 2, 64, F32, "cpu", **options)


@pytest.mark.parametrize("seq_lens", [[900, 2], [300, 340, 280], [64] * 7, [900]])
def test_rows_in_pieces_of_their_own(seq_lens: list[int]) -> None:
    compare_attention([1] * len(seq_lens), seq_lens, 2, 1, 64, F32, "cpu")


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize(
    ("num_tokens", "top", "num_experts", "here", "shape"),
    [
        (1, 2, 5, range(5), (72, 40)),
        (33, 2, 3, range(3), (48, 128)),
        (20, 3, 7, range(3, 5), (65, 33)),
        (3, 2, 4, range(1, 3), (16, 16)),
        (3, 1, 4, range(4, 4), (16, 16)),
        (0, 2, 4, range(4), (16, 16)),
    ],
)
def test_grouped_linear(  # not bfloat16: the interpreter's tl.dot takes its bits for integers
    num_tokens: int, top: int, num_experts: int, here: range, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    is_gated = num_tokens % 2 == 1
    compare_grouped_linear(num_tokens, top, num_experts, here, shape, dtype, "cpu", is_gated=is_gated)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("num_tokens", "num_experts", "top"), [(1, 8, 2), (5, 60, 4), (3, 4, 4)])
def test_route(num_tokens: int, num_experts: int, top: int, dtype: torch.dtype) -> None:
    compare_route(num_tokens, num_experts, top, dtype, "cpu")


@pytest.mark.parametrize(
    ("num_tokens", "top", "num_experts", "here", "rows"),
    [
        (1, 2, 8, range(8), 16),
        (5, 4, 60, range(20, 60), 16),
        (300, 2, 8, range(3, 6), 128),
        (2, 2, 4, range(4, 4), 16),
        (20, 8, 128, range(128), 128),
    ],
)
def test_plan_tiles(num_tokens: int, top: int, num_experts: int, here: range, rows: int) -> None:
    compare_plan_tiles(num_tokens, top, num_experts, here, rows, "cpu")


@pytest.mark.parametrize(("num_tokens", "top", "here"), [(1, 2, range(8)), (21, 3, range(2, 5))])
def test_expert_rows(num_tokens: int, top: int, here: range) -> None:
    compare_expert_rows(num_tokens, top, here, 70, F32, "cpu")


@pytest.mark.parametrize(("num_tokens", "here", "width"), [(1, range(8), 128), (9, range(2, 5), 384)])
def test_split_places(num_tokens: int, here: range, width: int) -> None:
    compare_split_places(num_tokens, here, width, "cpu")


@pytest.mark.parametrize("num_rows", [1, 3, 16])
@pytest.mark.parametrize("is_gated", [False, True])
def test_skinny_linear(num_rows: int, is_gated: bool) -> None:
    rows = {1: 1, 3: 8, 16: 16}[num_rows]
    cut, whole = (SkinnyConfig(rows, 32, 64, programs, 4, 2, 2, True) for programs in (5, 99))
    compare_skinny_linear(num_rows, 90, 200, cut, F16, "cpu", is_gated=is_gated, has_bias=True)
    compare_skinny_linear(num_rows, 96, 256, cut, F16, "cpu", is_gated=is_gated)
    compare_skinny_linear(num_rows, 64, 128, whole, F16, "cpu", is_gated=is_gated)


@pytest.mark.parametrize(("num_rows", "vocab_size", "dtype"), [(13, 1000, F32), (11, 8300, BF16), (1, 100, F32)])
def test_sample(num_rows: int, vocab_size: int, dtype: torch.dtype) -> None:
    compare_sample(num_rows, vocab_size, dtype, "cpu")


@pytest.mark.parametrize(("num_rows", "width"), [(1, 64), (3, 100), (66, 40)])
@pytest.mark.parametrize(("is_added", "is_normed"), [(False, False), (True, False), (True, True)])
def test_peer_all_reduce(num_rows: int, width: int, is_added: bool, is_normed: bool) -> None:
    compare_peer_all_reduce(num_rows, width, F32, is_added=is_added, is_normed=is_normed)


@pytest.mark.parametrize(
    ("num_rows", "columns", "size"), [(1, 64, 2), (17, 4100, 2), (3, 9, 4), (3, 9000, 2), (2, 700, 3)]
)
def test_peer_columns(num_rows: int, columns: int, size: int) -> None:
    compare_peer_columns(num_rows, columns, size, F32)


@pytest.mark.parametrize(("num_rows", "columns"), [(1, 300), (9, 9001)])
def test_what_is_drawn_of_peers_columns(num_rows: int, columns: int) -> None:
    compare_drawn_columns(num_rows, columns, BF16)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 5)), min_size=1, max_size=25),
    st.sampled_from([(2, torch.int64), (64, BF16), (2500, F32)]),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 3),
)
def test_peer_line(calls: list[tuple[bool, int]], kind: tuple[int, torch.dtype], num_slots: int, programs: int) -> None:
    compare_peer_line(calls, kind[0], num_slots, programs, kind[1])


@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (2, 3)])
def test_stages_by_peer_memory(tp: int, pp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them in one process, more steps than there are slots: each tp rank to its counterpart, tokens back."""
    monkeypatch.setattr(stage_lines, "_HIDDEN_PROGRAMS", 2)
    plan, messages = build_plan(SPEC, tp, pp), Messages(num_tokens=9, row_bytes=64, num_draws=3)
    memories = [torch.zeros(num_bytes(plan, messages), dtype=torch.uint8) for _ in plan.ranks]
    handle = SimpleNamespace(buffer_ptrs=[memory.data_ptr() for memory in memories])
    every = [
        by_peer_memory(
            Links(TensorParallelGroup(0, 1), StageLink(rank - tp, rank + tp)), plan, rank, messages, memory, handle
        )
        for rank, memory in enumerate(memories)
    ]
    for step in range(10):
        for rank, links in enumerate(every):
            x = torch.full((1 + step % 9, 32), 10.0 * step + rank, dtype=BF16)
            tokens = torch.full((1 + step % 3,), 10 * step + rank)
            if not plan.ranks[rank].has_embedding:
                assert bool((links.stage.receive_(x.clone()) == x - tp).all())
            if not plan.ranks[rank].has_head:
                links.stage.send(x)
            else:
                assert links.tokens is not None
                links.tokens.send(tokens)
        for rank, links in enumerate(every[:tp]):
            assert links.tokens is not None
            drawn = links.tokens.receive(1 + step % 3, torch.device("cpu"))
            assert drawn.unique().tolist() == [10 * step + rank + (pp - 1) * tp]


@pytest.mark.parametrize(("vocab_size", "max_rows", "pp"), [(300, 44, 2), (600, 120, 3), (9000, 2300, 2)])
def test_a_head_that_two_stages_share(vocab_size: int, max_rows: int, pp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both in one process, more steps than there are slots: the weight, then rows, whose logits are one head's."""
    monkeypatch.setattr(stage_lines, "_HIDDEN_PROGRAMS", 2)
    plan, messages = build_plan(SPEC, 1, pp), Messages(9, 64, max_rows, vocab_size, F32)
    memories = [torch.zeros(num_bytes(plan, messages), dtype=torch.uint8) for _ in plan.ranks]
    handle = SimpleNamespace(buffer_ptrs=[memory.data_ptr() for memory in memories])
    ends = [
        by_peer_memory(Links(TensorParallelGroup(0, 1), StageLink(0, 0)), plan, rank, messages, memory, handle).head
        for rank, memory in enumerate(memories)
    ]
    first, last = ends[0], ends[-1]
    assert first is not None
    assert last is not None
    assert ends[1:-1] == [None] * (pp - 2)
    weight = torch.randn(vocab_size, 16)
    monkeypatch.setattr(shared_head, "Linear", Product)
    monkeypatch.setattr(shared_head, "wait_for_count", lambda stream, counter, count: waited.append(count - counter))
    monkeypatch.setattr(torch.cuda, "Stream", lambda *arguments, **options: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    waited: list[torch.Tensor] = []
    owner, helper = HeadOwner(last, Product(weight)), HeadHelper(first, torch.device("cpu"))
    owner.send_weight()
    helper.send_weight()
    for step in range(5):
        normed, is_whole = torch.randn(1 + 4 * step, 16), step % 2 == 1
        last.columns.rows.fill_(torch.nan)
        for end in (first, last):
            end.columns.is_whole.fill_(is_whole)
        put(normed, last.line)
        helper.help(len(normed))
        owner.write(normed)
        logits = normed @ weight.t()
        if is_whole:
            assert torch.allclose(last.columns.rows[: len(normed)], logits, atol=1e-5)
        blocks = torch.nn.functional.pad(logits, (0, -vocab_size % 128), value=-torch.inf).unflatten(1, (-1, 128))
        assert torch.allclose(last.columns.peaks[: len(normed)], blocks.amax(dim=-1), atol=1e-5)
    assert torch.cat(waited).tolist() == [0] * 6  # exactly what has been written


@pytest.mark.parametrize(("num_rows", "width", "size"), [(1, 64, 2), (17, 40, 2), (66, 40, 3)])
@pytest.mark.parametrize("mode", ["plain", "added", "added, normed", "added, normed, shared out"])
def test_peer_two_shot(num_rows: int, width: int, size: int, mode: str) -> None:
    compare_peer_two_shot(num_rows, width, size, F32, mode)


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize(("num_rows", "shape", "num_groups"), [(1, (40, 96), 3), (5, (34, 64), 1), (17, (66, 256), 2)])
def test_packed_linear(num_rows: int, shape: tuple[int, int], num_groups: int, kind: str) -> None:
    compare_packed_linear(num_rows, shape, kind, num_groups, F16, "cpu")
    rows = {1: 8 if kind == "int4" else 1, 5: 8, 17: 32}[num_rows]
    cut = SkinnyConfig(rows, 16, 32, 5, 4, 2, 2, True)
    compare_packed_linear(num_rows, shape, kind, num_groups, F16, "cpu", cut)
    if rows > 1:
        cut = SkinnyConfig(rows, 16, 128, 5, 4, 2, 2, True, splits=4)
        compare_packed_linear(num_rows, shape, kind, num_groups, F16, "cpu", cut)


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
def test_packed_linear_of_one_output(kind: str) -> None:
    """As the gate of a shared expert is."""
    for num_rows in (1, 5):
        compare_packed_linear(num_rows, (1, 96), kind, 3, F16, "cpu")


@pytest.mark.parametrize(
    ("num_rows", "shape", "config"),
    [
        (1, (64, 256), TileConfig(2, 1, is_unrolled=True)),
        (5, (32, 384), TileConfig(2, 0, is_unrolled=False)),
        (3, (32, 640), TileConfig(2, 1, is_unrolled=True)),
        (2, (32, 640), TileConfig(2, 1, is_unrolled=False)),
        (8, (32, 128), None),
        (17, (32, 384), None),
    ],
)
def test_packed_linear_of_tiles(num_rows: int, shape: tuple[int, int], config: TileConfig | None) -> None:
    compare_packed_linear(num_rows, shape, "int4", shape[1] // 128, F16, "cpu", config, is_tiled=True)


@pytest.mark.parametrize(
    ("num_rows", "splits", "kind", "shape", "num_groups"),
    [(9, 1, "fp8", (72, 256), 1), (35, 2, "fp8", (72, 256), 2), (18, 2, "int4", (96, 384), 3)],
)
def test_packed_linear_of_split_rows(
    num_rows: int, splits: int, kind: str, shape: tuple[int, int], num_groups: int
) -> None:
    config = Float8Config(16, 64, splits, 4, 2)
    compare_packed_linear(num_rows, shape, kind, num_groups, BF16, "cpu", config, is_tiled=kind == "int4")


@pytest.mark.parametrize("num_groups", [1, 2])
def test_packed_linear_of_float8_in_float16(num_groups: int) -> None:
    """bfloat16 rows are scaled into the range of float16."""
    config = SkinnyConfig(8, 16, 256, 5, 4, 2, 2, True, splits=2)
    compare_packed_linear(5, (66, 256), "fp8", num_groups, BF16, "cpu", config)


def test_grouped_packed_linear_of_tiles() -> None:
    compare_grouped_packed_linear(7, 2, range(2, 5), (48, 256), "int4", 2, F16, "cpu", is_tiled=True)


@pytest.mark.parametrize(("kind", "groups"), [("fp8", 1), ("fp8", 2), ("int4", 2)])
def test_grouped_packed_linear_of_split_rows(kind: str, groups: int) -> None:
    compare_grouped_packed_linear(
        7, 2, range(2, 5), (80, 256), kind, groups, BF16, "cpu", is_tiled=kind == "int4", is_split=True,
        is_gated=groups == 1,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize(("num_tokens", "here", "groups"), [(4, range(8), 2), (19, range(2, 5), 1)])
def test_grouped_packed_linear(num_tokens: int, here: range, groups: int, kind: str) -> None:
    is_gated = num_tokens == 4
    compare_grouped_packed_linear(num_tokens, 2, here, (40, 64), kind, groups, F16, "cpu", is_gated=is_gated)


@pytest.mark.parametrize("scale", [None, 0.01])
@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_quantise_rows(kind: str, scale: float | None) -> None:
    compare_quantise_rows(3, 63, kind, scale, F32, "cpu")
    compare_quantise_rows(2, 2100, kind, scale, F32, "cpu")


@pytest.mark.parametrize(
    ("query_lens", "seq_lens", "group"),
    [
        ([2], [2], 1),
        ([512, 512, 400], [512, 512, 700], 4),
        ([63, 1, 300, 0, 1, 20], [63, 500, 1100, 40, 1, 0], 7),
        ([33, 0, 32] * 40, [33, 0, 2000] * 40, 4),
    ],
)
def test_list_tiles(query_lens: list[int], seq_lens: list[int], group: int) -> None:
    compare_list_tiles(query_lens, seq_lens, group, "cpu")
