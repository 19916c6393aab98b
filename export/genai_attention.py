"""MELT's attention where a cache may be read by every loop and written by none: two halves, merged.

One half attends to the cache's rows, which onnxruntime's operator only reads if it is given no new ones; the other to
the chunk's own rows of this loop. Each gives its scores, and their log-sum-exp says what share of the softmax it has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from melt_edge.export.onnx_attention import rotary_tables
from melt_edge.export.onnx_builder import MICROSOFT, Shape, Value
from melt_edge.export.onnx_ops import Ops

# Added to a score that must not count: far below any, and finite, so that a half without any row has the share 0 and
# not NaN.
_UNSEEN = {np.dtype(np.float32): -1e9, np.dtype(np.float16): -3e4}


@dataclass(frozen=True)
class Lengths:
    """Tokens of each sequence after this chunk and before it, int64 (B,); tokens of the chunk, int64 ()."""

    totals: Value
    past_len: Value
    chunk: Value


def count_tokens(ops: Ops, tokens: Value, mask: Value) -> Lengths:
    """Counts the mask's ones. Shapes: tokens (B, C), mask (B, total)."""
    graph, batch = ops.graph, ops.layout.batch
    totals = graph.op("/lengths/totals", "ReduceSum", [mask, ops.int64("axis1", 1)], (batch,), keepdims=0)
    chunk = graph.node("/lengths/chunk", "Shape", [tokens], [(None, np.int64, (1,))], start=1, end=2)[0]
    chunk = graph.op("/lengths/chunk", "Squeeze", [chunk], ())
    # First prompts of a batch are padded on the right: a short one has fewer tokens than the chunk.
    before = graph.op("/lengths/before", "Sub", [totals, chunk], (batch,))
    past_len = graph.op("/lengths/before", "Max", [before, graph.constant("zero", 0, np.int64)], (batch,))
    return Lengths(totals, past_len, chunk)


def row_count(ops: Ops, counts: Value, path: str) -> tuple[Value, Value]:
    """int64 counts (B,) as GroupQueryAttention wants them: int32 (B,), each less one, and the largest, int32 ()."""
    graph = ops.graph
    less = graph.op(f"{path}/seqlens_k", "Sub", [counts, graph.constant("one", 1, np.int64)], counts.shape)
    largest = graph.op(f"{path}/largest", "ReduceMax", [counts], (), keepdims=0)
    return ops.cast(less, np.int32, f"{path}/seqlens_k"), ops.cast(largest, np.int32, f"{path}/largest")


@dataclass(frozen=True)
class Reading:
    """What both halves need, made once for all layers and loops.

    positions: int64 (B, C). cached, own: the rows that a half reads, as from ``row_count``; those of the cache are at
    least C, because the operator wants so. unseen (B, 1, C, rows read), causal (C, C): 0 where a row counts.
    """

    positions: Value
    cached: tuple[Value, Value]
    own: tuple[Value, Value]
    unseen: Value
    causal: Value


def plan_reading(ops: Ops, lengths: Lengths) -> Reading:
    """Positions, counts and masks for ``read_apart``."""
    graph, path = ops.graph, "/reading"
    batch, chunk = ops.layout.batch, ops.layout.chunk
    zero, one = graph.constant("zero", 0, np.int64), graph.constant("one", 1, np.int64)
    offsets = graph.op(f"{path}/offsets", "Range", [zero, lengths.chunk, one], (chunk,))
    column = graph.op(f"{path}/past_len", "Unsqueeze", [lengths.past_len, ops.int64("axis1", 1)], (batch, 1))
    positions = graph.op(f"{path}/positions", "Add", [column, offsets], (batch, chunk))

    # All sequences of a batch read the same number of rows; the mask says which of them count.
    no_rows = graph.op(f"{path}/no_rows", "Sub", [lengths.past_len, lengths.past_len], (batch,))
    longest = graph.op(f"{path}/longest", "ReduceMax", [lengths.past_len], (), keepdims=0)
    n_read = graph.op(f"{path}/n_read", "Max", [longest, lengths.chunk], ())
    cached = row_count(ops, graph.op(f"{path}/cached", "Add", [no_rows, n_read], (batch,)), f"{path}/cached")
    own = row_count(ops, graph.op(f"{path}/own", "Add", [no_rows, lengths.chunk], (batch,)), f"{path}/own")

    rows = graph.op(f"{path}/rows", "Range", [zero, n_read, one], ("read",))
    limits = ops.sub(positions, offsets, f"{path}/limits")  # past_len for each query
    limits = graph.op(f"{path}/limits", "Unsqueeze", [limits, ops.int64("axes13", 1, 3)], (batch, 1, chunk, 1))
    unseen = hide(ops, rows, limits, "Less", f"{path}/unseen", (batch, 1, chunk, "read"))
    queries = graph.op(f"{path}/queries", "Unsqueeze", [offsets, ops.int64("axis1", 1)], (chunk, 1))
    causal = hide(ops, offsets, queries, "LessOrEqual", f"{path}/causal", (chunk, chunk))
    return Reading(positions, cached, own, unseen, causal)


def hide(ops: Ops, rows: Value, limits: Value, condition: str, path: str, shape: Shape) -> Value:
    """What to add to scores: 0 where the condition on rows and limits holds."""
    counts = ops.graph.node(path, condition, [rows, limits], [(None, np.bool_, shape)])[0]
    nothing = ops.graph.constant("score.seen", 0, ops.float)
    much = ops.graph.constant("score.unseen", _UNSEEN[ops.float], ops.float)
    return ops.graph.node(path, "Where", [counts, nothing, much], [(None, ops.float, shape)])[0]


def read_apart(
    ops: Ops, q: Value, k: Value, v: Value, past: tuple[Value, Value], reading: Reading, path: str
) -> tuple[Value, Value, Value]:
    """Attention over the cache's rows and the chunk's; and these rows, rotated, as the cache keeps them.

    Shapes: q (B, C, H*Dh), k and v (B, C, Hkv*Dh) -> (B, C, H*Dh), and two of (B, Hkv, C, Dh).
    """
    config, graph = ops.config, ops.graph
    batch, chunk, width = q.shape
    n_head, n_head_kv, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    tables = rotary_tables(ops)
    kind: dict[str, Any] = {
        "domain": MICROSOFT,
        "num_heads": n_head,
        "kv_num_heads": n_head_kv,
        "do_rotary": 1,
        "qk_output": 1,
    }
    none = ops.int64("slice.none", 0)
    no_row = graph.op(f"{path}/no_row", "Slice", [k, none, none, ops.int64("axis1", 1)], (batch, 0, k.shape[2]))
    cached, scores = graph.node(
        f"{path}/cached",
        "GroupQueryAttention",
        [q, no_row, no_row, *past, *reading.cached, *tables, reading.positions, reading.unseen],
        [(None, ops.float, q.shape), None, None, (None, ops.float, (batch, n_head, chunk, "read"))],
        causal=0,
        **kind,
    )
    rows = (batch, n_head_kv, chunk, head_dim)
    own, key, value, own_scores = graph.node(
        f"{path}/own",
        "GroupQueryAttention",
        [q, k, v, None, None, *reading.own, *tables, reading.positions],
        [(None, ops.float, q.shape), *[(None, ops.float, rows)] * 2, (None, ops.float, (batch, n_head, chunk, chunk))],
        **kind,
    )
    own_scores = ops.add(own_scores, reading.causal, f"{path}/own_scores")
    # The cache's share of the softmax over both: S / (S + S_own), S being a half's sum of exponentials.
    share = ops.sub(log_sum(ops, scores, f"{path}/cached"), log_sum(ops, own_scores, f"{path}/own"), f"{path}/share")
    share = ops.sigmoid(share, f"{path}/share")  # (B, H, C, 1)
    share = graph.op(f"{path}/share", "Transpose", [share], (batch, chunk, n_head, 1), perm=[0, 2, 1, 3])
    heads, shape = ops.int64("attn.heads", 0, 0, n_head, head_dim), (batch, chunk, n_head, head_dim)
    cached = graph.op(f"{path}/cached/heads", "Reshape", [cached, heads], shape)
    own = graph.op(f"{path}/own/heads", "Reshape", [own, heads], shape)
    more = graph.op(f"{path}/merge", "Mul", [ops.sub(cached, own, f"{path}/merge"), share], shape)
    a = ops.add(own, more, f"{path}/merge")
    return graph.op(f"{path}/merge", "Reshape", [a, ops.int64("attn.width", 0, 0, int(width))], q.shape), key, value


def log_sum(ops: Ops, scores: Value, path: str) -> Value:
    """log(sum(exp(scores))) over the last axis. Shapes: (..., rows) -> (..., 1)."""
    return ops.graph.op(path, "ReduceLogSumExp", [scores, ops.int64("axis.last", -1)], (*scores.shape[:-1], 1))
