"""Where a chunk's latents wait from loop to loop: in the rows of the cache that the next loop writes anew."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from numpy.typing import NDArray

from melt_edge.config import LoopConfig
from melt_edge.runtime.library import native_function
from parity.native import Context, collector, context, llama, sequence
from parity.reference import random_tokens
from tiny import tiny_config

N_TOKENS = 24
# A number is rounded to the cache's type, and what that left is rounded to it as well. float16 has 11 bits, and
# multiples of 2**-24 below its normal numbers.
MAX_RELATIVE, MAX_ABSOLUTE = 2.0**-22, 2.0**-25


def wide_config(**more: object) -> LoopConfig:
    """A model whose latents are much larger than its logits and its feed-forward."""
    return tiny_config("melt", layers=6, n_head=2, chunk_size=256, **more)


@contextmanager
def listening(path, names: tuple[str, ...], width: int, **options) -> Iterator[tuple[Context, dict[str, list]]]:
    """A context, and what nodes of these names held, by "name-layer" in the order of the loops: (n_tokens, width)."""
    found: dict[str, list[NDArray[np.float32]]] = {}
    get_name = native_function("ggml_get_name", ctypes.c_char_p, ctypes.c_void_p)
    get_data = native_function("ggml_get_data", ctypes.POINTER(ctypes.c_float), ctypes.c_void_p)

    @llama.ggml_backend_sched_eval_callback
    def listen(tensor: int, ask: bool, user_data: object) -> bool:
        name = get_name(tensor).decode()
        wanted = name.rpartition("-")[0] in names
        if wanted and not ask:
            found.setdefault(name, []).append(np.ctypeslib.as_array(get_data(tensor), (N_TOKENS, width)).copy())
        return wanted or not ask

    with context(path, eval_callback=listen, **options) as ctx:
        yield ctx, found


@pytest.mark.parametrize("kv_gate_init", ["zeros", "input"])
@pytest.mark.parametrize("kv_type", ["f32", "f16"])
def test_a_loop_reads_the_latents_of_the_loop_before(make_gguf, kv_type: str, kv_gate_init: str) -> None:
    """Exactly from rows of float32, to 22 bits from two of float16."""
    config = wide_config(kv_gate_init=kv_gate_init, num_loops=4)
    names = ("kv_gate_h", "kv_gate_latent", "attn_norm")
    options = {"flash_attn": True, "kv_type": kv_type}
    with listening(make_gguf(config), names, config.hidden_size, **options) as (ctx, found):
        assert ctx.decode(sequence(random_tokens(N_TOKENS, config.vocab_size))) == 0
    for layer in range(config.num_hidden_layers):
        made, read = found[f"kv_gate_h-{layer}"], found[f"kv_gate_latent-{layer}"]
        if kv_gate_init == "input":  # the first loop's latent is its input
            made = [found[f"attn_norm-{layer}"][0], *made]
        assert (len(made), len(read)) == (4, 3)
        for h, latent in zip(made[:-1], read, strict=True):
            limit = 0 if kv_type == "f32" else MAX_RELATIVE * np.abs(h) + MAX_ABSOLUTE
            assert np.all(np.abs(latent - h) <= limit)


@pytest.mark.parametrize(
    ("n_tokens", "n_head_kv", "options", "kept"),
    [
        (N_TOKENS, 2, {"flash_attn": True, "kv_type": "f16"}, True),
        (1, 2, {"flash_attn": True, "kv_type": "f16"}, False),
        (N_TOKENS, 2, {"flash_attn": False, "kv_type": "f16"}, False),  # a token's V does not lie in a row
        (N_TOKENS, 2, {"flash_attn": True, "kv_type": "q8_0"}, False),  # too coarse
        (N_TOKENS, 1, {"flash_attn": True, "kv_type": "f16"}, False),  # too short
    ],
    ids=["kept", "one-token", "no-flash-attention", "quantised", "grouped"],
)
def test_rows_that_cannot_hold_a_latent_are_left_alone(
    make_gguf, n_tokens: int, n_head_kv: int, options: dict, kept: bool
) -> None:
    """Then it waits in the graph's buffer."""
    config = wide_config(n_head_kv=n_head_kv)
    names: set[str] = set()
    with context(make_gguf(config), eval_callback=collector(names, "ggml_get_name"), **options) as ctx:
        assert ctx.decode(sequence(random_tokens(n_tokens, config.vocab_size))) == 0
    assert "kv_gate_h" in names
    assert ("kv_gate_latent" in names) == kept


def test_buffers_do_not_grow_with_the_loops(make_gguf) -> None:
    """One loop has the buffers of eight; where rows cannot hold them, the latents of all layers are added."""
    config = wide_config(vocab=260)
    latents = config.num_hidden_layers * config.chunk_size * config.hidden_size * 4

    def compute_bytes(loops: int, kv_type: str) -> int:
        options = {"loops": loops, "kv_type": kv_type, "flash_attn": True, "n_ctx": config.chunk_size}
        with context(make_gguf(config), **options) as ctx:
            return ctx.compute_bytes()

    one, *more = (compute_bytes(loops, "f16") for loops in (1, 2, 4, 8))
    assert max(more) < one + latents / 20
    assert compute_bytes(8, "q8_0") > compute_bytes(1, "q8_0") + latents / 2
