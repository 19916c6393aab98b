"""Windows, perplexity and KL divergence on logits whose results are known exactly, and against the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import melt_edge
from melt_edge.errors import ConfigError
from melt_edge.quality import numeric
from melt_edge.quality.divergence import compare_rows, measure_divergence
from melt_edge.quality.numeric import exp_with_error, log_softmax, mean_and_error, row_blocks, wilson_interval
from melt_edge.quality.perplexity import measure_perplexity, surprise
from melt_edge.quality.windows import Windows, cut_windows
from parity.reference import random_tokens, reference_logits, reference_model
from tiny import CORPUS, tiny_config

N_VOCAB = 301


def uniform(inputs: Sequence[int]) -> np.ndarray:
    return np.full((len(inputs), N_VOCAB), 3.5, dtype=np.float32)


class LogitsOf:
    """Logits that depend on the token at hand alone, so that any window gives a token the same ones."""

    def __init__(self, seed: int, n_vocab: int = N_VOCAB) -> None:
        self.table = np.random.default_rng(seed).normal(0, 3, (n_vocab, n_vocab)).astype(np.float32)

    def __call__(self, inputs: Sequence[int]) -> np.ndarray:
        return self.table[list(inputs)]


# -- windows


def test_windows_are_those_of_llama_perplexity() -> None:
    """Side by side; of 8 tokens the logits after the 5th to the 7th score the 6th to the 8th."""
    tokens = list(range(100, 129))
    windows = cut_windows(tokens, 8)
    assert (windows.count, windows.n_scored, windows.total_scored) == (3, 3, 9)
    found = list(windows)
    assert [window.inputs for window in found] == [tokens[0:8], tokens[8:16], tokens[16:24]]
    assert [window.targets.tolist() for window in found] == [[105, 106, 107], [113, 114, 115], [121, 122, 123]]
    rows = np.arange(8, dtype=np.float32)[:, None]
    assert found[0].scored_rows(rows)[:, 0].tolist() == [4, 5, 6]


@given(n_tokens=st.integers(4, 200), n_ctx=st.integers(4, 40), stride=st.integers(1, 20), bos=st.none() | st.just(777))
def test_with_a_stride_every_token_is_scored_once_after_half_a_window(
    n_tokens: int, n_ctx: int, stride: int, bos: int | None
) -> None:
    if stride > n_ctx // 2 or n_tokens < n_ctx:
        with pytest.raises(ConfigError):
            cut_windows(range(n_tokens), n_ctx, stride=stride)
        return
    windows = cut_windows(range(n_tokens), n_ctx, stride=stride, bos=bos)
    scored = [int(token) for window in windows for token in window.targets]
    assert scored == list(range(n_ctx - stride, n_ctx - stride + len(scored)))
    assert n_tokens - stride < scored[-1] + 1 <= n_tokens
    for window in windows:
        assert window.inputs[-1] == window.targets[-1]
        assert len(window.inputs) == n_ctx
        assert len(window.inputs) - len(window.targets) >= n_ctx // 2
        assert (window.inputs[0] == 777) == (bos is not None)


@pytest.mark.parametrize(
    ("n_tokens", "n_ctx", "stride", "said"),
    [
        (7, 8, None, "has 7 tokens, expected at least one window of 8"),
        (0, 8, None, "has 0 tokens"),
        (100, 3, None, "expected at least 4"),
        (100, 8, 5, "expected 1 to 4"),
        (100, 8, 0, "expected 1 to 4"),
    ],
)
def test_windows_that_cannot_be(n_tokens: int, n_ctx: int, stride: int | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        cut_windows(range(n_tokens), n_ctx, stride=stride, source="story.txt")


# -- perplexity


def test_uniform_logits_have_the_vocabulary_as_perplexity() -> None:
    windows = cut_windows(random_tokens(100, N_VOCAB), 16)
    found = measure_perplexity(uniform, windows, token_bytes=lambda token: 2)
    assert found.value == pytest.approx(N_VOCAB, rel=1e-12)
    assert found.error == pytest.approx(0, abs=1e-9)
    assert found.bits_per_byte == pytest.approx(math.log2(N_VOCAB) / 2, rel=1e-12)
    assert found.n_scored == 6 * 7


def test_perplexity_and_its_error_have_their_closed_form() -> None:
    """Half of the tokens at probability 1/2, half at 1/8: mean 2 ln 2, deviation ln 2, perplexity 4."""
    logits = np.log(np.array([[4.0, 2.0, 1.0, 1.0]])).repeat(8, axis=0).astype(np.float32)
    targets = np.array([0, 2] * 4)
    nats = surprise(logits, targets)
    assert nats == pytest.approx([math.log(2), math.log(8)] * 4, rel=1e-6)
    value, error = exp_with_error(*mean_and_error(nats))
    assert value == pytest.approx(4, rel=1e-6)
    assert error == pytest.approx(4 * math.log(2) / math.sqrt(7), rel=1e-6)  # ddof 1: / sqrt(n - 1)


def test_overlapping_windows_agree_where_context_does_not_matter() -> None:
    tokens = random_tokens(120, N_VOCAB)
    logits = LogitsOf(1)
    windows = cut_windows(tokens, 16, stride=4)
    found = measure_perplexity(logits, windows, token_bytes=lambda token: 1)
    expected = np.exp(surprise(logits(tokens)[11:119], np.array(tokens[12:120])).mean())
    assert found.value == pytest.approx(float(expected), rel=1e-12)


def test_progress_tells_the_value_so_far() -> None:
    told: list[tuple[int, float]] = []
    windows = cut_windows(random_tokens(64, N_VOCAB), 16)
    found = measure_perplexity(
        LogitsOf(2), windows, token_bytes=lambda token: 1, progress=lambda done, value: told.append((done, value))
    )
    assert [done for done, _ in told] == [1, 2, 3, 4]
    assert told[-1][1] == pytest.approx(found.value, rel=1e-12)


def test_extreme_logits_are_no_overflow() -> None:
    logits = np.array([[0, 3e38, -3e38, 1]] * 2, dtype=np.float32)
    nats = surprise(logits, np.array([1, 2]))
    assert nats[0] == 0
    assert nats[1] == pytest.approx(6e38, rel=1e-6)
    assert exp_with_error(*mean_and_error(nats))[0] == math.inf
    assert exp_with_error(1000.0, 0.0) == (math.inf, 0.0)
    assert math.isnan(mean_and_error(nats[:1])[1])


@pytest.mark.parametrize("model_type", ["ouro", "melt"])
def test_perplexity_of_a_file_is_the_references(model_type: str, request: pytest.FixtureRequest) -> None:
    """The same windows through the float64 reference and torch's own cross entropy."""
    path: Path = request.getfixturevalue(f"{model_type}_gguf")
    reference = reference_model(request.getfixturevalue(f"{model_type}_checkpoint"))
    chunk = tiny_config(model_type).chunk_size
    with melt_edge.load(path, n_ctx=32, kv_type="f32", n_threads=1, n_gpu_layers=0) as model:
        tokens = model.tokenize(CORPUS, add_special=False)
        found = measure_perplexity(
            model.logits, cut_windows(tokens, 32), token_bytes=lambda token: len(model.token_bytes(token))
        )
    losses = []
    for start in range(0, len(tokens) - 31, 32):
        window = tokens[start : start + 32]
        logits = torch.from_numpy(reference_logits(reference, window, chunk))
        losses.append(torch.nn.functional.cross_entropy(logits[16:31], torch.tensor(window[17:]), reduction="none"))
    nats = torch.cat(losses)
    assert nats.dtype == torch.float64
    assert found.n_scored == len(nats)
    assert found.value == pytest.approx(float(nats.mean().exp()), rel=1e-4)
    assert found.error == pytest.approx(float(nats.mean().exp() * nats.std() / math.sqrt(len(nats))), rel=1e-4)


# -- divergence


def test_kl_of_known_distributions() -> None:
    """p = (1/2, 1/4, 1/4) against q = (1/4, 1/4, 1/2): KL = ln 2 / 4; and against itself 0."""
    p, q = (np.log([values]) for values in ([0.5, 0.25, 0.25], [0.25, 0.25, 0.5]))
    base = np.concatenate([p, p, p + 7]).astype(np.float32)
    model = np.concatenate([q, p + 2, q - 9]).astype(np.float32)
    found = compare_rows(base, model, np.array([0, 1, 2]))
    assert found.kl == pytest.approx([math.log(2) / 4, 0, math.log(2) / 4], abs=1e-6)
    assert found.same_top.tolist() == [False, True, False]
    assert np.exp(-found.base_nats) == pytest.approx([0.5, 0.25, 0.25], rel=1e-6)
    assert np.exp(-found.model_nats) == pytest.approx([0.25, 0.25, 0.5], rel=1e-6)


def two_tables() -> tuple[LogitsOf, LogitsOf]:
    """Base and model over two tokens: after token 0 both are (1/2, 1/2), after token 1 (1/2, 1/2) and (1/5, 4/5)."""
    base, model = LogitsOf(0, 2), LogitsOf(0, 2)
    base.table[:] = 0
    model.table[:] = 0
    model.table[1, 1] = math.log(4)
    return base, model


def test_statistics_of_a_known_text() -> None:
    """Tokens 0 1 0 1 ...: half of the scored tokens have KL = ln(5/4), the other half 0."""
    base, model = two_tables()
    windows = cut_windows([0, 1] * 45, 10, stride=4)
    found = measure_divergence(model, base, windows)
    n = windows.total_scored
    step = math.log(1.25)
    assert n == 84
    assert found.n_scored == n
    assert found.mean == pytest.approx(step / 2, rel=1e-6)
    assert found.mean_error == pytest.approx(step / 2 / math.sqrt(n - 1), rel=1e-6)
    assert found.median == pytest.approx(step / 2, rel=1e-6)  # half-way between 0 and the step
    assert (found.p90, found.p99, found.p99_9, found.maximum) == pytest.approx((step,) * 4, rel=1e-6)
    assert found.same_top == 0.5  # of equal logits the first token is the top one
    assert found.same_top_interval == pytest.approx((0.39544, 0.60456), abs=1e-5)
    assert found.rms_delta_p == pytest.approx(0.3 / math.sqrt(2), rel=1e-6)  # 0 follows 1: 1/2 becomes 1/5
    assert found.base_ppl == pytest.approx(2, rel=1e-6)
    assert found.ppl == pytest.approx(math.sqrt(10), rel=1e-6)
    assert found.ppl_ratio == pytest.approx(math.sqrt(2.5), rel=1e-6)


def test_a_model_against_itself_is_exactly_0() -> None:
    found = measure_divergence(LogitsOf(3), LogitsOf(3), cut_windows(random_tokens(90, N_VOCAB), 16))
    assert (found.mean, found.maximum, found.rms_delta_p) == (0, 0, 0)
    assert (found.same_top, found.ppl_ratio) == (1, 1)


FINITE = st.floats(-(2.0**127), 2.0**127, width=32)
PAIRS = hnp.array_shapes(min_dims=2, max_dims=2, max_side=12).flatmap(
    lambda shape: st.tuples(*[hnp.arrays(np.float32, shape, elements=FINITE | st.floats(-20, 20, width=32))] * 2)
)


@given(PAIRS)
def test_kl_is_never_negative(pair: tuple[np.ndarray, np.ndarray]) -> None:
    base, model = pair
    targets = np.zeros(len(base), dtype=np.int64)
    kl = compare_rows(base, model, targets).kl
    assert np.isfinite(kl).all()
    assert (kl >= -1e-9).all()
    assert (np.abs(compare_rows(base, base, targets).kl) <= 1e-9).all()


@given(hnp.arrays(np.float32, (3, 7), elements=st.floats(-30, 30, width=32)), st.floats(-3, 3, width=32))
def test_a_shift_of_all_logits_changes_nothing(logits: np.ndarray, shift: float) -> None:
    moved = logits.astype(np.float64) + shift
    assert np.abs(log_softmax(moved) - log_softmax(logits)).max() <= 1e-12


@pytest.mark.parametrize("block", [1, 700, 10**6])
def test_blocks_of_rows_give_what_all_rows_at_once_give(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    base, model = rng.normal(0, 2, (2, 20, N_VOCAB)).astype(np.float32)
    targets = rng.integers(0, N_VOCAB, 20)
    whole = compare_rows(base, model, targets)
    monkeypatch.setattr(numeric, "BLOCK_VALUES", block)
    assert max(part.stop - part.start for part in row_blocks(20, N_VOCAB)) == min(20, max(1, block // N_VOCAB))
    for got, expected in zip(compare_rows(base, model, targets), whole, strict=True):
        assert np.array_equal(got, expected)
    assert np.array_equal(surprise(base, targets), whole.base_nats)


def test_one_windows_logits_are_held_at_a_time() -> None:
    """The memory of a long text is that of its tokens, not of its logits: 160 windows of 1 MB each here."""
    import tracemalloc

    windows: Windows = cut_windows(random_tokens(160 * 32, 8192), 32)
    table = np.random.default_rng(0).normal(size=(32, 8192)).astype(np.float32)
    tracemalloc.start()
    measure_divergence(lambda inputs: table.copy(), lambda inputs: table.copy(), windows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"), [(0, 10, 0, 0.27754), (10, 10, 0.72246, 1), (5, 10, 0.23658, 0.76342)]
)
def test_wilson_interval(hits: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(hits, n) == pytest.approx((low, high), abs=1e-4)
