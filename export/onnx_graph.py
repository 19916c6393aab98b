"""The model as three ONNX graphs: embedding, ONE loop, head. The runtime runs the loop's graph T times.

A token's path reads from top to bottom under the names of melt_edge/modeling.py and cpp/src/looped.cpp:
embedding, loop, gate, cache, attention, feed-forward, head.
Axes: B batch, C tokens of a chunk, D hidden, H heads, Dh head dim, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from melt_edge.config import LoopConfig
from melt_edge.export.onnx_attention import attention, declare_state
from melt_edge.export.onnx_builder import GraphBuilder, Value
from melt_edge.export.onnx_ops import Layout, Ops
from melt_edge.export.onnx_weights import WeightsFile

# q, k, v, layer_idx, path -> the attention's output
Attend = Callable[[Value, Value, Value, int, str], Value]
GRAPHS = ("embed", "loop", "head")


def build_graphs(config: LoopConfig, layout: Layout, weights: WeightsFile) -> dict[str, GraphBuilder]:
    """All graphs of a folder by name; the tensors they use are placed in ``weights``."""
    return {
        "embed": embed_graph(Ops("embed", config, layout, weights)),
        "loop": loop_graph(Ops("loop", config, layout, weights)),
        "head": head_graph(Ops("head", config, layout, weights)),
    }


def embed_graph(ops: Ops) -> GraphBuilder:
    """input_ids (B, C) int64 -> x (B, C, D)."""
    tokens = ops.graph.input("input_ids", np.int64, (ops.layout.batch, ops.layout.chunk))
    ops.graph.output(ops.embedding(tokens, "model.embed_tokens.weight", "/embed", output="x"))
    return ops.graph


def loop_graph(ops: Ops) -> GraphBuilder:
    """One pass over the layers: x, latents and K/V state in; the same, and the exit gate's probability, out."""
    config, graph = ops.config, ops.graph
    shape = (ops.layout.batch, ops.layout.chunk, config.hidden_size)
    x = graph.input("x", ops.float, shape)
    gated = range(config.num_hidden_layers if config.has_gate else 0)
    latents = [graph.input(f"h.{layer_idx}", ops.float, shape) for layer_idx in gated]
    state = declare_state(ops, x)
    first_loop = None
    if config.has_gate and config.kv_gate_init == "input":
        first_loop = graph.input("first_loop", np.bool_, ())

    def attend(q: Value, k: Value, v: Value, layer_idx: int, path: str) -> Value:
        return attention(ops, q, k, v, state, layer_idx, path)

    new_latents = []
    for layer_idx in range(config.num_hidden_layers):
        h = latents[layer_idx] if config.has_gate else None
        x, h = decoder_layer(ops, x, h, first_loop, attend, layer_idx, "/loop")
        if config.has_gate:
            new_latents.append(h)
    x = ops.rms_norm(x, "model.norm.weight", "/loop/norm", output="x_out")  # the final norm closes EVERY loop

    graph.output(x, *new_latents)
    graph.output(*(value for pair in state.present for value in pair))
    graph.output(exit_gate(ops, x, "/loop/exit_gate", output="exit_prob"))
    return graph


def decoder_layer(
    ops: Ops, x: Value, h: Value | None, first_loop: Value | None, attend: Attend, layer_idx: int, loop_path: str
) -> tuple[Value, Value]:
    """Sandwich norms around attention and feed-forward. Returns the residual stream and the gate's latent.

    attend: attention of q, k, v over the cache of the layer with this index, in nodes below a path.
    """
    at, path = f"model.layers.{layer_idx}.", f"{loop_path}/layers.{layer_idx}"
    u = ops.rms_norm(x, at + "input_layernorm.weight", f"{path}/input_layernorm")
    h = u if h is None else kv_gate(ops, u, h, first_loop, layer_idx, f"{path}/kv_gate")
    q = ops.linear(u, at + "self_attn.q_proj.weight", f"{path}/attn/q_proj")  # (B, C, H*Dh)
    k = ops.linear(h, at + "self_attn.k_proj.weight", f"{path}/attn/k_proj")  # (B, C, Hkv*Dh)
    v = ops.linear(h, at + "self_attn.v_proj.weight", f"{path}/attn/v_proj")
    a = attend(q, k, v, layer_idx, f"{path}/attn")
    a = ops.linear(a, at + "self_attn.o_proj.weight", f"{path}/attn/o_proj")  # (B, C, D)
    a = ops.rms_norm(a, at + "input_layernorm_2.weight", f"{path}/input_layernorm_2")
    x = ops.add(x, a, f"{path}/attn/residual")
    m = ops.rms_norm(x, at + "post_attention_layernorm.weight", f"{path}/post_attention_layernorm")
    m = mlp(ops, m, at, f"{path}/mlp")
    m = ops.rms_norm(m, at + "post_attention_layernorm_2.weight", f"{path}/post_attention_layernorm_2")
    return ops.add(x, m, f"{path}/mlp/residual"), h


def kv_gate(ops: Ops, u: Value, h: Value, first_loop: Value | None, layer_idx: int, path: str) -> Value:
    """MELT's element-wise gate: the latent that this loop's K and V are made from. Shapes: (B, C, D)."""
    at = f"model.layers.{layer_idx}.self_attn.kv_gate."
    out = f"h_out.{layer_idx}"
    z = ops.linear(u, at + "x_proj.weight", f"{path}/x_proj", bias=at + "x_proj.bias")
    z = ops.add(z, ops.linear(h, at + "h_proj.weight", f"{path}/h_proj"), f"{path}/z")
    z = ops.sigmoid(z, f"{path}/z")
    kept = ops.mul(z, ops.sub(h, u, f"{path}/change"), f"{path}/kept")
    mixed = ops.graph.op(f"{path}/h", "Add", [u, kept], u.shape, output=None if first_loop else out)  # z h + (1 - z) u
    if first_loop is None:
        return mixed
    return ops.graph.node(f"{path}/h", "Where", [first_loop, u, mixed], [(out, ops.float, u.shape)])[0]


def mlp(ops: Ops, x: Value, at: str, path: str) -> Value:
    """SwiGLU feed-forward. Shapes: (B, C, D) -> (B, C, D)."""
    gate = ops.linear(x, at + "mlp.gate_proj.weight", f"{path}/gate_proj")
    up = ops.linear(x, at + "mlp.up_proj.weight", f"{path}/up_proj")
    return ops.linear(
        ops.mul(ops.silu(gate, f"{path}/silu"), up, path), at + "mlp.down_proj.weight", f"{path}/down_proj"
    )


def exit_gate(ops: Ops, x: Value, path: str, *, output: str | None = None) -> Value:
    """The probability to leave after this loop, in float32. Shapes: (B, C, D) -> (B, C)."""
    logit = ops.linear(x, "model.early_exit_gate.weight", path, bias="model.early_exit_gate.bias")
    if logit.dtype != np.float32:
        logit = ops.cast(logit, np.float32, path)
    prob = ops.sigmoid(logit, path)
    return ops.graph.op(path, "Squeeze", [prob, ops.int64("axis2", 2)], x.shape[:2], output=output)


def head_graph(ops: Ops) -> GraphBuilder:
    """x (B, C, D) -> logits (B, C, V) float32."""
    x = ops.graph.input("x", ops.float, (ops.layout.batch, ops.layout.chunk, ops.config.hidden_size))
    ops.graph.output(ops.head(x, output="logits"))
    return ops.graph
