"""The CPU's product of q4_0 weights and one token (cpp/src/gemv-q4_0.cpp) against float64 and ggml's plain kernel.

ggml's functions for repacked weights are called as its matrix product calls them.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from melt_edge.errors import AbiMismatchError
from melt_edge.runtime.library import native_function

BLOCK = 32
ROWS = 8  # that lie together
MAX_NMSE = 1e-12  # float32's rounding, in sums of up to some hundred blocks
# Of the token whose scales fit the kernel's buffer (MAX_BLOCKS); longer ones are added up in parts.
LONG = 512 * BLOCK


def gemv(name: str) -> Any:
    """A product of ggml's C code; skips the test where the library has none of that layout."""
    pointer, i32 = ctypes.c_void_p, ctypes.c_int
    try:
        native_function("ggml_cpu_init", None)()  # fills the table of float16 values
        return native_function(name, None, i32, pointer, ctypes.c_size_t, pointer, pointer, i32, i32)
    except AbiMismatchError:
        pytest.skip(f"this library does not export {name}")


def repacked(q: NDArray[np.uint8], d: NDArray[np.float16]) -> NDArray[np.uint8]:
    """block_q4_0x8: eight rows' scales, then 8 bytes of each row in turn, the offset of 8 made a sign.

    Shapes: q (rows, blocks, 32) of 0..15, d (rows, blocks).
    """
    n_rows, n_blocks, _ = q.shape
    packed = (q[..., :16] | q[..., 16:] << 4) ^ 0x88  # (rows, blocks, 16)
    groups = packed.reshape(n_rows // ROWS, ROWS, n_blocks, 2, 8).transpose(0, 2, 3, 1, 4)
    scales = d.reshape(n_rows // ROWS, ROWS, n_blocks).transpose(0, 2, 1)
    scale_bytes = np.ascontiguousarray(scales).view(np.uint8)
    return np.concatenate(
        [scale_bytes, groups.reshape(n_rows // ROWS, n_blocks, 16 * ROWS)], axis=2, dtype=np.uint8
    ).copy()


def product(function: Any, weights: NDArray[np.uint8], token: NDArray[np.uint8], n: int, rows: int) -> Any:
    """One token times the weights, with a guard behind the output."""
    out = np.full(rows + ROWS, np.nan, np.float32)
    function(n, out.ctypes.data, rows, weights.ctypes.data, token.ctypes.data, 1, rows)
    assert np.isnan(out[rows:]).all()
    return out[:rows].astype(np.float64)


def nmse(found: NDArray[np.float64], wanted: NDArray[np.float64]) -> float:
    """Squared error over the power of what was wanted."""
    return float(np.sum((found - wanted) ** 2) / np.sum(wanted**2))


def check(n: int, rows: int, seed: int, extreme: tuple[int, int] | None = None) -> None:
    """Both kernels against float64, with random values, or one weight and one value of the token everywhere."""
    rng = np.random.default_rng(seed)
    shape = (rows, n // BLOCK)
    if extreme:
        q = np.full((*shape, BLOCK), extreme[0], np.uint8)
        qs = np.full((shape[1], BLOCK), extreme[1], np.int8)
    else:
        q = rng.integers(0, 16, (*shape, BLOCK), np.uint8)
        qs = rng.integers(-127, 128, (shape[1], BLOCK), np.int8)
        qs[-1, -1] |= 1
    d = rng.normal(size=shape).astype(np.float16)
    dy = rng.normal(size=(shape[1], 1)).astype(np.float16)
    d[-1, -1], dy[-1] = 1, 1  # of the value that is changed below: it must count
    token = np.concatenate([dy.view(np.uint8), qs.view(np.uint8)], axis=1)  # block_q8_0
    wanted = ((q.astype(np.float64) - 8) * d[..., None].astype(np.float64)).reshape(rows, n) @ (
        qs * dy.astype(np.float64)
    ).reshape(n)

    weights = repacked(q, d)
    ours = product(gemv("ggml_gemv_q4_0_8x8_q8_0"), weights, token, n, rows)
    assert nmse(ours, wanted) < MAX_NMSE
    assert nmse(product(gemv("ggml_gemv_q4_0_8x8_q8_0_generic"), weights, token, n, rows), wanted) < MAX_NMSE
    weights[rows // ROWS - 1, -1, -1] ^= 0x10  # one value of the last row
    changed = product(gemv("ggml_gemv_q4_0_8x8_q8_0"), weights, token, n, rows)
    assert (changed[:-1] == ours[:-1]).all()
    assert changed[-1] != ours[-1]


@settings(max_examples=40, deadline=None)
@given(n_blocks=st.integers(1, 200), groups=st.integers(1, 6), seed=st.integers(0, 2**32 - 1))
def test_product_of_any_shape(n_blocks: int, groups: int, seed: int) -> None:
    check(n_blocks * BLOCK, groups * ROWS, seed)


@pytest.mark.parametrize("q", [0, 15])
@pytest.mark.parametrize("qs", [-128, 127])
def test_the_largest_sums(q: int, qs: int) -> None:
    """-128 with a weight below 0 also tells this kernel from ggml's, which cannot change that value's sign."""
    check(2048, 16, 0, (q, qs))


@pytest.mark.parametrize("n", [LONG, LONG + BLOCK, 2 * LONG + 64])
def test_rows_longer_than_the_buffer(n: int) -> None:
    check(n, 16, 0)


def test_rows_that_do_not_lie_eight_together_are_left_to_ggml() -> None:
    pointer, i32 = ctypes.c_void_p, ctypes.c_int
    kernel = native_function("melt_gemv_q4_0_8x8", ctypes.c_bool, i32, pointer, pointer, pointer, i32)
    assert not kernel(BLOCK, None, None, None, 4)
