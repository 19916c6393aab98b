"""The ONNX graphs in float32, run by onnxruntime, compute what the reference computes in float64."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from hypothesis import HealthCheck, assume, given, settings

import melt_edge
from melt_edge.checkpoint import save_checkpoint
from melt_edge.export.from_gguf import checkpoint_from_gguf
from melt_edge.export.onnx import export_onnx
from melt_edge.export.onnx_quantize import BlockFormat, dequantize_rows, quantize_rows
from melt_edge.export.onnx_verify import LoopSteps, folder_logits
from melt_edge.models import SHIPPED_TEACHER, shipped_model_path
from melt_edge.models.demo_questions import DEMO_QUESTIONS
from parity.reference import distance, kl_divergence, random_tokens, reference_logits, reference_model
from parity.test_logits import LIMIT, MODELS, N_DECODE, N_TOKENS, WHOLE, cases
from tiny import tiny_checkpoint, tiny_config, tiny_tensors

# onnxruntime 1.23, the last for Python 3.10, ends at opset 23.
OPSET_24 = tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 24)
needs_opset_24 = pytest.mark.skipif(not OPSET_24, reason=f"onnxruntime {onnxruntime.__version__} has no opset 24")


@pytest.mark.parametrize("chunk_size", [1, 3, 8, WHOLE])
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_reference(make_checkpoint, make_onnx, name: str, chunk_size: int) -> None:
    """A prompt in chunks, then one token at a time."""
    config = MODELS[name]
    tokens = random_tokens(N_TOKENS, config.vocab_size)
    expected = reference_logits(reference_model(make_checkpoint(config)), tokens, chunk_size, N_DECODE)
    n_prompt = N_TOKENS - N_DECODE
    got = folder_logits(make_onnx(config), tokens[:n_prompt], tokens[n_prompt:], chunk_size)
    assert distance(got, expected) < LIMIT


@needs_opset_24
@pytest.mark.parametrize("name", list(MODELS)[1::2])
def test_the_standards_operators_compute_the_same(make_checkpoint, make_onnx, name: str) -> None:
    config = MODELS[name]
    tokens = random_tokens(N_TOKENS, config.vocab_size)
    expected = reference_logits(reference_model(make_checkpoint(config)), tokens, 8, N_DECODE)
    n_prompt = N_TOKENS - N_DECODE
    got = folder_logits(make_onnx(config, portable=True), tokens[:n_prompt], tokens[n_prompt:], 8)
    assert distance(got, expected) < LIMIT


def test_a_wrong_tensor_is_seen(make_onnx, tmp_path) -> None:
    """The twin of the parity tests: each tensor, changed a little, must fail them."""
    config = tiny_config("melt", layers=1, early_exit_threshold=0.6)
    tokens = random_tokens(N_TOKENS, config.vocab_size)
    got = folder_logits(make_onnx(config), tokens, [], 8)
    missed = []
    for name, tensor in tiny_tensors(config).items():
        noise = 0.05 * np.random.default_rng(1).standard_normal(tensor.shape) + (2.0 if "early_exit" in name else 0.0)
        folder = save_checkpoint(
            tmp_path / name, config, {**tiny_tensors(config), name: (tensor + noise).astype(np.float32)}
        )
        if distance(got, reference_logits(reference_model(folder), tokens, 8)) < LIMIT:
            missed.append(name)
    assert missed == []


def batch_logits(folder, rows: list[list[int]], cuts: list[int]) -> np.ndarray:
    runner = LoopSteps(folder, batch=len(rows))
    tokens = np.array(rows, np.int64)
    return np.concatenate([runner.chunk(tokens[:, a:b]) for a, b in itertools.pairwise(cuts)], axis=1)


@pytest.mark.parametrize(("portable", "n_chunked"), [(False, 8), pytest.param(True, 24, marks=needs_opset_24)])
def test_sequences_of_a_batch_do_not_disturb_each_other(make_checkpoint, make_onnx, portable, n_chunked) -> None:
    """Two sequences of one length: chunk after chunk, then token by token."""
    config = tiny_config("melt")
    rows = [random_tokens(N_TOKENS, config.vocab_size, seed) for seed in (0, 1)]
    cuts = [*range(0, n_chunked, 8), *range(n_chunked, N_TOKENS + 1)]
    got = batch_logits(make_onnx(config, portable=portable), rows, cuts)
    model = reference_model(make_checkpoint(config))
    for row, found in zip(rows, got, strict=True):
        assert distance(found, reference_logits(model, row, 8, N_TOKENS - n_chunked)) < LIMIT


def test_the_fused_attention_refuses_a_later_chunk_of_a_batch(make_onnx) -> None:
    """The documented limit of a batch: one first chunk, then one token at a time."""
    config = tiny_config("melt")
    rows = [random_tokens(16, config.vocab_size, seed) for seed in (0, 1)]
    with pytest.raises(RuntimeError, match="batch_size must be 1"):
        batch_logits(make_onnx(config), rows, [0, 8, 16])


@pytest.mark.parametrize("portable", [False, pytest.param(True, marks=needs_opset_24)])
@pytest.mark.parametrize("name", list(MODELS)[2::4])
def test_graphs_of_fixed_shapes_compute_the_same(make_checkpoint, make_onnx, name: str, portable: bool) -> None:
    """Chunks of 8, the last one padded, then one token at a time on the same state."""
    config = MODELS[name]
    tokens = random_tokens(N_TOKENS, config.vocab_size)
    n_prompt = N_TOKENS - N_DECODE - 3  # 21: the last chunk has 5 tokens
    folder = make_onnx(config, portable=portable, static=True, n_ctx=64)
    size = 8 if config.shares_kv else 64  # Ouro has no chunks: as many as the state has room for
    chunks, steps = LoopSteps(folder, fixed=size), LoopSteps(folder, fixed=1)
    got = [chunks.chunk(np.array([tokens[a : min(a + size, n_prompt)]])) for a in range(0, n_prompt, size)]
    steps.slots, steps.n_past = chunks.slots, chunks.n_past
    got += [steps.chunk(np.array([[token]])) for token in tokens[n_prompt:]]
    expected = reference_logits(reference_model(make_checkpoint(config)), tokens, 8, N_TOKENS - n_prompt)
    assert distance(np.concatenate(got, axis=1)[0], expected) < LIMIT


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_logits_equal_the_reference_for_any_shape(tmp_path_factory, case) -> None:
    """The same, over the space of shapes: heads that the fused operator does not take, too."""
    config, n_prompt, n_decode, seed, portable = case
    assume(OPSET_24 or (not portable and config.head_dim % 16 == 0))
    folder = tmp_path_factory.mktemp("case")
    checkpoint = tiny_checkpoint(folder / "checkpoint", config, seed)
    export_onnx(checkpoint, folder / "onnx", n_ctx=64, portable=bool(portable), verify=False)
    tokens = random_tokens(n_prompt + n_decode, config.vocab_size, seed)
    expected = reference_logits(reference_model(checkpoint), tokens, config.chunk_size, n_decode)
    got = folder_logits(folder / "onnx", tokens[:n_prompt], tokens[n_prompt:], config.chunk_size)
    if config.early_exit_threshold == 1.0:
        assert distance(got, expected) < LIMIT
    else:  # a token whose sum of exit probabilities lies on the threshold may leave one loop apart
        assert np.median(np.abs(got - expected).max(axis=1) / expected.std()) < LIMIT


# Mean KL divergence from float32 in nats, see the limits of test_logits.py.
KL_LIMITS = {"fp16": 1e-3, "int8": 0.1, "int4": 3.0}


@pytest.mark.parametrize("precision", KL_LIMITS)
@pytest.mark.parametrize("model_type", ["ouro", "melt"])
def test_smaller_precisions_stay_close(make_onnx, model_type: str, precision: str) -> None:
    """The stated bound on what a precision costs, and that it costs something."""
    config = tiny_config(model_type)
    tokens = random_tokens(48, config.vocab_size)
    expected, got = (folder_logits(make_onnx(config, precision=p), tokens, [], 8) for p in ("fp32", precision))
    assert 0 < kl_divergence(got, expected) < KL_LIMITS[precision]


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantised_graphs_compute_with_the_quantised_values(
    make_onnx, tmp_path, precision, symmetric, block_size
) -> None:
    """Against the reference with each matrix rounded as the file has it: exact but for float32."""
    config = tiny_config("melt", tied=True)
    fmt = BlockFormat(8 if precision == "int8" else 4, block_size, symmetric)
    rounded = {
        name: dequantize_rows(quantize_rows(tensor, fmt), fmt, tensor.shape[1])
        if tensor.ndim == 2 and "early_exit" not in name
        else tensor
        for name, tensor in tiny_tensors(config).items()
    }
    tokens = random_tokens(N_TOKENS, config.vocab_size)
    folder = make_onnx(config, precision=precision, block_size=block_size, symmetric=symmetric, accuracy_level=0)
    expected = reference_logits(reference_model(save_checkpoint(tmp_path / "rounded", config, rounded)), tokens, 8)
    assert distance(folder_logits(folder, tokens, [], 8), expected) < LIMIT


# Mean KL divergence of a shipped model from its float32 graphs in nats, token by token: two to four times the largest
# of both models and both layouts (fp16 1.5e-6, int8 2.6e-4, int4 5.8e-2).
SHIPPED_KL_LIMITS = {"fp16": 6e-6, "int8": 1e-3, "int4": 0.1}


@pytest.fixture(scope="module")
def shipped_checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shipped") / SHIPPED_TEACHER
    return checkpoint_from_gguf(shipped_model_path(SHIPPED_TEACHER), folder)


@pytest.mark.parametrize("share_kv", [False, True])
def test_a_trained_model_stays_closer(shipped_checkpoint, tmp_path, share_kv: bool) -> None:
    """On the demo's questions and answers, as tests/test_shipped_model.py has it for GGUF."""
    with melt_edge.load(shipped_model_path(SHIPPED_TEACHER), n_threads=1) as model:
        texts = [
            model.tokenize(model.render_chat([{"role": "user", "content": question}]) + answer + "<|im_end|>")
            for question, answer in DEMO_QUESTIONS.items()
        ]
    logits = {}
    for precision in ("fp32", *SHIPPED_KL_LIMITS):
        folder = tmp_path / precision
        export_onnx(shipped_checkpoint, folder, precision=precision, n_ctx=128, share_kv=share_kv, verify=False)
        logits[precision] = np.concatenate([folder_logits(folder, text, [], 1) for text in texts])
    for precision, limit in SHIPPED_KL_LIMITS.items():
        assert 0 < kl_divergence(logits[precision], logits["fp32"]) < limit
