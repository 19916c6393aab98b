"""The layers' operators as ONNX nodes: which operator computes a norm, a matrix product or attention here.

One place chooses between onnxruntime's own operators and those of the standard; the model's path is in onnx_graph.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import helper

from melt_edge.config import LoopConfig
from melt_edge.export.onnx_builder import MICROSOFT, Dim, GraphBuilder, Value
from melt_edge.export.onnx_quantize import BlockFormat
from melt_edge.export.onnx_weights import WeightsFile

PRECISIONS = ("fp32", "fp16", "int8", "int4")
# onnxruntime's fused attention rotates heads of these multiples only.
_FUSED_HEAD_MULTIPLE = 16
_BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Layout:
    """How an ONNX folder is written. batch, chunk: numbers, or symbols for what is chosen at run time.

    portable: operators of the ONNX standard alone. block_size, symmetric: of quantised matrices. accuracy_level: what
    activations a product with them may round to (MatMulNBits): 0 or 1 float32, 4 int8.
    """

    precision: str
    n_ctx: int
    portable: bool = False
    batch: Dim = "batch"
    chunk: Dim = "chunk"
    block_size: int = 32
    symmetric: bool = True
    accuracy_level: int = 4

    def static(self, chunk: int) -> Layout:
        """This layout with no symbolic dimension: one sequence, chunks of this many tokens."""
        return replace(self, batch=1, chunk=chunk)

    @property
    def opset(self) -> int:
        """The standard's version: the oldest that has every operator, but for attention without the fused one."""
        return 24 if self.portable else 23

    @property
    def activations(self) -> np.dtype[Any]:
        """The type of states, latents and cache rows."""
        return np.dtype(np.float16 if self.precision == "fp16" else np.float32)

    @property
    def block_format(self) -> BlockFormat | None:
        """How matrices are quantised, None if they are not."""
        if self.precision not in _BITS:
            return None
        return BlockFormat(_BITS[self.precision], self.block_size, self.symmetric)


class Ops:
    """Adds operators to a graph under names like the reference's."""

    def __init__(self, name: str, config: LoopConfig, layout: Layout, weights: WeightsFile) -> None:
        # The standard's attention, which other heads need, is newer than the other operators.
        self.fused_attention = not layout.portable and config.head_dim % _FUSED_HEAD_MULTIPLE == 0
        self.graph = GraphBuilder(name, layout.opset if self.fused_attention else 24)
        self.config = config
        self.layout = layout
        self.weights = weights
        self.float = layout.activations

    def embedding(self, tokens: Value, name: str, path: str, output: str | None) -> Value:
        """Rows of a table. Shapes: tokens (B, C) -> (B, C, D)."""
        made = [(output, self.float, (*tokens.shape, self.config.hidden_size))]
        fmt = self._table_format()
        if fmt is None:
            table = self.graph.stored(self.weights.plain(name, self.float))
            return self.graph.node(path, "Gather", [table, tokens], made, axis=0)[0]
        data, scales, zeros = self.weights.blocks((name,), fmt, self.float)
        rows, n_blocks, blob = data.shape
        table = self.graph.stored(data, shape=(rows, n_blocks * blob))
        return self.graph.node(
            path,
            "GatherBlockQuantized",
            [table, tokens, self.graph.stored(scales), None if zeros is None else self.graph.stored(zeros)],
            made,
            domain=MICROSOFT,
            bits=fmt.bits,
            block_size=fmt.block_size,
            gather_axis=0,
            quantize_axis=1,
        )[0]

    def rms_norm(self, x: Value, name: str, path: str, output: str | None = None) -> Value:
        """x / rms(x) * weight, computed in float32 whatever the type of x. Shapes: (B, C, D) -> (B, C, D)."""
        weight = self.graph.stored(self.weights.plain(name, self.float))
        eps = self.config.rms_norm_eps
        return self.graph.op(
            path, "RMSNormalization", [x, weight], x.shape, output=output, axis=-1, epsilon=eps, stash_type=1
        )

    def linear(self, x: Value, name: str, path: str, *, bias: str | None = None, output: str | None = None) -> Value:
        """x W^T + b. Shapes: (B, C, in) -> (B, C, out)."""
        return self.linears(x, (name,), path, bias=bias, output=output)

    def linears(
        self, x: Value, names: tuple[str, ...], path: str, *, bias: str | None = None, output: str | None = None
    ) -> Value:
        """x [W1; W2; ...]^T + b, the matrices one above the other. Shapes: (B, C, in) -> (B, C, sum of out)."""
        fmt = self.layout.block_format
        shift = None if bias is None else self.graph.stored(self.weights.plain(bias, self.float))
        if fmt is None or self.weights.source.tensors[names[0]].shape[0] == 1:  # the exit gate is one row
            weight = self.graph.stored(self.weights.transposed(names, self.float))
            y = self.graph.op(path, "MatMul", [x, weight], (*x.shape[:-1], weight.shape[1]), output=output)
            return y if shift is None else self.add(y, shift, path)
        data, scales, zeros = self.weights.blocks(names, fmt, self.float)
        return self.graph.op(
            path,
            "MatMulNBits",
            [
                x,
                self.graph.stored(data),
                self.graph.stored(scales),
                None if zeros is None else self.graph.stored(zeros),
                None,
                shift,
            ],
            (*x.shape[:-1], data.shape[0]),
            output=output,
            domain=MICROSOFT,
            K=x.shape[-1],
            N=data.shape[0],
            bits=fmt.bits,
            block_size=fmt.block_size,
            accuracy_level=self.layout.accuracy_level,
        )

    def head(self, x: Value, output: str) -> Value:
        """Logits in float32. Shapes: (B, C, D) -> (B, C, V)."""
        named = output if self.float == np.float32 else None
        if not self.config.tie_word_embeddings:
            y = self.linear(x, "lm_head.weight", "/head", output=named)
        elif self._table_format() is not None:
            y = self.linear(x, "model.embed_tokens.weight", "/head", output=named)
        else:
            # Stored once, as the embedding reads it; onnxruntime transposes it while loading.
            table = self.graph.stored(self.weights.plain("model.embed_tokens.weight", self.float))
            turned = self.graph.op("/head/table", "Transpose", [table], table.shape[::-1], perm=[1, 0])
            y = self.graph.op("/head", "MatMul", [x, turned], (*x.shape[:-1], table.shape[0]), output=named)
        return y if named else self.cast(y, np.float32, "/head", output)

    def _table_format(self) -> BlockFormat | None:
        """How the embedding is quantised: its rows must be whole blocks, else it stays in floating point."""
        fmt = self.layout.block_format
        if fmt is None or self.config.hidden_size % fmt.block_size:
            return None
        if not fmt.symmetric and fmt.bits == 4 and fmt.n_blocks(self.config.hidden_size) % 2:
            return None  # onnxruntime 1.23 reads zero points wrongly where a row's last one has a byte of its own
        return fmt

    def add(self, a: Value, b: Value, path: str) -> Value:
        """a + b; b may have fewer axes."""
        return self.graph.op(path, "Add", [a, b], a.shape)

    def sub(self, a: Value, b: Value, path: str) -> Value:
        """a - b, of one shape."""
        return self.graph.op(path, "Sub", [a, b], a.shape)

    def mul(self, a: Value, b: Value, path: str, output: str | None = None) -> Value:
        """a * b, of one shape."""
        return self.graph.op(path, "Mul", [a, b], a.shape, output=output)

    def sigmoid(self, x: Value, path: str) -> Value:
        """1 / (1 + exp(-x))."""
        return self.graph.op(path, "Sigmoid", [x], x.shape)

    def silu(self, x: Value, path: str) -> Value:
        """x * sigmoid(x)."""
        return self.mul(x, self.sigmoid(x, path), path)

    def cast(self, x: Value, dtype: npt.DTypeLike, path: str, output: str | None = None) -> Value:
        """The same values in another type."""
        kind = np.dtype(dtype)
        to = helper.np_dtype_to_tensor_dtype(kind)
        return self.graph.node(path, "Cast", [x], [(output, kind, x.shape)], to=to)[0]

    def int64(self, name: str, *values: int) -> Value:
        """A small constant vector."""
        return self.graph.constant(name, values, np.int64)
