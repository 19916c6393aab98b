"""The CPU's attention of few tokens (cpp/src/attn-decode.cpp) against float64 and against ggml's own kernel.

One GGML_OP_FLASH_ATTN_EXT node at a time through ggml's C API, with the cache laid out as llama.cpp lays it out.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ggml_nodes import computed, ggml, ggml_context, tensor

F32, F16, BF16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16
Q8_0, Q4_0, Q5_1 = GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q5_1
TYPES = [F32, F16, BF16, Q8_0, Q4_0, Q5_1]

# NMSE against float64 over the values as they are stored. Floats leave float32's rounding; a quantised V is weighted
# with 16 bits; the query for 5_1 is summed in float16 by ggml's product.
LIMITS = {F32: 1e-11, F16: 1e-11, BF16: 1e-11, Q8_0: 1e-8, Q4_0: 1e-8, Q5_1: 1e-5}
# and against ggml's kernel, which sums an f16 V in f16 and rounds the query to the type of K
LIMITS_GGML = {F32: 1e-8, F16: 1e-4, BF16: 1e-3, Q8_0: 1e-8, Q4_0: 1e-8, Q5_1: 1e-8}
MAX_ROWS = 32  # query rows that the kernel takes; more go to ggml


@dataclass
class Attention:
    """One node and its inputs.

    q (streams, n_tokens, n_head, head_size); k and v (streams, n_kv, n_head_kv, head_size);
    mask (streams, n_tokens, n_kv)
    """

    q: NDArray[np.float32]
    k: NDArray[np.float32]
    v: NDArray[np.float32]
    mask: NDArray[np.float32] | None
    k_type: GGMLQuantizationType = F16
    v_type: GGMLQuantizationType = F16
    max_bias: float = 0.0
    softcap: float = 0.0
    sinks: NDArray[np.float32] | None = None
    scale: float = field(init=False)

    def __post_init__(self) -> None:
        self.scale = 1.0 / float(np.sqrt(self.q.shape[-1]))


def attention(
    n_kv: int = 257,
    *,
    heads: tuple[int, int] = (4, 4),
    head_size: int = 64,
    n_tokens: int = 1,
    streams: int = 1,
    holes: float = 0.3,
    seed: int = 0,
    **options: Any,
) -> Attention:
    """Random inputs. heads: of queries, and of K and V. holes: the share of cells that a row does not see."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((streams, n_tokens, heads[0], head_size), np.float32) * 2
    k = rng.standard_normal((streams, n_kv, heads[1], head_size), np.float32)
    v = rng.standard_normal((streams, n_kv, heads[1], head_size), np.float32)
    mask = np.zeros((streams, n_tokens, n_kv), np.float32)
    mask[rng.random(mask.shape) < holes] = -np.inf
    mask[..., rng.integers(n_kv)] = 0.0
    return Attention(q, k, v, mask, **options)


def compute(node: Attention, *, ours: bool, n_threads: int = 2) -> NDArray[np.float32]:
    """The node's result (streams, n_tokens, n_head, head_size), by our kernel or by ggml's."""
    n_bytes = sum(x.nbytes for x in (node.q, node.k, node.v)) * 2 + (32 << 20)
    with ggml_context(n_bytes) as context:

        def swapped(values: NDArray[Any], kind: GGMLQuantizationType) -> Any:
            return ggml()["ggml_permute"](context, tensor(context, values, kind), 0, 2, 1, 3)

        out = ggml()["ggml_flash_attn_ext"](
            context,
            swapped(node.q, F32),
            swapped(node.k, node.k_type),
            swapped(node.v, node.v_type),
            None if node.mask is None else tensor(context, node.mask[:, None], F16),
            node.scale,
            node.max_bias,
            node.softcap,
        )
        if node.sinks is not None:
            ggml()["ggml_flash_attn_ext_add_sinks"](out, tensor(context, node.sinks))
        ggml()["melt_edge_attn_decode_enable"](ours)
        try:
            return computed(context, out, node.q.shape[:3] + node.v.shape[3:], n_threads)
        finally:
            ggml()["melt_edge_attn_decode_enable"](True)


def stored(values: NDArray[np.float32], kind: GGMLQuantizationType) -> NDArray[np.float64]:
    """The values that a type keeps."""
    return quants.dequantize(quants.quantize(values, kind), kind).reshape(values.shape).astype(np.float64)


def expected(node: Attention) -> NDArray[np.float64]:
    """softmax(q k^T * scale + mask) v in float64; queries are rounded to 8 bits where ggml's products do so."""
    q = stored(node.q, Q8_0 if node.k_type in (Q8_0, Q4_0, Q5_1) else F32)
    group = node.q.shape[2] // node.k.shape[2]
    k = np.repeat(stored(node.k, node.k_type), group, axis=2)
    v = np.repeat(stored(node.v, node.v_type), group, axis=2)
    scores = np.einsum("sthd,snhd->shtn", q, k) * node.scale
    if node.mask is not None:
        scores += node.mask[:, None]
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    result: NDArray[np.float64] = np.einsum("shtn,snhd->sthd", weights, v)
    return result


def nmse(a: NDArray[Any], b: NDArray[Any]) -> float:
    """sum((a - b)^2) / sum(b^2)."""
    return float(np.square(a.astype(np.float64) - b).sum() / np.square(b.astype(np.float64)).sum())


def limit(node: Attention, limits: dict[GGMLQuantizationType, float] = LIMITS) -> float:
    """The limit of the coarser of the two types."""
    return max(limits[node.k_type], limits[node.v_type])


def check(node: Attention, n_threads: int = 2) -> None:
    """Our kernel gives float64's result, and ggml's one is near it."""
    ours, theirs = compute(node, ours=True, n_threads=n_threads), compute(node, ours=False, n_threads=n_threads)
    assert nmse(ours, expected(node)) < limit(node)
    assert nmse(ours, theirs) < limit(node, LIMITS_GGML)


@pytest.mark.parametrize("n_kv", [1, 2, 7, 31, 33, 64, 65, 257, 512, 515, 1000, 2500])
@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_any_length(kind: GGMLQuantizationType, n_kv: int) -> None:
    check(attention(n_kv, k_type=kind, v_type=kind, seed=n_kv))


@pytest.mark.parametrize("v_type", TYPES, ids=lambda kind: f"v_{kind.name}")
@pytest.mark.parametrize("k_type", TYPES, ids=lambda kind: f"k_{kind.name}")
def test_k_and_v_of_different_types(k_type: GGMLQuantizationType, v_type: GGMLQuantizationType) -> None:
    check(attention(100, heads=(6, 2), k_type=k_type, v_type=v_type))


@pytest.mark.parametrize("heads", [(1, 1), (8, 8), (4, 2), (8, 2), (8, 1), (7, 1), (14, 2)])
@pytest.mark.parametrize("kind", [F16, Q8_0, Q4_0], ids=lambda kind: kind.name)
def test_grouped_heads(kind: GGMLQuantizationType, heads: tuple[int, int]) -> None:
    check(attention(heads=heads, k_type=kind, v_type=kind))


@pytest.mark.parametrize(
    ("head_size", "kind"), [(20, F16), (32, Q4_0), (80, F16), (96, Q8_0), (128, Q4_0), (256, Q8_0)]
)
def test_head_sizes(head_size: int, kind: GGMLQuantizationType) -> None:
    check(attention(head_size=head_size, heads=(4, 2), k_type=kind, v_type=kind))


@pytest.mark.parametrize("n_threads", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", [F32, F16, Q8_0, Q4_0], ids=lambda kind: kind.name)
def test_any_number_of_threads(kind: GGMLQuantizationType, n_threads: int) -> None:
    for n_kv in (3, 500):  # fewer cells than threads, too
        check(attention(n_kv, k_type=kind, v_type=kind), n_threads)


def test_without_a_mask() -> None:
    check(replace(attention(300), mask=None))


def test_several_sequences_in_one_cache() -> None:
    """Each row sees the cells of its own sequence: runs of cells, as llama.cpp fills a unified cache."""
    node = attention(600, n_tokens=3)
    node.mask = np.full_like(node.mask, -np.inf) if node.mask is not None else None
    assert node.mask is not None
    for row, cells in enumerate([slice(0, 200), slice(200, 201), slice(250, 600)]):
        node.mask[0, row, cells] = 0.0
    check(node)


@pytest.mark.parametrize("kind", [F16, Q8_0], ids=lambda kind: kind.name)
def test_several_streams(kind: GGMLQuantizationType) -> None:
    check(attention(200, streams=3, n_tokens=2, heads=(4, 2), k_type=kind, v_type=kind))


def test_a_row_that_sees_nothing_is_zero() -> None:
    node = attention(50, n_tokens=2)
    assert node.mask is not None
    node.mask[0, 1] = -np.inf
    result = compute(node, ours=True)
    assert not result[0, 1].any()
    assert result[0, 0].any()


def test_finite_mask_values_are_added() -> None:
    node = attention(100)
    assert node.mask is not None
    node.mask += np.linspace(-3, 3, 100).astype(np.float16)
    check(node)


def test_large_scores_do_not_overflow() -> None:
    node = attention(100)
    node.q *= 1000
    assert np.isfinite(compute(node, ours=True)).all()
    assert nmse(compute(node, ours=True), expected(node)) < 1e-6


@settings(max_examples=60)
@given(
    n_kv=st.integers(1, 400),
    group=st.integers(1, 8),
    n_head_kv=st.integers(1, 4),
    head_blocks=st.integers(1, 8),
    n_tokens=st.integers(1, 5),
    streams=st.integers(1, 3),
    holes=st.sampled_from([0.0, 0.5, 0.97]),
    k_type=st.sampled_from(TYPES),
    v_type=st.sampled_from(TYPES),
    n_threads=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape(n_kv: int, group: int, n_head_kv: int, head_blocks: int, n_threads: int, **options: Any) -> None:
    heads = (group * n_head_kv, n_head_kv)
    check(attention(n_kv, heads=heads, head_size=32 * head_blocks, **options), n_threads)


@pytest.mark.parametrize("kind", [F32, F16, Q8_0, Q4_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", ["q", "k", "v", "mask"])
def test_the_comparison_notices_one_changed_value(name: str, kind: GGMLQuantizationType) -> None:
    node = attention(257, k_type=kind, v_type=kind)
    result = compute(node, ours=True)
    assert nmse(result, expected(node)) < limit(node)
    values = getattr(node, name)
    if name == "mask":
        values[..., int(np.argmax(np.isfinite(values[0, 0])))] = -np.inf
    elif name == "q":
        values[0, 0, 0, 0] += 1.0
    else:
        values[0, ::2, 0, 0] += 1.0
    assert nmse(result, expected(node)) > 10 * limit(node)


LEFT_TO_GGML = {
    "soft-capping": {"softcap": 10.0},
    "ALiBi": {"max_bias": 8.0},
    "sinks": {"sinks": np.ones(4, np.float32)},
    "many rows": {"n_tokens": MAX_ROWS + 1},
}


@pytest.mark.parametrize("options", LEFT_TO_GGML.values(), ids=LEFT_TO_GGML.keys())
def test_left_to_ggml(options: dict[str, Any]) -> None:
    """The same bits with our kernel on and off; and other ones for the node that it does take."""
    node = attention(600, **options)
    assert np.array_equal(compute(node, ours=True), compute(node, ours=False))
    taken = attention(600)
    assert not np.array_equal(compute(taken, ours=True), compute(taken, ours=False))
