"""The rows of a product with one vector, as the threads share them out (cpp/src/row-shares.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ggml_nodes import computed_all, ggml_context, tensor
from melt_edge.runtime.library import native_function

MAX_SAME_INPUT = 8  # products of one vector between two meetings
MIN_STEP = 32 << 10  # bytes


class Params(ctypes.Structure):
    """ggml_compute_params."""

    _fields_ = (
        ("ith", ctypes.c_int),
        ("nth", ctypes.c_int),
        ("wsize", ctypes.c_size_t),
        ("wdata", ctypes.c_void_p),
        ("threadpool", ctypes.c_void_p),
        ("use_ref", ctypes.c_bool),
        ("same_input", ctypes.c_bool),
        ("i_product", ctypes.c_int),
    )


@given(
    n_threads=st.integers(1, 9),
    n_groups=st.integers(0, 300),
    group_bytes=st.sampled_from([1, 9216, 25344, 100_000]),
    i_product=st.integers(0, MAX_SAME_INPUT - 1),
    order=st.randoms(use_true_random=False),
)
@settings(deadline=None)
def test_every_row_is_taken_once(n_threads: int, n_groups: int, group_bytes: int, i_product: int, order: Any) -> None:
    """Threads that come back for more in any order, some of them never before the others are done."""
    next_rows = native_function(
        "melt_next_rows",
        ctypes.c_int64,
        ctypes.POINTER(Params),
        ctypes.c_int64,
        ctypes.c_size_t,
        ctypes.POINTER(ctypes.c_int64),
    )
    n_bytes = native_function("melt_row_shares_bytes", ctypes.c_size_t, ctypes.c_int)(n_threads)
    work = ctypes.create_string_buffer(n_bytes)  # of zeros: nothing is taken
    taken = np.zeros(n_groups, np.int64)
    waiting = list(range(n_threads))
    favourite = order.choice(waiting)
    while waiting:
        ith = favourite if favourite in waiting and order.random() < 0.7 else order.choice(waiting)
        params = Params(ith, n_threads, n_bytes, ctypes.addressof(work), None, False, False, i_product)
        group = ctypes.c_int64(-1)
        n = next_rows(params, n_groups, group_bytes, group)
        if n == 0:
            waiting.remove(ith)
            continue
        assert 0 <= group.value <= group.value + n <= n_groups
        taken[group.value : group.value + n] += 1
        left = n_groups * (ith + 1) // n_threads - n_groups * ith // n_threads
        assert n_threads == 1 or n <= max(left // 2 + 1, MIN_STEP // group_bytes)
    assert (taken == 1).all()


@cache
def repack_buffer_type() -> Any:
    """Of weights that ggml's CPU back end lays out anew; skips the test where it does so for no type."""
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
    return pytest.skip("this library repacks no weights")


def products(
    weights: Sequence[NDArray[np.float32]], x: NDArray[np.float32], n_threads: int
) -> list[NDArray[np.float32]]:
    """Products of repacked q4_0 weights, each (rows, n), and one vector (n,)."""
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    new = native_function("ggml_new_tensor_2d", pointer, pointer, i32, i64, i64)
    fill = native_function("ggml_backend_tensor_set", None, pointer, pointer, ctypes.c_size_t, ctypes.c_size_t)
    allocate = native_function("ggml_backend_alloc_ctx_tensors_from_buft", pointer, pointer, pointer)
    free = native_function("ggml_backend_buffer_free", None, pointer)
    mul_mat = native_function("ggml_mul_mat", pointer, pointer, pointer, pointer)
    kind = GGMLQuantizationType.Q4_0
    with ggml_context(1 << 20, no_alloc=True) as stored, ggml_context(1 << 24) as context:
        handles = [new(stored, int(kind), *w.shape[::-1]) for w in weights]
        buffer = allocate(stored, repack_buffer_type())
        try:
            for handle, w in zip(handles, weights, strict=True):
                data = np.ascontiguousarray(quants.quantize(w, kind))
                fill(handle, data.ctypes.data, 0, data.nbytes)
            vector = tensor(context, x)
            nodes = [mul_mat(context, handle, vector) for handle in handles]
            return computed_all(context, nodes, [(len(w),) for w in weights], n_threads)
        finally:
            free(buffer)


@given(
    rows=st.lists(st.integers(1, 40).map(lambda n: 16 * n), min_size=1, max_size=2 * MAX_SAME_INPUT + 3),
    n_blocks=st.integers(1, 9),
    n_threads=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_products_of_one_vector(rows: list[int], n_blocks: int, n_threads: int, seed: int) -> None:
    """More of them than may follow each other without a meeting, too; by any number of threads the same."""
    rng = np.random.default_rng(seed)
    n = 256 * n_blocks
    weights = [rng.standard_normal((r, n), np.float32) for r in rows]
    x = rng.standard_normal(n, np.float32)
    found = products(weights, x, n_threads)
    for ours, alone, w in zip(found, products(weights, x, 1), weights, strict=True):
        assert (ours == alone).all()
        exact = quants.dequantize(quants.quantize(w, GGMLQuantizationType.Q4_0), GGMLQuantizationType.Q4_0) @ x
        assert np.sum((ours - exact) ** 2) < 1e-3 * np.sum(exact**2) + 1e-3  # the vector has 8 bits there
