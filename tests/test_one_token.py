"""One token's graph on the CPU with fewer waits (cpp/src/one-token.cpp), and what all threads wait for in it.

What is computed is the same with and without the waits and by whichever thread, so logits are compared bit by bit.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ggml_nodes import computed, computed_all, ggml, ggml_context, tensor
from melt_edge.compare.random_model import random_model
from melt_edge.compare.shapes import shape_config

# Prints a digest of the logits of tokens that are computed one by one, for each number of threads.
CHILD = """
import hashlib, sys
from pathlib import Path
from melt_edge.runtime.loading import BACKENDS
from melt_edge.runtime.options import LoadOptions
for n_threads in (1, 2, 3):
    model = BACKENDS["llama"](Path(sys.argv[1]), LoadOptions(n_ctx=64, n_threads=n_threads))
    digest = hashlib.sha256()
    for token in range(4, 24):
        model.eval([token])
        digest.update(model.last_logits().tobytes())
    print(n_threads, digest.hexdigest())
    model.close()
"""


def node(name: str, rows: NDArray[np.float32], *arguments: float) -> NDArray[np.float32]:
    """The ggml node of that name over float32 rows, by two threads."""
    with ggml_context(2 * rows.nbytes + (1 << 20)) as context:
        return computed(context, ggml()[name](context, tensor(context, rows), *arguments), rows.shape, n_threads=2)


def logits(path: Path, *, one_token: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, path],
        env={**os.environ, "MELT_ONE_TOKEN": one_token},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("type", ["q4_0", "q8_0"])
@pytest.mark.parametrize("arch", ["ouro", "melt"])
def test_same_logits_as_with_every_wait(arch: str, type: str, tmp_path: Path) -> None:
    path = random_model("tiny", shape_config("tiny", arch), tmp_path, type=type)
    found = logits(path, one_token="1")
    assert len(found.splitlines()) == 3
    assert found == logits(path, one_token="0")


@given(st.integers(1, 70), st.integers(1, 5), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_sigmoid_of_any_shape(n: int, n_rows: int, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((n_rows, n), np.float32) * 8
    np.testing.assert_allclose(node("ggml_sigmoid", x), np.exp(-np.logaddexp(0, -x.astype(np.float64))), rtol=1e-6)


def test_sigmoid_of_extreme_values() -> None:
    x = np.array([[-np.inf, -1e30, -200, -104, -88, 88, 200, np.inf] * 3], np.float32)
    found = node("ggml_sigmoid", x)
    np.testing.assert_allclose(found, np.exp(-np.logaddexp(0, -x.astype(np.float64))), rtol=1e-6, atol=1e-37)
    assert np.isnan(node("ggml_sigmoid", np.full((1, 17), np.nan, np.float32))).all()


@given(st.integers(1, 70), st.integers(1, 5), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_norm_of_any_shape(n: int, n_rows: int, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((n_rows, n), np.float32) * 30
    scale = 1 / np.sqrt((x.astype(np.float64) ** 2).mean(axis=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(node("ggml_rms_norm", x, 1e-6), x * scale, rtol=1e-6)


NEOX = 2  # ggml's RoPE of a value with the one half a head further on, as in modeling.py
# Where the first token is, values of a head that rotate, and what is said to ggml after them: length of the training,
# base, scale of positions, YaRN's factor, the values' factor, YaRN's two betas.
ROPE = {
    "first": 3,
    "n": 64,
    "n_ctx": 512,
    "base": 1e4,
    "scale": 0.5,
    "ext": 0.7,
    "attn": 0.9,
    "fast": 32.0,
    "slow": 1.0,
}
# One of them changed, or the derivative.
CHANGES = ({"first": 4}, {"n": 32}, {"n_ctx": 64}, {"base": 1e6}, {"scale": 1.0}, {"ext": 0.0}, {"attn": 1.0})
CHANGES += ({"fast": 8.0}, {"slow": 4.0}, {"back": True})


@pytest.mark.parametrize("head_dim", [64, 516])
@pytest.mark.parametrize("n_tokens", [1, 3])
def test_rope_whose_table_is_kept(n_tokens: int, head_dim: int) -> None:
    """Nodes that differ in one thing from their neighbours, bit by bit as the same with a factor of one for each
    frequency, for which no table is kept.
    """
    plain = {**ROPE, "n_ctx": 0, "ext": 0.0}  # where YaRN's range of frequencies does not depend on the base
    changes = [(ROPE, change) for change in CHANGES] + [(plain, {"base": 1e6})]
    ropes = [rope for before, change in changes for rope in (before, {**before, **change}, before)]
    x = np.random.default_rng(0).standard_normal((n_tokens, 5, head_dim), np.float32)
    with ggml_context(1 << 23) as context:
        ones = tensor(context, np.ones(head_dim // 2, np.float32))
        nodes = [rope_node(context, x, factors, **rope) for factors in (None, ones) for rope in ropes]
        found = computed_all(context, nodes, [x.shape] * len(nodes), n_threads=2)
    for rope, kept, made in zip(ropes, found[: len(ropes)], found[len(ropes) :], strict=True):
        assert (kept == made).all(), rope


@pytest.mark.parametrize("first", [0, 7])
def test_rope_is_that_of_the_reference(first: int) -> None:
    x = np.random.default_rng(0).standard_normal((3, 5, 64), np.float32)
    with ggml_context(1 << 20) as context:
        node = rope_node(context, x, None, **{**ROPE, "first": first, "scale": 1.0, "ext": 0.0, "attn": 1.0})
        found = computed(context, node, x.shape, n_threads=2)
    angles = np.outer(np.arange(first, first + 3), 1e4 ** (-np.arange(0, 64, 2) / 64))
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    a, b = np.split(x, 2, axis=-1)
    exact = np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-4)


def rope_node(
    context: Any, x: NDArray[np.float32], factors: Any, *, first: int, n: int, back: bool = False, **arguments: float
) -> Any:
    """RoPE of x (tokens, heads, head_dim), or its derivative. factors: a tensor of one for each frequency, or None."""
    positions = tensor(context, np.arange(first, first + len(x), dtype=np.int32))
    rope = ggml()["ggml_rope_ext_back" if back else "ggml_rope_ext"]
    return rope(context, tensor(context, x), positions, factors, n, NEOX, *arguments.values())
