"""The operators an ONNX folder's graphs may use, and the attributes each may have; onnx_graphs applies them.

Only what the exporter writes. onnxruntime checks the shapes of what flows between operators itself; the rules
here are about what it believes: head counts, block sizes, tables that are read by row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from melt_edge.config import LoopConfig


class RuleBroken(Exception):
    """An operator has an attribute or a weight it may not have; the text goes on a node's name."""


@dataclass(frozen=True)
class NodeView:
    """A node as plain data. attributes: None for one of a kind that no rule allows."""

    op_type: str
    inputs: list[str]
    outputs: list[str]
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Constants:
    """What is known of a graph before it runs.

    shapes: of every tensor of the graph. values: of those inside it. inputs: the graph's inputs' shapes.
    """

    config: LoopConfig
    n_ctx: int
    shapes: Mapping[str, tuple[int, ...]]
    values: Mapping[str, np.ndarray[Any, Any]]
    inputs: Mapping[str, tuple[int | str, ...]]

    def shape(self, node: NodeView, index: int, expected: tuple[int, ...], what: str) -> None:
        """Raises: RuleBroken unless input ``index`` is a tensor of this shape."""
        found = self.shapes.get(node.inputs[index]) if index < len(node.inputs) else None
        if found != expected:
            shown = "no stored tensor" if found is None else list(found)
            raise RuleBroken(f"reads {what} of shape {shown}, expected {list(expected)}")


Allowed = Callable[[Any], bool]
Extra = Callable[[NodeView, Constants], None]


def _is(*values: Any) -> Allowed:
    return lambda value: any(type(value) is type(allowed) and value == allowed for allowed in values)


def _whole(low: int, high: int) -> Allowed:
    return lambda value: isinstance(value, int) and low <= value <= high


def _real(low: float, high: float) -> Allowed:
    return lambda value: isinstance(value, float) and math.isfinite(value) and low <= value <= high


def _permutation(value: Any) -> bool:
    return isinstance(value, list) and 1 <= len(value) <= 4 and sorted(value) == list(range(len(value)))


@dataclass(frozen=True)
class OperatorRule:
    """The attributes an operator may have, those it must have, and what else has to hold."""

    attributes: Mapping[str, Allowed] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    extra: Extra | None = None

    def check(self, node: NodeView, constants: Constants) -> None:
        """Raises: RuleBroken with the first rule that does not hold."""
        for name, value in node.attributes.items():
            allowed = self.attributes.get(name)
            if allowed is None or not allowed(value):
                raise RuleBroken(f"has the attribute {name[:40]} = {str(value)[:40]}, which it may not have")
        for name in self.required:
            if name not in node.attributes:
                raise RuleBroken(f"has no attribute {name}")
        if self.extra is not None:
            self.extra(node, constants)


def _table(node: NodeView, constants: Constants) -> None:
    config = constants.config
    constants.shape(node, 0, (config.vocab_size, config.hidden_size), "an embedding")


def _heads(node: NodeView, constants: Constants) -> None:
    """Head counts that do not divide the tensors end the process: onnxruntime divides by them first."""
    config = constants.config
    wanted = {"num_heads": config.num_attention_heads, "kv_num_heads": config.num_key_value_heads}
    for name, value in wanted.items():
        if node.attributes[name] != value:
            raise RuleBroken(f"has {name} {node.attributes[name]}, the manifest says {value}")
    if len(node.inputs) != 9 or len(node.outputs) != 3:
        raise RuleBroken(f"has {len(node.inputs)} inputs and {len(node.outputs)} outputs, expected 9 and 3")
    for index, kind in ((3, "key"), (4, "value")):
        past, present = node.inputs[index], node.outputs[index - 2]
        if past not in constants.inputs or not past.endswith(f".{kind}") or present != past.replace("past", "present"):
            raise RuleBroken(f"reads {kind}s from {past[:40]!r} and writes {present[:40]!r}, expected a state's two")
    if node.inputs[5:7] != ["seqlens_k", "total_sequence_length"]:
        raise RuleBroken("takes its lengths from elsewhere than the graph's inputs")
    rows = _rotary_rows(constants, node.inputs[7])
    for index, name in ((7, "cosines"), (8, "sines")):
        constants.shape(node, index, (rows, config.head_dim // 2), f"a table of {name}")


def _rotary(node: NodeView, constants: Constants) -> None:
    if len(node.inputs) != 4:
        raise RuleBroken(f"has {len(node.inputs)} inputs, expected 4")
    rows = _rotary_rows(constants, node.inputs[1])
    for index, name in ((1, "cosines"), (2, "sines")):
        constants.shape(node, index, (rows, constants.config.head_dim // 2), f"a table of {name}")


def _rotary_rows(constants: Constants, name: str) -> int:
    """Positions a rotary table has: at least one for every row of the state."""
    shape = constants.shapes.get(name, (0,))
    if shape[0] < constants.n_ctx:
        raise RuleBroken(f"reads a rotary table of {shape[0]} positions, expected {constants.n_ctx}")
    return shape[0]


def _blocks(node: NodeView, constants: Constants) -> None:
    """Packed weights, scales and zero points as long as the attributes make the kernel read."""
    k, n, bits, block = (int(node.attributes[name]) for name in ("K", "N", "bits", "block_size"))
    n_blocks = -(-k // block)
    constants.shape(node, 1, (n, n_blocks, block * bits // 8), "packed weights")
    scales = constants.shapes.get(node.inputs[2] if len(node.inputs) > 2 else "", ())
    if math.prod(scales) != n * n_blocks or not scales:
        raise RuleBroken(f"reads scales of shape {list(scales)}, expected {n * n_blocks} of them")
    if len(node.inputs) > 3 and node.inputs[3]:
        points = constants.shapes.get(node.inputs[3], ())
        if math.prod(points) != n * (-(-n_blocks * bits // 8)) or not points:
            raise RuleBroken(f"reads zero points of shape {list(points)}")
    if len(node.inputs) > 4 and node.inputs[4]:
        raise RuleBroken("reads a group index, expected none")
    if len(node.inputs) > 5 and node.inputs[5]:
        constants.shape(node, 5, (n,), "a bias")


def _gather_blocks(node: NodeView, constants: Constants) -> None:
    config = constants.config
    block, bits = int(node.attributes["block_size"]), int(node.attributes.get("bits", 4))
    n_blocks = -(-config.hidden_size // block)
    packed = constants.shapes.get(node.inputs[0], ())
    if (
        len(packed) != 2
        or packed[0] != config.vocab_size
        or packed[1] * 8 // bits
        not in (
            config.hidden_size,
            n_blocks * block,
        )
    ):
        raise RuleBroken(f"reads an embedding of shape {list(packed)}, expected {config.vocab_size} packed rows")
    constants.shape(node, 2, (config.vocab_size, n_blocks), "scales")
    if len(node.inputs) > 3 and node.inputs[3]:
        constants.shape(node, 3, (config.vocab_size, -(-n_blocks * bits // 8)), "zero points")


_SMALL = _whole(-4, 4)
_BLOCK_SIZES = _is(16, 32, 64, 128, 256)
_EPSILON = _real(1e-12, 0.1)
_PLAIN = OperatorRule()

OPERATORS: dict[tuple[str, str], OperatorRule] = {
    **{("", name): _PLAIN for name in ("Add", "Sub", "Mul", "MatMul", "Sigmoid", "Where", "LessOrEqual", "Range")},
    ("", "Squeeze"): _PLAIN,
    ("", "Unsqueeze"): _PLAIN,
    ("", "Cast"): OperatorRule({"to": _is(1, 6, 7, 9, 10), "saturate": _is(0, 1)}, ("to",)),
    ("", "Reshape"): OperatorRule({"allowzero": _is(0)}),
    ("", "Transpose"): OperatorRule({"perm": _permutation}),
    ("", "Shape"): OperatorRule({"start": _SMALL, "end": _SMALL}),
    ("", "Gather"): OperatorRule({"axis": _is(0)}, extra=_table),
    ("", "RMSNormalization"): OperatorRule({"axis": _is(-1), "epsilon": _EPSILON, "stash_type": _is(1)}),
    ("", "RotaryEmbedding"): OperatorRule(
        {"interleaved": _is(0), "num_heads": _is(0), "rotary_embedding_dim": _is(0)}, extra=_rotary
    ),
    ("", "TensorScatter"): OperatorRule({"axis": _is(-2, 2), "mode": _is(b"linear")}),
    ("", "Attention"): OperatorRule({"is_causal": _is(0, 1), "scale": _real(1e-6, 1e3)}),
    ("com.microsoft", "GroupQueryAttention"): OperatorRule(
        {
            "num_heads": _whole(1, 2**20),
            "kv_num_heads": _whole(1, 2**20),
            "do_rotary": _is(1),
            "rotary_interleaved": _is(0),
            "scale": _real(1e-6, 1e3),
            "local_window_size": _is(-1),
            "softcap": _is(0.0),
        },
        ("num_heads", "kv_num_heads", "do_rotary"),
        _heads,
    ),
    ("com.microsoft", "MatMulNBits"): OperatorRule(
        {
            "K": _whole(1, 2**31 - 1),
            "N": _whole(1, 2**31 - 1),
            "bits": _is(4, 8),
            "block_size": _BLOCK_SIZES,
            "accuracy_level": _whole(0, 4),
        },
        ("K", "N", "bits", "block_size"),
        _blocks,
    ),
    ("com.microsoft", "GatherBlockQuantized"): OperatorRule(
        {
            "bits": _is(4, 8),
            "block_size": _BLOCK_SIZES,
            "gather_axis": _is(0),
            "quantize_axis": _is(1),
        },
        ("block_size",),
        _gather_blocks,
    ),
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): OperatorRule({"epsilon": _EPSILON}),
    ("com.microsoft", "QuickGelu"): OperatorRule({"alpha": _real(-100.0, 100.0)}),
}
