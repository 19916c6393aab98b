"""What a benchmark asks of the library: repeated rows, shortened caches, a token's parts, the memory's speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from melt_edge.bench.bandwidth import ReadBandwidth
from melt_edge.errors import BackendError
from melt_edge.runtime.base import EditsRows, TimesParts
from melt_edge.runtime.llama import LlamaBackend
from melt_edge.runtime.options import LoadOptions
from melt_edge.runtime.state import payload_bytes
from tiny import tiny_config

MakeGGUF = Callable[..., Path]
TOKENS = list(range(40, 52))
N_CTX = 256


def opened(path: Path, **options: object) -> LlamaBackend:
    return LlamaBackend(path, LoadOptions(**{"n_ctx": N_CTX, "n_threads": 1, **options}))  # type: ignore[arg-type]


@pytest.fixture(params=["melt", "ouro"])
def model(request: pytest.FixtureRequest, make_gguf: MakeGGUF) -> Iterator[LlamaBackend]:
    backend = opened(make_gguf(tiny_config(request.param)))
    yield backend
    backend.close()


def logits_after(model: LlamaBackend, token: int) -> np.ndarray:
    model.eval([token])
    return model.last_logits().copy()


def blocks(model: LlamaBackend) -> list[np.ndarray]:
    """The state's K and V blocks as bytes: a row per token, or a row per value where V is transposed."""
    payload, n, layout = model._sequence_bytes(), model.n_tokens, model._layout()
    at = 16 + 12 * n + 8
    found = []
    for number in range(2 * layout.n_slots):
        block = payload[at + 12 : at + 12 + n * layout.row_bytes]
        transposed = layout.v_transposed and number >= layout.n_slots
        found.append(block.reshape(-1, n, 2) if transposed else block.reshape(n, -1))
        at += 12 + n * layout.row_bytes
    assert at == payload_bytes(layout, n)
    return found


def test_the_llama_backend_can_be_measured_whole(model: LlamaBackend) -> None:
    assert isinstance(model, EditsRows)
    assert isinstance(model, TimesParts)


@pytest.mark.parametrize("architecture", ["melt", "ouro"])
@pytest.mark.parametrize(
    "options",
    [{}, {"kv_type": "q8_0"}, {"kv_type": "q4_0"}, {"flash_attn": False}],
    ids=["f16", "q8_0", "q4_0", "transposed"],
)
@pytest.mark.parametrize("n_tokens", [13, 36, 200])
def test_rows_are_repeated_whatever_their_type(
    make_gguf: MakeGGUF, architecture: str, options: dict[str, object], n_tokens: int
) -> None:
    model = opened(make_gguf(tiny_config(architecture)), **options)
    model.eval(TOKENS)
    before = blocks(model)
    model.repeat_rows(n_tokens)
    assert model.n_tokens == n_tokens
    assert model.tokens == [TOKENS[i % len(TOKENS)] for i in range(n_tokens)]
    for old, new in zip(before, blocks(model), strict=True):
        axis = 1 if old.ndim == 3 else 0
        assert np.array_equal(new, np.take(old, np.arange(n_tokens) % len(TOKENS), axis=axis))
    assert np.isfinite(logits_after(model, 60)).all()
    model.close()


def test_a_repeated_cache_goes_on_at_the_next_position(model: LlamaBackend) -> None:
    """A row at the wrong position would make no difference to the speed, but the next token would be refused."""
    model.eval(TOKENS)
    expected = logits_after(model, 60)
    model.truncate(len(TOKENS))
    model.repeat_rows(100)
    other = logits_after(model, 60)
    assert model.n_tokens == 101
    assert np.abs(other - expected).max() > 1e-3  # the longer cache is read
    model.truncate(len(TOKENS))
    np.testing.assert_allclose(logits_after(model, 60), expected, atol=1e-4)


def test_rows_cannot_be_repeated_from_nothing_or_past_the_context(model: LlamaBackend) -> None:
    with pytest.raises(BackendError, match="rows of 0 tokens"):
        model.repeat_rows(100)
    model.eval(TOKENS)
    with pytest.raises(BackendError, match="could not be repeated to 257"):
        model.repeat_rows(N_CTX + 1)
    assert model.n_tokens == 0
    model.eval(TOKENS)  # still usable


def test_a_shortened_cache_is_as_if_the_rest_had_never_been(model: LlamaBackend) -> None:
    model.eval(TOKENS)
    expected = logits_after(model, 60)
    model.reset()
    model.eval(TOKENS)
    model.eval([70])
    model.eval([71])
    model.truncate(len(TOKENS))
    assert model.tokens == TOKENS
    np.testing.assert_allclose(logits_after(model, 60), expected, atol=1e-4)


@pytest.mark.parametrize("flash_attn", [True, False])
@pytest.mark.parametrize("kv_gate_init", ["zeros", "input"])
def test_a_tokens_time_has_its_parts(make_gguf: MakeGGUF, kv_gate_init: str, flash_attn: bool) -> None:
    model = opened(make_gguf(tiny_config("melt", kv_gate_init=kv_gate_init)), flash_attn=flash_attn)
    model.eval(TOKENS)
    seconds = model.time_parts([60, 61, 62])
    attention, gates, other = seconds[:-1].T
    assert seconds.shape == (5, 3)
    assert (attention > 0).all()
    assert (other > 0).all()
    # the first loop of "input" has none: its latent is the input
    assert (gates > 0).tolist() == [kv_gate_init == "zeros", True, True, True]
    assert seconds[-1, :2].tolist() == [0.0, 0.0]
    assert seconds[-1, 2] > 0  # the head
    assert seconds.sum() < 60  # seconds, not nanoseconds
    model.close()


def test_an_ouro_has_no_gates_and_one_loop_is_one(make_gguf: MakeGGUF) -> None:
    model = opened(make_gguf(tiny_config("ouro")), loops=1)
    seconds = model.time_parts([60, 61])
    assert seconds.shape == (2, 3)
    assert seconds[:, 1].tolist() == [0.0, 0.0]
    assert seconds[0, 0] > 0
    model.close()


def test_timing_parts_changes_nothing_that_follows(model: LlamaBackend) -> None:
    model.eval(TOKENS)
    expected = logits_after(model, 60)
    model.truncate(len(TOKENS))
    model.time_parts([70, 71, 72, 73])
    assert model.tokens == TOKENS
    np.testing.assert_allclose(logits_after(model, 60), expected, atol=1e-4)


def test_timing_parts_without_room_is_an_error(model: LlamaBackend) -> None:
    model.eval([40] * N_CTX)
    with pytest.raises(BackendError, match="could not time 3 tokens"):
        model.time_parts([60, 61, 62])


def test_the_memory_is_read_at_some_speed() -> None:
    with ReadBandwidth(2, n_bytes=2**22) as memory:
        assert memory.read() > 1e6
        assert memory.read() > 1e6


def test_memory_that_cannot_be_had_is_an_error() -> None:
    with pytest.raises(BackendError, match="MiB could not be read by 1 threads"):
        ReadBandwidth(1, n_bytes=2**62)
