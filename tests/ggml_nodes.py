"""Single nodes of a graph through ggml's C API, for the tests of our kernels.

Imported as ``from ggml_nodes import ...``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

from melt_edge.runtime.library import native_function

F32 = GGMLQuantizationType.F32


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@cache
def ggml() -> dict[str, Any]:
    """ggml's functions by name."""
    pointer, i32, i64, f32 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
    signatures: dict[str, tuple[Any, ...]] = {
        "ggml_init": (pointer, _InitParams),
        "ggml_free": (None, pointer),
        "ggml_new_tensor_4d": (pointer, pointer, i32, i64, i64, i64, i64),
        "ggml_permute": (pointer, pointer, pointer, i32, i32, i32, i32),
        "ggml_sigmoid": (pointer, pointer, pointer),
        "ggml_rms_norm": (pointer, pointer, pointer, f32),
        "ggml_rope_ext": (pointer, *[pointer] * 4, *[i32] * 3, *[f32] * 6),
        "ggml_rope_ext_back": (pointer, *[pointer] * 4, *[i32] * 3, *[f32] * 6),
        "ggml_flash_attn_ext": (pointer, pointer, pointer, pointer, pointer, pointer, f32, f32, f32),
        "ggml_flash_attn_ext_add_sinks": (None, pointer, pointer),
        "ggml_get_data": (pointer, pointer),
        "ggml_new_graph": (pointer, pointer),
        "ggml_build_forward_expand": (None, pointer, pointer),
        "ggml_graph_compute_with_ctx": (i32, pointer, pointer, i32),
        "melt_edge_attn_enable": (None, ctypes.c_bool),
    }
    return {name: native_function(name, *signature) for name, signature in signatures.items()}


@contextmanager
def ggml_context(n_bytes: int, *, no_alloc: bool = False) -> Iterator[Any]:
    """Memory for tensors and a graph, freed at the end of the block. no_alloc: for what describes tensors only."""
    context = ggml()["ggml_init"](_InitParams(n_bytes, None, no_alloc))
    try:
        yield context
    finally:
        ggml()["ggml_free"](context)


def tensor(context: Any, values: NDArray[Any], kind: GGMLQuantizationType = F32) -> Any:
    """The values as a tensor of that type, or of int32 if that is what they are; the last axis first."""
    integers = values.dtype == np.int32
    shape = (1,) * (4 - values.ndim) + values.shape
    handle = ggml()["ggml_new_tensor_4d"](context, int(GGMLQuantizationType.I32 if integers else kind), *shape[::-1])
    stored = np.ascontiguousarray(values if integers else quants.quantize(values, kind))
    ctypes.memmove(ggml()["ggml_get_data"](handle), stored.ctypes.data, stored.nbytes)
    return handle


def computed(context: Any, node: Any, shape: tuple[int, ...], n_threads: int) -> NDArray[np.float32]:
    """What a node of float32 holds once the graph that ends in it was computed."""
    return computed_all(context, [node], [shape], n_threads)[0]


def computed_all(
    context: Any, nodes: Sequence[Any], shapes: Sequence[tuple[int, ...]], n_threads: int
) -> list[NDArray[np.float32]]:
    """What nodes of float32 hold once one graph, which computes them in this order, was computed."""
    graph = ggml()["ggml_new_graph"](context)
    for node in nodes:
        ggml()["ggml_build_forward_expand"](graph, node)
    assert ggml()["ggml_graph_compute_with_ctx"](context, graph, n_threads) == 0
    data = [ctypes.cast(ggml()["ggml_get_data"](node), ctypes.POINTER(ctypes.c_float)) for node in nodes]
    return [np.ctypeslib.as_array(d, shape).copy() for d, shape in zip(data, shapes, strict=True)]
