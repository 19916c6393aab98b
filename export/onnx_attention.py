"""Attention over a K/V state of fixed shape: onnxruntime's fused operator, or operators of the ONNX standard.

Both write the chunk's rows into the state at the positions after ``past_len`` tokens and read nothing beyond them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from melt_edge.export.onnx_builder import MICROSOFT, Value
from melt_edge.export.onnx_ops import Ops


@dataclass
class State:
    """The K/V inputs of a loop graph and what says how many of their rows count.

    past: (keys, values) of each layer, (B, Hkv, n_ctx, Dh). seqlens_k: int32 (B,), the tokens in the cache after
    this chunk less one; total_sequence_length: int32 (), the largest of them plus one. x: tells C.
    present: the outputs, as layers make them. positions: what the standard's operators share between layers.
    """

    past: list[tuple[Value, Value]]
    seqlens_k: Value
    total_sequence_length: Value
    x: Value
    present: list[tuple[Value, Value]] = field(default_factory=list)
    positions: tuple[Value, Value, Value] | None = None


def declare_state(ops: Ops, x: Value) -> State:
    """The graph's inputs for a whole stack of layers. x: anything of shape (B, C, ...)."""
    config, layout = ops.config, ops.layout
    shape = (layout.batch, config.num_key_value_heads, layout.n_ctx, config.head_dim)
    past = []
    for layer_idx in range(config.num_hidden_layers):
        key = ops.graph.input(f"past.{layer_idx}.key", ops.float, shape)
        past.append((key, ops.graph.input(f"past.{layer_idx}.value", ops.float, shape)))
    seqlens_k = ops.graph.input("seqlens_k", np.int32, (layout.batch,))
    total = ops.graph.input("total_sequence_length", np.int32, ())
    return State(past, seqlens_k, total, x)


def uses_fused_attention(ops: Ops) -> bool:
    """Whether GroupQueryAttention computes it."""
    return ops.fused_attention


def attention(ops: Ops, q: Value, k: Value, v: Value, state: State, layer_idx: int, path: str) -> Value:
    """softmax(rope(q) [K; rope(k)]^T / sqrt(Dh)) [V; v], causal; leaves the new rows in the state.

    Shapes: q (B, C, H*Dh), k and v (B, C, Hkv*Dh) -> (B, C, H*Dh).
    """
    compute = _fused if uses_fused_attention(ops) else _standard
    a, key, value = compute(ops, q, k, v, state, layer_idx, path)
    state.present.append((key, value))
    return a


def _fused(
    ops: Ops, q: Value, k: Value, v: Value, state: State, layer_idx: int, path: str
) -> tuple[Value, Value, Value]:
    past = state.past[layer_idx]
    outputs: list[tuple[str | None, npt.DTypeLike, Any]] = [(None, ops.float, q.shape)]
    outputs += [(f"present.{layer_idx}.{kind}", ops.float, past[0].shape) for kind in ("key", "value")]
    a, key, value = ops.graph.node(
        path,
        "GroupQueryAttention",
        [q, k, v, *past, state.seqlens_k, state.total_sequence_length, *rotary_tables(ops)],
        outputs,
        domain=MICROSOFT,
        num_heads=ops.config.num_attention_heads,
        kv_num_heads=ops.config.num_key_value_heads,
        do_rotary=1,
    )
    return a, key, value


def _standard(
    ops: Ops, q: Value, k: Value, v: Value, state: State, layer_idx: int, path: str
) -> tuple[Value, Value, Value]:
    config, graph = ops.config, ops.graph
    positions, write_at, visible = _positions(ops, state)
    past_key, past_value = state.past[layer_idx]
    q = _rotated_heads(ops, q, config.num_attention_heads, positions, f"{path}/q_rope")
    k = _rotated_heads(ops, k, config.num_key_value_heads, positions, f"{path}/k_rope")
    v = _heads(ops, v, config.num_key_value_heads, f"{path}/v_heads")
    key = graph.op(
        f"{path}/key",
        "TensorScatter",
        [past_key, k, write_at],
        past_key.shape,
        output=f"present.{layer_idx}.key",
        axis=-2,
    )
    value = graph.op(
        f"{path}/value",
        "TensorScatter",
        [past_value, v, write_at],
        past_key.shape,
        output=f"present.{layer_idx}.value",
        axis=-2,
    )
    a = graph.op(path, "Attention", [q, key, value, visible], q.shape)  # (B, H, C, Dh)
    a = graph.op(f"{path}/merge", "Transpose", [a], (a.shape[0], a.shape[2], a.shape[1], a.shape[3]), perm=[0, 2, 1, 3])
    width = config.num_attention_heads * config.head_dim
    merged = graph.op(f"{path}/merge", "Reshape", [a, ops.int64("attn.width", 0, 0, width)], (*a.shape[:2], width))
    return merged, key, value


def _heads(ops: Ops, x: Value, n_heads: int, path: str) -> Value:
    """Shapes: (B, C, n_heads*Dh) -> (B, n_heads, C, Dh)."""
    head_dim = ops.config.head_dim
    batch, chunk = x.shape[:2]
    shape = ops.int64(f"attn.heads.{n_heads}", 0, 0, n_heads, head_dim)
    x = ops.graph.op(path, "Reshape", [x, shape], (batch, chunk, n_heads, head_dim))
    return ops.graph.op(path, "Transpose", [x], (batch, n_heads, chunk, head_dim), perm=[0, 2, 1, 3])


def _rotated_heads(ops: Ops, x: Value, n_heads: int, positions: Value, path: str) -> Value:
    heads = _heads(ops, x, n_heads, path)
    return ops.graph.op(path, "RotaryEmbedding", [heads, *rotary_tables(ops), positions], heads.shape)


def _positions(ops: Ops, state: State) -> tuple[Value, Value, Value]:
    """Each token's position (B, C), where the chunk's rows go (B,), which rows each sees (B, 1, C, n_ctx)."""
    if state.positions is not None:
        return state.positions
    graph, path = ops.graph, "/loop/positions"
    batch, chunk = state.x.shape[:2]
    n_ctx = ops.layout.n_ctx
    one = graph.constant("one", 1, np.int64)
    if isinstance(chunk, int):
        length = graph.constant("chunk", chunk, np.int64)
        offsets = ops.int64("offsets", *range(chunk))
    else:
        shape = graph.node(path, "Shape", [state.x], [(None, np.int64, (1,))], start=1, end=2)[0]
        length = graph.op(f"{path}/length", "Squeeze", [shape], ())
        offsets = graph.op(path, "Range", [graph.constant("zero", 0, np.int64), length, one], (chunk,))
    last = ops.cast(state.seqlens_k, np.int64, f"{path}/last")
    past_len = ops.sub(ops.add(last, one, f"{path}/total"), length, f"{path}/past_len")  # (B,)
    column = graph.op(f"{path}/past_len", "Unsqueeze", [past_len, ops.int64("axis1", 1)], (batch, 1))
    positions = graph.op(path, "Add", [column, offsets], (batch, chunk))
    rows = graph.stored(ops.weights.generated("rows", np.int64, (n_ctx,), lambda: np.arange(n_ctx)))
    queries = graph.op(f"{path}/queries", "Unsqueeze", [positions, ops.int64("axes13", 1, 3)], (batch, 1, chunk, 1))
    visible = graph.node(path, "LessOrEqual", [rows, queries], [(None, np.bool_, (batch, 1, chunk, n_ctx))])[0]
    state.positions = positions, past_len, visible
    return state.positions


def rotary_tables(ops: Ops) -> tuple[Value, Value]:
    """Cosine and sine of every position's angles, computed in float64. Shapes: (n_ctx, Dh/2) each."""
    shape = (ops.layout.n_ctx, ops.config.head_dim // 2)

    def angles() -> npt.NDArray[np.float64]:
        freqs = ops.config.rope_theta ** (-np.arange(shape[1], dtype=np.float64) / shape[1])
        table: npt.NDArray[np.float64] = np.arange(shape[0], dtype=np.float64)[:, None] * freqs
        return table

    cos = ops.weights.generated("rotary.cos", ops.float, shape, lambda: np.cos(angles()))
    sin = ops.weights.generated("rotary.sin", ops.float, shape, lambda: np.sin(angles()))
    return ops.graph.stored(cos), ops.graph.stored(sin)
