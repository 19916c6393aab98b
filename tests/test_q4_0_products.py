"""The CPU's products of q4_0 weights and tokens (cpp/src/gemv-q4_0.cpp, gemm-q4_0.cpp) against float64 and ggml's plain
kernels.

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
FOUR = 4  # tokens whose blocks lie together
# Of the token whose scales fit the kernels' buffers (MAX_BLOCKS); longer ones are added up in parts.
LONG, LONG_MANY = 512 * BLOCK, 256 * BLOCK
# Bytes of weights that stay in the cache for all tokens (L2_BYTES); more are taken in parts.
L2_BYTES = 256 << 10


def ggml_product(name: str) -> Any:
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


def tokens_together(qs: NDArray[np.int8], d: NDArray[np.float16]) -> NDArray[np.uint8]:
    """block_q8_0 of one token; block_q8_0x4 of more: four tokens' scales, then 8 bytes of each token in turn.

    Shapes: qs (tokens, blocks, 32), d (tokens, blocks).
    """
    n_tokens, n_blocks, _ = qs.shape
    together = 1 if n_tokens == 1 else FOUR
    groups = qs.reshape(-1, together, n_blocks, BLOCK // 8, 8).transpose(0, 2, 3, 1, 4)
    values = np.ascontiguousarray(groups).view(np.uint8).reshape(-1, n_blocks, BLOCK * together)
    scales = np.ascontiguousarray(d.reshape(-1, together, n_blocks).transpose(0, 2, 1))
    return np.concatenate([scales.view(np.uint8), values], axis=2)


def product(name: str, weights: NDArray[np.uint8], tokens: NDArray[np.uint8], n: int, shape: tuple[int, int]) -> Any:
    """Tokens times the weights, shape (tokens, rows), with a guard beside and behind the output."""
    n_tokens, n_rows = shape
    out = np.full((n_tokens + 1, n_rows + ROWS), np.nan, np.float32)
    out_stride = out.shape[1]
    ggml_product(name)(n, out.ctypes.data, out_stride, weights.ctypes.data, tokens.ctypes.data, n_tokens, n_rows)
    assert np.isnan(out[:, n_rows:]).all()
    assert np.isnan(out[n_tokens:]).all()
    return out[:n_tokens, :n_rows].astype(np.float64)


def nmse(found: NDArray[np.float64], wanted: NDArray[np.float64]) -> float:
    """Squared error over the power of what was wanted."""
    return float(np.sum((found - wanted) ** 2) / np.sum(wanted**2))


def check(n: int, rows: int, seed: int, *, n_tokens: int = 1, extreme: tuple[int, int] | None = None) -> None:
    """Both kernels against float64, with random values, or one weight and one value of the tokens everywhere."""
    rng = np.random.default_rng(seed)
    n_blocks = n // BLOCK
    if extreme:
        q = np.full((rows, n_blocks, BLOCK), extreme[0], np.uint8)
        qs = np.full((n_tokens, n_blocks, BLOCK), extreme[1], np.int8)
    else:
        q = rng.integers(0, 16, (rows, n_blocks, BLOCK), np.uint8)
        qs = rng.integers(-127, 128, (n_tokens, n_blocks, BLOCK), np.int8)
        qs[:, -1, -1] |= 1
    d = rng.normal(size=(rows, n_blocks)).astype(np.float16)
    dy = rng.normal(size=(n_tokens, n_blocks)).astype(np.float16)
    d[-1, -1], dy[:, -1] = 1, 1  # of the values that are changed below: they must count
    wanted = (qs * dy[..., None].astype(np.float64)).reshape(n_tokens, n) @ (
        (q.astype(np.float64) - 8) * d[..., None].astype(np.float64)
    ).reshape(rows, n).T

    name = "ggml_gemv_q4_0_8x8_q8_0" if n_tokens == 1 else "ggml_gemm_q4_0_8x8_q8_0"
    weights, tokens, shape = repacked(q, d), tokens_together(qs, dy), (n_tokens, rows)
    ours = product(name, weights, tokens, n, shape)
    assert nmse(ours, wanted) < MAX_NMSE
    assert nmse(product(f"{name}_generic", weights, tokens, n, shape), wanted) < MAX_NMSE
    weights[rows // ROWS - 1, -1, -1] ^= 0x10  # one value of the last row
    changed = product(name, weights, tokens, n, shape)
    assert (changed[:, :-1] == ours[:, :-1]).all()
    assert (changed[:, -1] != ours[:, -1]).all()


N_TOKENS = st.one_of(st.just(1), st.integers(1, 6).map(lambda n: n * FOUR))


@settings(max_examples=80, deadline=None)
@given(
    n_blocks=st.integers(1, 200),
    groups=st.integers(1, 6),
    n_tokens=N_TOKENS,
    seed=st.integers(0, 2**32 - 1),
)
def test_product_of_any_shape(n_blocks: int, groups: int, n_tokens: int, seed: int) -> None:
    check(n_blocks * BLOCK, groups * ROWS, seed, n_tokens=n_tokens)


@pytest.mark.parametrize("q", [0, 15])
@pytest.mark.parametrize("qs", [-128, 127])
@pytest.mark.parametrize("n_tokens", [1, 12])
def test_the_largest_sums(q: int, qs: int, n_tokens: int) -> None:
    """-128 with a weight below 0 also tells these kernels from ggml's, which cannot change that value's sign."""
    check(2048, 16, 0, n_tokens=n_tokens, extreme=(q, qs))


@pytest.mark.parametrize(
    ("n", "n_tokens"),
    [(LONG, 1), (LONG + BLOCK, 1), (2 * LONG + 64, 1), (LONG_MANY, 8), (LONG_MANY + BLOCK, 8), (2 * LONG_MANY + 64, 4)],
)
def test_rows_longer_than_the_buffer(n: int, n_tokens: int) -> None:
    check(n, 16, 0, n_tokens=n_tokens)


@pytest.mark.parametrize("n_rows", [L2_BYTES // 144 // ROWS * ROWS - ROWS, L2_BYTES // 144 // ROWS * ROWS + ROWS, 4000])
def test_more_rows_than_stay_in_the_cache(n_rows: int) -> None:
    """Eight blocks of one row take the 144 bytes of one block of eight rows."""
    check(8 * BLOCK, n_rows, 0, n_tokens=12)


def test_rows_that_do_not_lie_eight_together_are_left_to_ggml() -> None:
    pointer, i32 = ctypes.c_void_p, ctypes.c_int
    gemv = native_function("melt_gemv_q4_0_8x8", ctypes.c_bool, i32, pointer, pointer, pointer, i32)
    assert not gemv(BLOCK, None, None, None, 4)
    sizes = (ctypes.c_size_t, pointer, pointer, i32, i32)
    gemm = native_function("melt_gemm_q4_0_8x8", ctypes.c_bool, i32, pointer, *sizes)
    assert not gemm(BLOCK, None, 4, None, None, 4, 4)
    assert not gemm(BLOCK, None, 8, None, None, 3, 8)
