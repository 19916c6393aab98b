"""Nodes, values and weights of one ONNX graph: every value's shape is stated where it is made.

Knows operators, no architecture; the model is in onnx_graph.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from melt_edge import __version__
from melt_edge.export.onnx_weights import WEIGHTS_NAME, StoredTensor

MICROSOFT = "com.microsoft"
# opset -> the oldest IR that may carry it, which is what the oldest onnxruntime that knows it reads
_IR_VERSIONS = {23: 11, 24: 12}

Dim = int | str
Shape = tuple[Dim, ...]


@dataclass(frozen=True)
class Value:
    """A named value of a graph. dtype: numpy's; shape: numbers and symbols such as "batch"."""

    name: str
    dtype: np.dtype[Any]
    shape: Shape


class GraphBuilder:
    """Collects one graph. Node names are paths such as /loop/layers.3/attn/q_proj/MatMul."""

    def __init__(self, name: str, opset: int) -> None:
        self.name = name
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[Value] = []
        self.outputs: list[Value] = []
        self._inner: list[Value] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._domains = {""}

    def input(self, name: str, dtype: npt.DTypeLike, shape: Shape) -> Value:
        """Declare a graph input."""
        self.inputs.append(Value(name, np.dtype(dtype), shape))
        return self.inputs[-1]

    def output(self, *values: Value) -> None:
        """Declare graph outputs, which nodes have made under the right names."""
        self.outputs += values

    def node(
        self,
        path: str,
        op: str,
        inputs: Sequence[Value | None],
        outputs: Sequence[tuple[str | None, npt.DTypeLike, Shape] | None],
        *,
        domain: str = "",
        **attributes: Any,
    ) -> list[Value]:
        """Add the node ``path``/``op``; returns its outputs, less those left out.

        outputs: (name, dtype, shape), name None for one made from the path; None leaves an optional one out.
        """
        name = f"{path}/{op}"
        slots = [
            output and Value(output[0] or f"{name}/output_{index}", np.dtype(output[1]), output[2])
            for index, output in enumerate(outputs)
        ]
        made = [value for value in slots if value is not None]
        names = [value.name if value is not None else "" for value in inputs]
        while names and not names[-1]:
            names.pop()
        made_names = [value.name if value is not None else "" for value in slots]
        self.nodes.append(helper.make_node(op, names, made_names, name=name, domain=domain, **attributes))
        self._domains.add(domain)
        self._inner += made
        return made

    def op(
        self,
        path: str,
        op: str,
        inputs: Sequence[Value | None],
        shape: Shape,
        *,
        output: str | None = None,
        **more: Any,
    ) -> Value:
        """Add a node with one output of the first input's type."""
        first = inputs[0]
        assert first is not None
        return self.node(path, op, inputs, [(output, first.dtype, shape)], **more)[0]

    def stored(self, tensor: StoredTensor, *, shape: tuple[int, ...] | None = None) -> Value:
        """A tensor of the weights file, seen with another shape if asked."""
        dims = shape or tensor.shape
        if tensor.name not in self._initializers:
            proto = TensorProto(
                name=tensor.name,
                data_type=helper.np_dtype_to_tensor_dtype(tensor.dtype),
                dims=dims,
                data_location=TensorProto.EXTERNAL,
            )
            place = {"location": WEIGHTS_NAME, "offset": str(tensor.offset), "length": str(tensor.nbytes)}
            for key, text in place.items():
                proto.external_data.add(key=key, value=text)
            self._initializers[tensor.name] = proto
        return Value(tensor.name, tensor.dtype, dims)

    def constant(self, name: str, values: npt.ArrayLike, dtype: npt.DTypeLike) -> Value:
        """A small constant inside the graph; the same name gives the same constant."""
        array = np.asarray(values, dtype)
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(array, name)
        return Value(name, array.dtype, array.shape)

    def body(self, name: str) -> GraphBuilder:
        """A graph for a Loop of this one: it sees this one's values, and its weights and constants are kept here."""
        inner = GraphBuilder(name, self.opset)
        inner._initializers, inner._domains = self._initializers, self._domains
        return inner

    def proto(self, initializers: Sequence[onnx.TensorProto] = ()) -> onnx.GraphProto:
        """The graph, its inner values' shapes stated too."""
        ends = {value.name for value in self.outputs}
        return helper.make_graph(
            self.nodes,
            self.name,
            [_info(value) for value in self.inputs],
            [_info(value) for value in self.outputs],
            list(initializers),
            value_info=[_info(value) for value in self._inner if value.name not in ends],
        )

    def model(self) -> onnx.ModelProto:
        """The graph as a model, with all constants and its places in the weights file."""
        graph = self.proto(list(self._initializers.values()))
        opsets = [helper.make_opsetid(domain, self.opset if domain == "" else 1) for domain in sorted(self._domains)]
        return helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=_IR_VERSIONS[self.opset],
            producer_name="melt-edge",
            producer_version=__version__,
        )


def _info(value: Value) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(value.name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
