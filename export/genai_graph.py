"""The model as ONE ONNX graph with all its loops, the way stock onnxruntime-genai runs a decoder.

genai binds a slot's past and present to one buffer. Ouro's loops have slots of their own and write them as in the
loop-step graphs. MELT's loops share a slot that none of them may write before the last has read it: they attend to the
cache and to their own chunk apart (genai_attention.py), and the last loop's rows are put into the cache afterwards.
MELT's loops are the iterations of one ONNX Loop, so that each weight is there once, whatever T is.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
from onnx import numpy_helper

from melt_edge.config import LoopConfig
from melt_edge.errors import ConfigError
from melt_edge.export.genai_attention import Lengths, count_tokens, plan_reading, read_apart, row_count
from melt_edge.export.onnx_attention import State, attention
from melt_edge.export.onnx_builder import GraphBuilder, Value
from melt_edge.export.onnx_graph import decoder_layer, exit_gate
from melt_edge.export.onnx_ops import Layout, Ops
from melt_edge.export.onnx_weights import WeightsFile

# The keys and values of one slot
Slot = tuple[Value, Value]


@dataclass(frozen=True)
class GenaiLayout(Layout):
    """As Layout; n_ctx is the longest that genai may make its cache."""

    @property
    def opset(self) -> int:
        """The standard's version: the oldest with TensorScatter."""
        return 24


def genai_graph(config: LoopConfig, layout: GenaiLayout, weights: WeightsFile) -> GraphBuilder:
    """input_ids (B, C), attention_mask (B, tokens so far), the cache -> logits (B, C, V) float32, the cache.

    Raises: ConfigError for a head size that onnxruntime's fused attention does not take.
    """
    ops = Ops("decoder", config, layout, weights)
    if not ops.fused_attention:
        raise ConfigError(
            f"head_dim is {config.head_dim}, expected a multiple of 16 for the layout genai, whose attention takes no "
            "other; export the loop-step layout"
        )
    tokens = ops.graph.input("input_ids", np.int64, (layout.batch, layout.chunk))
    mask = ops.graph.input("attention_mask", np.int64, (layout.batch, "total"))
    past = declare_past(ops)
    lengths = count_tokens(ops, tokens, mask)
    x = ops.embedding(tokens, "model.embed_tokens.weight", "/embed", output=None)
    x, present = (run_shared_loops if config.shares_kv else run_own_loops)(ops, x, past, lengths)
    ops.graph.output(ops.head(x, output="logits"))
    ops.graph.output(*(value for slot in present for value in slot))
    return ops.graph


def declare_past(ops: Ops) -> list[Slot]:
    """The graph's cache inputs, (B, Hkv, rows, Dh) each; rows is genai's max_length."""
    shape = (ops.layout.batch, ops.config.num_key_value_heads, "rows", ops.config.head_dim)
    past = []
    for slot in range(ops.config.cache_slots):
        key = ops.graph.input(f"past_key_values.{slot}.key", ops.float, shape)
        past.append((key, ops.graph.input(f"past_key_values.{slot}.value", ops.float, shape)))
    return past


def run_own_loops(ops: Ops, x: Value, past: list[Slot], lengths: Lengths) -> tuple[Value, list[Slot]]:
    """Ouro: the loops one after the other. Returns the states that the head reads, and the cache."""
    n_layer = ops.config.num_hidden_layers
    state = State(past, *row_count(ops, lengths.totals, "/lengths"), x)
    leaving = start_leaving(ops, x)
    for loop_idx in range(ops.config.num_loops):
        for layer_idx in range(n_layer):
            slot = loop_idx * n_layer + layer_idx

            def attend(q: Value, k: Value, v: Value, _: int, path: str, slot: int = slot) -> Value:
                return attention(ops, q, k, v, state, slot, path)

            x, _ = decoder_layer(ops, x, None, None, attend, layer_idx, f"/loop.{loop_idx}")
        x = ops.rms_norm(x, "model.norm.weight", f"/loop.{loop_idx}/norm")  # the final norm closes EVERY loop
        leaving = leave(ops, x, leaving, f"/loop.{loop_idx}")
    return (leaving[0] if leaving else x), state.present


def run_shared_loops(ops: Ops, x: Value, past: list[Slot], lengths: Lengths) -> tuple[Value, list[Slot]]:
    """MELT: the loops read the cache, the last one's rows are put into it. Returns as above."""
    config, graph = ops.config, ops.graph
    # What goes round: x, the latents from zeros, who leaves, and the rows that a loop made; the last one's count.
    latents = [zeros_like(ops, x, "/latents")] * config.num_hidden_layers if config.has_gate else []
    leaving = start_leaving(ops, x)
    no_rows = graph.constant("no_rows", np.zeros((1, config.num_key_value_heads, 0, config.head_dim)), ops.float)
    started = [x, *latents, *leaving]
    body, rows = loop_body(ops, started, past, lengths)
    results = graph.node(
        "",
        "Loop",
        [graph.constant("num_loops", config.num_loops, np.int64), None, *started, *[no_rows] * len(rows)],
        [(None, value.dtype, value.shape) for value in (*started, *rows)],
        body=body.proto(),
    )
    names = [f"present.{i}.{kind}" for i in range(config.num_hidden_layers) for kind in ("key", "value")]
    kept_rows = [value for slot in past for value in slot]
    present = [
        graph.op(f"/{name}", "TensorScatter", [kept, new, lengths.past_len], kept.shape, output=name, axis=-2)
        for name, kept, new in zip(names, kept_rows, results[len(started) :], strict=True)
    ]
    read = results[1 + len(latents)] if leaving else results[0]
    return read, list(zip(present[::2], present[1::2], strict=True))


def loop_body(ops: Ops, started: list[Value], past: list[Slot], lengths: Lengths) -> tuple[GraphBuilder, list[Value]]:
    """One loop: what goes round in, the same out; and the rows it makes, a key and a value of each layer."""
    config = ops.config
    reading = plan_reading(ops, lengths)
    body = ops.graph.body("loop")
    inner = copy.copy(ops)
    inner.graph = body
    loop_idx = body.input("loop_idx", np.int64, ())
    go_on = body.input("go_on", np.bool_, ())
    n_gated = config.num_hidden_layers if config.has_gate else 0
    x, *more = (body.input(f"round.{i}", value.dtype, value.shape) for i, value in enumerate(started))
    latents, leaving = more[:n_gated], more[n_gated:]
    rows: list[Value] = []

    def attend(q: Value, k: Value, v: Value, layer_idx: int, path: str) -> Value:
        a, key, value = read_apart(inner, q, k, v, past[layer_idx], reading, path)
        rows.extend((key, value))
        return a

    first_loop = None
    if config.has_gate and config.kv_gate_init == "input":
        zero = body.constant("zero", 0, np.int64)
        first_loop = body.node("/loop/first", "Equal", [loop_idx, zero], [(None, np.bool_, ())])[0]
    for layer_idx in range(config.num_hidden_layers):
        h = latents[layer_idx] if config.has_gate else None
        x, h = decoder_layer(inner, x, h, first_loop, attend, layer_idx, "/loop")
        if config.has_gate:
            latents[layer_idx] = h
    x = inner.rms_norm(x, "model.norm.weight", "/loop/norm")  # the final norm closes EVERY loop
    leaving = leave(inner, x, leaving, "/loop")
    for index, row in enumerate(rows):
        body.input(f"rows.{index}", ops.float, ("kept_batch", row.shape[1], "kept_chunk", row.shape[3]))
    body.output(body.op("/loop/go_on", "Identity", [go_on], ()), x, *latents, *leaving, *rows)
    return body, rows


def start_leaving(ops: Ops, x: Value) -> list[Value]:
    """Before the first loop: the states to read (B, C, D), who has left (B, C, 1), the probability to have stayed.

    Empty if every token leaves after the last loop.
    """
    if ops.config.early_exit_threshold >= 1.0:
        return []
    left = ops.graph.op("/leaving", "Slice", [x, *(ops.int64(f"slice.{i}", i) for i in (0, 1, 2))], (*x.shape[:2], 1))
    left = zeros_like(ops, left, "/leaving")
    stayed = ops.add(
        ops.cast(left, np.float32, "/leaving/stayed"), ops.graph.constant("one.f32", 1, np.float32), "/leaving"
    )
    return [x, ops.cast(left, np.bool_, "/leaving/left"), stayed]


def leave(ops: Ops, x: Value, leaving: list[Value], path: str) -> list[Value]:
    """modeling.select_exit, loop by loop: who has left keeps its state, and some leave after this loop."""
    if not leaving:
        return []
    graph, path = ops.graph, f"{path}/leaving"
    read, left, stayed = leaving
    read = graph.node(path, "Where", [left, read, x], [(None, x.dtype, x.shape)])[0]
    prob = exit_gate(ops, x, path)
    prob = graph.op(path, "Unsqueeze", [prob, ops.int64("axis2", 2)], left.shape)
    one = graph.constant("one.f32", 1, np.float32)
    stayed = ops.mul(stayed, graph.op(f"{path}/stay", "Sub", [one, prob], left.shape), f"{path}/stayed")
    gone = graph.op(f"{path}/gone", "Sub", [one, stayed], left.shape)
    threshold = graph.constant("exit_threshold", ops.config.early_exit_threshold, np.float32)
    leaves = graph.node(path, "GreaterOrEqual", [gone, threshold], [(None, np.bool_, left.shape)])[0]
    return [read, graph.op(path, "Or", [left, leaves], left.shape), stayed]


def zeros_like(ops: Ops, x: Value, path: str) -> Value:
    """Zeros of the shape and type of x."""
    shape = ops.graph.node(path, "Shape", [x], [(None, np.int64, (len(x.shape),))])[0]
    value = numpy_helper.from_array(np.zeros(1, x.dtype))
    return ops.graph.node(path, "ConstantOfShape", [shape], [(None, x.dtype, x.shape)], value=value)[0]
