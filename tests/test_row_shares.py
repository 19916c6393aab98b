"""Products of repacked weights and vectors, whose rows the threads share out (cpp/src/row-shares.cpp).

That each row is taken once, by threads that take them at the same time, is what cpp/tests/test-row-shares.cpp tests.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ggml_nodes import computed_all, ggml_context, tensor
from melt_edge.runtime.library import native_function

MAX_PRODUCTS = 8  # that are computed together
KINDS = (GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_K)


@cache
def repack_buffer_type() -> Any:
    """Of weights that ggml's CPU back end lays out anew; skips the test on a CPU where it does not for KINDS."""
    has = [native_function(f"ggml_cpu_has_{feature}", ctypes.c_int)() for feature in ("avx2", "neon", "dotprod")]
    if not (has[0] or (has[1] and has[2])):
        pytest.skip("ggml repacks no weights for this CPU")
    pointer = ctypes.c_void_p
    registry = native_function("ggml_backend_cpu_reg", pointer)()
    device = native_function("ggml_backend_reg_dev_get", pointer, pointer, ctypes.c_size_t)(registry, 0)
    address = native_function("ggml_backend_reg_get_proc_address", pointer, pointer, ctypes.c_char_p)
    extra = ctypes.CFUNCTYPE(ctypes.POINTER(pointer), pointer)(address(registry, b"ggml_backend_dev_get_extra_bufts"))
    name = native_function("ggml_backend_buft_name", ctypes.c_char_p, pointer)
    for handle in extra(device):
        if handle is None:
            break
        if name(handle) == b"CPU_REPACK":
            return handle
    return pytest.skip("this library was built without repacked weights")


def quantized(weights: NDArray[np.float32], kind: GGMLQuantizationType) -> NDArray[np.uint8]:
    """The rows of weights (rows, n) in the bytes of that type."""
    pointer, i64 = ctypes.c_void_p, ctypes.c_int64
    quantize = native_function(
        "ggml_quantize_chunk", ctypes.c_size_t, ctypes.c_int, pointer, pointer, i64, i64, i64, pointer
    )
    n_rows, n = weights.shape
    block, n_bytes = GGML_QUANT_SIZES[kind]
    found = np.empty((n_rows, n // block * n_bytes), np.uint8)
    assert quantize(int(kind), weights.ctypes.data, found.ctypes.data, 0, n_rows, n, None) == found.nbytes
    return found


def products(
    kind: GGMLQuantizationType,
    weights: Sequence[NDArray[np.uint8]],
    vectors: Sequence[NDArray[np.float32] | int],
    n_threads: int,
) -> list[NDArray[np.float32]]:
    """Products of repacked weights, each the bytes of its rows, and a vector: what an earlier product of that number
    gives, or an array, which is the same tensor wherever it is the same array.
    """
    block, n_bytes = GGML_QUANT_SIZES[kind]
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    new = native_function("ggml_new_tensor_2d", pointer, pointer, i32, i64, i64)
    fill = native_function("ggml_backend_tensor_set", None, pointer, pointer, ctypes.c_size_t, ctypes.c_size_t)
    allocate = native_function("ggml_backend_alloc_ctx_tensors_from_buft", pointer, pointer, pointer)
    free = native_function("ggml_backend_buffer_free", None, pointer)
    mul_mat = native_function("ggml_mul_mat", pointer, pointer, pointer, pointer)
    with ggml_context(1 << 20, no_alloc=True) as stored, ggml_context(1 << 24) as context:
        handles = [new(stored, int(kind), w.shape[1] // n_bytes * block, len(w)) for w in weights]
        buffer = allocate(stored, repack_buffer_type())
        try:
            for handle, w in zip(handles, weights, strict=True):
                fill(handle, w.ctypes.data, 0, w.nbytes)
            inputs = {id(x): tensor(context, x) for x in vectors if not isinstance(x, int)}
            nodes: list[Any] = []
            for handle, x in zip(handles, vectors, strict=True):
                nodes.append(mul_mat(context, handle, nodes[x] if isinstance(x, int) else inputs[id(x)]))
            return computed_all(context, nodes, [(len(w),) for w in weights], n_threads)
        finally:
            free(buffer)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 40).map(lambda n: 16 * n), st.integers(0, 2)),
        min_size=1,
        max_size=2 * MAX_PRODUCTS + 3,
    ),
    n_blocks=st.tuples(*[st.integers(1, 9)] * 3),
    n_threads=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_products_that_follow_each_other(
    kind: GGMLQuantizationType,
    shapes: list[tuple[int, int]],
    n_blocks: tuple[int, int, int],
    n_threads: int,
    seed: int,
) -> None:
    """More of them, of more vectors and of other lengths than are computed together, too; the same by all threads."""
    rng = np.random.default_rng(seed)
    vectors = [rng.standard_normal(256 * n, np.float32) for n in n_blocks]
    taken = [vectors[i] for _, i in shapes]
    weights = [
        quantized(rng.standard_normal((rows, len(x)), np.float32), kind)
        for (rows, _), x in zip(shapes, taken, strict=True)
    ]
    found = products(kind, weights, taken, n_threads)
    for ours, alone, w, x in zip(found, products(kind, weights, taken, 1), weights, taken, strict=True):
        assert (ours == alone).all()
        exact = quants.dequantize(w, kind) @ x
        assert np.sum((ours - exact) ** 2) < 1e-3 * np.sum(exact**2) + 1e-3  # the vector has 8 bits there


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_product_of_another_one(kind: GGMLQuantizationType) -> None:
    """One that takes what the one before gives is not computed together with it."""
    rng = np.random.default_rng(5)
    first, second = (quantized(rng.standard_normal((256, 256), np.float32), kind) for _ in range(2))
    x = rng.standard_normal(256, np.float32)
    *_, ours = products(kind, [first, second, first], [x, 0, 1], n_threads=2)
    exact = x.astype(np.float64)
    for w in (first, second, first):
        exact = quants.dequantize(w, kind) @ exact
    assert np.sum((ours - exact) ** 2) < 5e-3 * np.sum(exact**2)
