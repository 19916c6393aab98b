"""The CPU's attention (cpp/src/attn-decode.cpp, attn-prefill.cpp) against float64 and against ggml's own kernels.

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
# a prompt's attention is float32 whatever the types are, where ggml rounds its queries to 8 bits
LIMIT_PROMPT = 1e-11
LIMITS_PROMPT_GGML = LIMITS_GGML | {Q8_0: 1e-3, Q4_0: 1e-3, Q5_1: 1e-3}
MIN_PROMPT = 6  # tokens of a stream that are taken together
MAX_ROWS = 32  # query rows that are taken one by one; more go to ggml


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
        ggml()["melt_edge_attn_enable"](ours)
        try:
            return computed(context, out, node.q.shape[:3] + node.v.shape[3:], n_threads)
        finally:
            ggml()["melt_edge_attn_enable"](True)


def stored(values: NDArray[np.float32], kind: GGMLQuantizationType) -> NDArray[np.float64]:
    """The values that a type keeps."""
    return quants.dequantize(quants.quantize(values, kind), kind).reshape(values.shape).astype(np.float64)


def expected(node: Attention) -> NDArray[np.float64]:
    """softmax(q k^T * scale + mask) v in float64; queries are rounded to 8 bits where products do so."""
    rounded = node.k_type in (Q8_0, Q4_0, Q5_1) and not is_prompt(node)
    q = stored(node.q, Q8_0 if rounded else F32)
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


def is_prompt(node: Attention) -> bool:
    """Taken by attn-prefill.cpp."""
    return node.q.shape[1] >= MIN_PROMPT


def limit(node: Attention) -> float:
    """Of the error against float64."""
    return LIMIT_PROMPT if is_prompt(node) else max(LIMITS[node.k_type], LIMITS[node.v_type])


def limit_ggml(node: Attention) -> float:
    """Of the difference from ggml's kernel."""
    limits = LIMITS_PROMPT_GGML if is_prompt(node) else LIMITS_GGML
    return max(limits[node.k_type], limits[node.v_type])


def check(node: Attention, n_threads: int = 2) -> None:
    """Our kernel gives float64's result, and ggml's one is near it."""
    ours, theirs = compute(node, ours=True, n_threads=n_threads), compute(node, ours=False, n_threads=n_threads)
    assert nmse(ours, expected(node)) < limit(node)
    assert nmse(ours, theirs) < limit_ggml(node)


@pytest.mark.parametrize("n_kv", [1, 2, 7, 31, 33, 64, 65, 257, 512, 515, 1000, 2500])
@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_any_length(kind: GGMLQuantizationType, n_kv: int) -> None:
    for n_tokens in (1, 19):
        check(attention(n_kv, n_tokens=n_tokens, k_type=kind, v_type=kind, seed=n_kv))


@pytest.mark.parametrize("n_tokens", [1, 2, 5, 6, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 257, 600])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
def test_any_number_of_tokens(n_tokens: int, heads: tuple[int, int]) -> None:
    check(attention(200, n_tokens=n_tokens, heads=heads))


@pytest.mark.parametrize("v_type", TYPES, ids=lambda kind: f"v_{kind.name}")
@pytest.mark.parametrize("k_type", TYPES, ids=lambda kind: f"k_{kind.name}")
def test_k_and_v_of_different_types(k_type: GGMLQuantizationType, v_type: GGMLQuantizationType) -> None:
    for n_tokens in (1, 7):
        check(attention(100, n_tokens=n_tokens, heads=(6, 2), k_type=k_type, v_type=v_type))


@pytest.mark.parametrize("heads", [(1, 1), (8, 8), (4, 2), (8, 2), (8, 1), (7, 1), (14, 2)])
@pytest.mark.parametrize("kind", [F16, Q8_0, Q4_0], ids=lambda kind: kind.name)
def test_grouped_heads(kind: GGMLQuantizationType, heads: tuple[int, int]) -> None:
    for n_tokens in (1, 37):
        check(attention(n_tokens=n_tokens, heads=heads, k_type=kind, v_type=kind))


@pytest.mark.parametrize(
    ("head_size", "kind"), [(20, F16), (32, Q4_0), (80, F16), (96, Q8_0), (128, Q4_0), (256, Q8_0)]
)
def test_head_sizes(head_size: int, kind: GGMLQuantizationType) -> None:
    for n_tokens in (1, 37):
        check(attention(n_tokens=n_tokens, head_size=head_size, heads=(4, 2), k_type=kind, v_type=kind))


@pytest.mark.parametrize("n_threads", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", [F32, F16, Q8_0, Q4_0], ids=lambda kind: kind.name)
def test_any_number_of_threads(kind: GGMLQuantizationType, n_threads: int) -> None:
    for n_kv in (3, 500):  # fewer cells than threads, too
        for n_tokens in (1, 37):
            check(attention(n_kv, n_tokens=n_tokens, k_type=kind, v_type=kind), n_threads)


@pytest.mark.parametrize("n_tokens", [1, 37])
def test_without_a_mask(n_tokens: int) -> None:
    check(replace(attention(300, n_tokens=n_tokens), mask=None))


@pytest.mark.parametrize("n_past", [0, 100, 400])
def test_a_prompt_sees_what_came_before(n_past: int) -> None:
    """Each token sees the cells up to its own: tiles that all see, tiles that some see, tiles that none sees."""
    node = attention(512, n_tokens=80, heads=(4, 2))
    cells, tokens = np.arange(512), np.arange(80)[:, None]
    node.mask = np.where(cells <= n_past + tokens, 0.0, -np.inf).astype(np.float32)[None]
    check(node)


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
    for n_tokens in (2, 37):
        check(attention(200, streams=3, n_tokens=n_tokens, heads=(4, 2), k_type=kind, v_type=kind))


@pytest.mark.parametrize("n_tokens", [2, 37])
def test_a_row_that_sees_nothing_is_zero(n_tokens: int) -> None:
    node = attention(50, n_tokens=n_tokens)
    assert node.mask is not None
    node.mask[0, 1] = -np.inf
    result = compute(node, ours=True)
    assert not result[0, 1].any()
    assert result[0, 0].any()


@pytest.mark.parametrize("n_tokens", [1, 37])
def test_finite_mask_values_are_added(n_tokens: int) -> None:
    node = attention(100, n_tokens=n_tokens)
    assert node.mask is not None
    node.mask += np.linspace(-3, 3, 100).astype(np.float16)
    check(node)


@pytest.mark.parametrize("n_tokens", [1, 37])
def test_large_scores_do_not_overflow(n_tokens: int) -> None:
    node = attention(100, n_tokens=n_tokens)
    node.q *= 1000
    assert np.isfinite(compute(node, ours=True)).all()
    assert nmse(compute(node, ours=True), expected(node)) < 1e-6


@settings(max_examples=100)
@given(
    n_kv=st.integers(1, 400),
    group=st.integers(1, 8),
    n_head_kv=st.integers(1, 4),
    head_blocks=st.integers(1, 8),
    n_tokens=st.one_of(st.integers(1, 5), st.integers(MIN_PROMPT, 70)),
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
@pytest.mark.parametrize("n_tokens", [1, 37])
def test_the_comparison_notices_one_changed_value(name: str, kind: GGMLQuantizationType, n_tokens: int) -> None:
    node = attention(257, n_tokens=n_tokens, k_type=kind, v_type=kind)
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
    "many rows of few tokens": {"n_tokens": MIN_PROMPT - 1, "streams": MAX_ROWS // (MIN_PROMPT - 1) + 1},
}


@pytest.mark.parametrize("options", LEFT_TO_GGML.values(), ids=LEFT_TO_GGML.keys())
@pytest.mark.parametrize("n_tokens", [1, 37])
def test_left_to_ggml(options: dict[str, Any], n_tokens: int) -> None:
    """The same bits with our kernels on and off; and other ones for the node that they do take."""
    node = attention(600, **{"n_tokens": n_tokens} | options)
    assert np.array_equal(compute(node, ours=True), compute(node, ours=False))
    taken = attention(600, n_tokens=n_tokens)
    assert not np.array_equal(compute(taken, ours=True), compute(taken, ours=False))
