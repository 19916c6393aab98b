"""The check of an ONNX folder's graphs before onnxruntime sees them.

onnxruntime trusts a graph in places: head counts that do not fit the tensors end the process with SIGFPE, and
operators of other domains or with subgraphs do what they like. So: operators and attributes from a list,
inputs and outputs as the configuration asks for, weights inside the one file of the manifest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from melt_edge.config import LoopConfig
from melt_edge.errors import BackendUnavailableError, FormatError
from melt_edge.runtime.onnx_inplace import broken_pairs
from melt_edge.runtime.onnx_ops import OPERATORS, Constants, NodeView, RuleBroken

MAX_NODES_PER_LAYER = 256
MAX_INNER_BYTES = 2**20  # constants inside a graph; everything larger is in the weights file
_MIN_IR, _MAX_IR = 8, 13
_OPSETS = {"": range(17, 27), "com.microsoft": range(1, 2)}

# what a graph's tensor may be: ONNX's number -> numpy's name
_DTYPES = {1: "float32", 10: "float16", 7: "int64", 6: "int32", 9: "bool", 2: "uint8", 3: "int8"}
_STATE = ("past.", "present.")
_NUMBER = re.compile(r"[0-9]{1,18}")
_EXTERNAL = 1  # TensorProto.EXTERNAL

Dim = int | str


@dataclass(frozen=True)
class Port:
    """An input or output of a graph. shape: numbers, and "batch" or "chunk"."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]


@dataclass(frozen=True)
class Ports:
    """The inputs and outputs of one graph, in order."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


@dataclass(frozen=True)
class Weight:
    """A tensor a graph reads from the weights file. Units: bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True)
class CheckedGraph:
    """A graph that may be given to onnxruntime. model: its onnx.ModelProto."""

    model: Any
    weights: tuple[Weight, ...]


def expected_ports(config: LoopConfig, *, n_ctx: int, activations: str) -> dict[str, Ports]:
    """What the three graphs of a folder take and give, by the contract of the exporter."""
    d = config.hidden_size
    x = ("batch", "chunk", d)
    rows = ("batch", config.num_key_value_heads, n_ctx, config.head_dim)
    layers = range(config.num_hidden_layers)
    gated = layers if config.has_gate else range(0)

    def states(kind: str) -> list[Port]:
        return [Port(f"{kind}.{i}.{name}", activations, rows) for i in layers for name in ("key", "value")]

    inputs = [Port("x", activations, x), *(Port(f"h.{i}", activations, x) for i in gated), *states("past")]
    inputs += [Port("seqlens_k", "int32", ("batch",)), Port("total_sequence_length", "int32", ())]
    if config.has_gate and config.kv_gate_init == "input":
        inputs.append(Port("first_loop", "bool", ()))
    outputs = [Port("x_out", activations, x), *(Port(f"h_out.{i}", activations, x) for i in gated), *states("present")]
    outputs.append(Port("exit_prob", "float32", ("batch", "chunk")))
    return {
        "embed": Ports((Port("input_ids", "int64", ("batch", "chunk")),), (Port("x", activations, x),)),
        "loop": Ports(tuple(inputs), tuple(outputs)),
        "head": Ports(
            (Port("x", activations, x),), (Port("logits", "float32", ("batch", "chunk", config.vocab_size)),)
        ),
    }


def check_graph(
    data: bytes, path: Path, ports: Ports, config: LoopConfig, *, n_ctx: int, weights: Path, weights_bytes: int
) -> CheckedGraph:
    """The graph in ``data``, if onnxruntime can load it without harm.

    path: for messages. weights: the file its tensors may lie in. Raises: FormatError; BackendUnavailableError
    without the package onnx.
    """
    model = _parsed(data, path)
    check = _Check(path, config, n_ctx, weights, weights_bytes)
    return check.run(model, ports)


def with_n_ctx(model: Any, n_ctx: int) -> bytes:
    """A checked loop graph whose K/V state has room for n_ctx tokens instead of what it was exported for.

    Only for a graph whose state is read by GroupQueryAttention alone, which takes the room from its inputs.
    """
    for port in (*model.graph.input, *model.graph.output):
        if port.name.startswith(_STATE):
            port.type.tensor_type.shape.dim[2].dim_value = n_ctx
    inner = [info for info in model.graph.value_info if not info.name.startswith(_STATE)]
    del model.graph.value_info[:]
    model.graph.value_info.extend(inner)
    return bytes(model.SerializeToString())


def has_free_n_ctx(model: Any) -> bool:
    """Whether with_n_ctx can be used on this loop graph."""
    readers = {node.op_type for node in model.graph.node for name in node.input if name.startswith("past.")}
    return readers == {"GroupQueryAttention"}


def _parsed(data: bytes, path: Path) -> Any:
    try:
        import onnx
    except ImportError as err:
        raise BackendUnavailableError(
            f'{path}: checking an ONNX graph needs the package onnx; run: pip install "melt-edge[onnx]"'
        ) from err
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as err:  # protobuf's error class depends on its implementation
        raise FormatError(f"{path}: is no ONNX graph ({err}); export the folder again") from err
    if not _is_text(model):
        raise FormatError(f"{path}: has names that are not UTF-8; export the folder again")
    return model


def _is_text(message: Any) -> bool:
    """Whether every text below a message is one: protobuf gives bytes where it is no UTF-8."""
    for field, value in message.ListFields():
        items = value if isinstance(value, Iterable) and not isinstance(value, str | bytes) else (value,)
        if field.type == field.TYPE_STRING and not all(isinstance(item, str) for item in items):
            return False
        if field.type == field.TYPE_MESSAGE and not all(_is_text(item) for item in items):
            return False
    return True


class _Check:
    """The rules of one graph."""

    def __init__(self, path: Path, config: LoopConfig, n_ctx: int, weights: Path, weights_bytes: int) -> None:
        self.path = path
        self.config = config
        self.n_ctx = n_ctx
        self.weights = weights
        self.weights_bytes = weights_bytes

    def fail(self, message: str) -> NoReturn:
        raise FormatError(f"{self.path}: {message}; export the folder again")

    def run(self, model: Any, ports: Ports) -> CheckedGraph:
        graph = model.graph
        self.check_header(model)
        self.check_ports(graph.input, ports.inputs, "input")
        self.check_ports(graph.output, ports.outputs, "output")
        stored, inner = self.check_initializers(graph, {port.name for port in ports.inputs})
        limit = MAX_NODES_PER_LAYER * (self.config.num_hidden_layers + 2)
        if len(graph.node) > limit:
            self.fail(f"has {len(graph.node)} nodes, expected at most {limit}")
        shapes = {name: tuple(array.shape) for name, array in inner.items()}
        shapes |= {weight.name: weight.shape for weight in stored}
        constants = Constants(self.config, self.n_ctx, shapes, inner, {port.name: port.shape for port in ports.inputs})
        for node in graph.node:
            self.check_node(node, constants)
        for name, reader in broken_pairs(graph):
            self.fail(f"node {reader[:80]!r} may read {name} after it is overwritten, expected it to come before")
        return CheckedGraph(model, tuple(stored))

    def check_header(self, model: Any) -> None:
        if not _MIN_IR <= model.ir_version <= _MAX_IR:
            self.fail(f"has the IR version {model.ir_version}, expected {_MIN_IR} to {_MAX_IR}")
        for opset in model.opset_import:
            versions = _OPSETS.get(opset.domain)
            if versions is None or opset.version not in versions:
                self.fail(
                    f"needs version {opset.version} of the operators {opset.domain[:40]!r}, which are not allowed"
                )
        for name in ("functions", "training_info", "configuration"):
            if hasattr(model, name) and len(getattr(model, name)):
                self.fail(f"has {name}, expected none")
        for prop in model.metadata_props:
            if prop.key == "ort_config":
                self.fail("brings settings of its own for onnxruntime (metadata 'ort_config'), expected none")
        for name in ("sparse_initializer", "quantization_annotation"):
            if len(getattr(model.graph, name)):
                self.fail(f"has {name}, expected none")

    def check_ports(self, found: Any, expected: tuple[Port, ...], kind: str) -> None:
        names = [port.name for port in found]
        wanted = [port.name for port in expected]
        if sorted(names) != sorted(wanted):
            odd = sorted(set(names) ^ set(wanted))[:6] or sorted({name for name in names if names.count(name) > 1})[:6]
            self.fail(f"has other {kind}s than its configuration asks for ({', '.join(name[:40] for name in odd)})")
        by_name = {port.name: port for port in expected}
        for port in found:
            want = by_name[port.name]
            shape = tuple(_dims(port.type.tensor_type.shape))
            dtype = _DTYPES.get(port.type.tensor_type.elem_type, "another type")
            if port.type.WhichOneof("value") != "tensor_type" or (dtype, shape) != (want.dtype, want.shape):
                self.fail(
                    f"{kind} {port.name} is {dtype} {_shown(shape)}, expected {want.dtype} {_shown(want.shape)} "
                    "by the manifest"
                )

    def check_initializers(self, graph: Any, inputs: set[str]) -> tuple[list[Weight], dict[str, np.ndarray[Any, Any]]]:
        stored: list[Weight] = []
        inner: dict[str, np.ndarray[Any, Any]] = {}
        seen = set(inputs)
        inner_bytes = 0
        for tensor in graph.initializer:
            if tensor.name in seen or not tensor.name:
                self.fail(f"has the tensor {tensor.name[:80]!r} twice, or it is an input as well")
            seen.add(tensor.name)
            dtype = _DTYPES.get(tensor.data_type)
            shape = tuple(int(size) for size in tensor.dims)
            if dtype is None or any(size < 0 for size in shape) or math.prod(shape) >= 2**40:
                self.fail(f"tensor {tensor.name[:80]!r} has type {tensor.data_type} and shape {_shown(shape)}")
            if tensor.data_location == _EXTERNAL:
                stored.append(self.external(tensor, dtype, shape))
            else:
                inner_bytes += tensor.ByteSize()
                if inner_bytes > MAX_INNER_BYTES:
                    self.fail(
                        f"holds more than {MAX_INNER_BYTES} bytes of constants, expected them in {self.weights.name}"
                    )
                inner[tensor.name] = self.constant(tensor, tensor.name, dtype, shape)
        return stored, inner

    def external(self, tensor: Any, dtype: str, shape: tuple[int, ...]) -> Weight:
        place = {entry.key: entry.value for entry in tensor.external_data}
        name = f"tensor {tensor.name[:80]!r}"
        if len(place) != len(tensor.external_data) or set(place) != {"location", "offset", "length"}:
            self.fail(f"{name} has {sorted(place)} of external data, expected location, offset and length")
        if place["location"] != self.weights.name:
            self.fail(f"{name} lies in {place['location'][:80]!r}, expected {self.weights.name!r}")
        if any(
            not place[key].isascii() or not place[key].isdigit() or len(place[key]) > 18 for key in ("offset", "length")
        ):
            self.fail(f"{name} lies at {place['offset'][:40]!r}, {place['length'][:40]!r} bytes, expected two numbers")
        offset, length = int(place["offset"]), int(place["length"])
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if length != nbytes or offset + length > self.weights_bytes:
            self.fail(
                f"{name} of shape {_shown(shape)} has {length} bytes at {offset}, expected {nbytes} "
                f"inside the {self.weights_bytes} bytes of {self.weights.name}"
            )
        if len(tensor.raw_data) or any(len(getattr(tensor, field)) for field in _TYPED_FIELDS):
            self.fail(f"{name} has data of its own beside the file's")
        return Weight(tensor.name, dtype, shape, offset, length)

    def constant(self, tensor: Any, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        from onnx import numpy_helper

        try:
            values = numpy_helper.to_array(tensor)
        except Exception as err:  # whatever the conversion stumbles over
            self.fail(f"constant {name[:80]!r} of {dtype} {_shown(shape)} cannot be read ({err})")
        if tuple(values.shape) != shape or str(values.dtype) != dtype:
            self.fail(
                f"constant {name[:80]!r} is {values.dtype} {_shown(values.shape)}, expected {dtype} {_shown(shape)}"
            )
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            self.fail(f"constant {name[:80]!r} has values that are not finite (NaN or Inf)")
        # a shape or a length: one beyond every size of the model would only fill memory
        if (
            values.dtype.kind == "i"
            and values.size
            and int(np.abs(values).max()) > largest_size(self.config, self.n_ctx)
        ):
            self.fail(f"constant {name[:80]!r} is beyond every size of the model")
        return values

    def check_node(self, node: Any, constants: Constants) -> None:
        where = f"node {node.name[:80]!r}"
        rule = OPERATORS.get((node.domain, node.op_type))
        if rule is None:
            self.fail(f"{where} is {node.domain[:40]}:{node.op_type[:40]}, which is not an operator of these models")
        if getattr(node, "overload", "") or len(getattr(node, "device_configurations", ())):
            self.fail(f"{where} has an overload or a device of its own, expected none")
        attributes: dict[str, Any] = {}
        for attribute in node.attribute:
            if attribute.name in attributes:
                self.fail(f"{where} has the attribute {attribute.name[:40]!r} twice")
            attributes[attribute.name] = _attribute(attribute)
        try:
            rule.check(NodeView(node.op_type, list(node.input), list(node.output), attributes), constants)
        except RuleBroken as err:
            self.fail(f"{where} ({node.op_type}) {err}")


_TYPED_FIELDS = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")


def largest_size(config: LoopConfig, n_ctx: int) -> int:
    """The largest number a shape of these models can hold."""
    wide = config.num_attention_heads * config.head_dim
    return max(n_ctx, config.vocab_size, config.hidden_size, config.intermediate_size, wide)


def _attribute(attribute: Any) -> Any:
    """A scalar, list or text attribute's value; None for tensors, graphs and types, which no operator here has."""
    kinds = {1: "f", 2: "i", 3: "s", 6: "floats", 7: "ints"}
    field = kinds.get(attribute.type)
    if field is None or attribute.ref_attr_name:
        return None
    value = getattr(attribute, field)
    return list(value) if field.endswith("s") and field != "s" else value


def _dims(shape: Any) -> Iterator[Dim]:
    for dim in shape.dim:
        kind = dim.WhichOneof("value")
        yield int(dim.dim_value) if kind == "dim_value" else str(dim.dim_param) if kind == "dim_param" else "?"


def _shown(shape: Mapping[Any, Any] | tuple[Any, ...]) -> str:
    return "[" + ", ".join(str(size)[:20] for size in list(shape)[:8]) + "]"
