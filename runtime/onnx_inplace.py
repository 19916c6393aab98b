"""Whether a loop graph may write its outputs over its inputs, which is how the runtime binds it.

Every node that reads an input has to have run before the output that overwrites it is made. What the output is
computed from has; so each reader must be the output's producer or one of its ancestors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# The producer itself may read what it overwrites only if it reads each value before it writes there.
_IN_PLACE = ("Add", "Sub", "Mul", "Where", "Sigmoid", "GroupQueryAttention", "TensorScatter")


def broken_pairs(graph: Any) -> Iterator[tuple[str, str]]:
    """(input, name of a node that may read it too late) for every loop graph input that is overwritten."""
    producers = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    readers: dict[str, list[int]] = {}
    for index, node in enumerate(graph.node):
        for name in node.input:
            readers.setdefault(name, []).append(index)
    outputs = {port.name for port in graph.output}
    for port in graph.input:
        output = overwritten_by(port.name)
        if output not in outputs:
            continue
        last = producers.get(output, -1)
        before = _ancestors(graph, producers, last)
        for reader in readers.get(port.name, ()):
            node = graph.node[reader]
            if reader == last and node.op_type in _IN_PLACE:
                continue
            if reader == last or reader not in before or port.name.startswith("past."):
                yield port.name, node.name


def overwritten_by(name: str) -> str:
    """The output that is bound to the memory of a loop graph's input."""
    if name == "x":
        return "x_out"
    kind, _, rest = name.partition(".")
    return {"h": f"h_out.{rest}", "past": f"present.{rest}"}.get(kind, "")


def _ancestors(graph: Any, producers: dict[str, int], last: int) -> set[int]:
    """Indices of all nodes that node ``last`` depends on."""
    found: set[int] = set()
    todo = [last] if last >= 0 else []
    while todo:
        for name in graph.node[todo.pop()].input:
            index = producers.get(name)
            if index is not None and index not in found:
                found.add(index)
                todo.append(index)
    return found
