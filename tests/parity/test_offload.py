"""Which layers and cache slots a partial offload moves, seen through a device that is the CPU under another name.

The placement is what llama.cpp logs. That a real graphics card computes the same is not tested here.
"""

from __future__ import annotations

import ctypes
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from melt_edge.runtime.library import native_dir
from parity.native import Context, collector, context, llama, sequence
from tiny import tiny_config

LAYERS, LOOPS = 3, 4
TOKENS = sequence(range(20))
GPU = 1  # ggml_backend_dev_type
GET_NAME, GET_TYPE = 0, 3  # of the 15 functions at the head of a ggml_backend_device
DEVICE_POINTERS = 17


def card() -> tuple[ctypes.Array[ctypes.c_void_p], list[object]]:
    """A device like the CPU's that says it is a graphics card named CARD, and what must outlive it."""
    ggml = ctypes.CDLL(str(native_dir() / ("libggml.dylib" if sys.platform == "darwin" else "libggml.so")))
    ggml.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    cpu = ctypes.cast(ggml.ggml_backend_dev_by_type(0), ctypes.POINTER(ctypes.c_void_p))
    device = (ctypes.c_void_p * DEVICE_POINTERS)(*cpu[:DEVICE_POINTERS])
    name = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(lambda _: ctypes.addressof(text))
    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(lambda _: GPU)
    text = ctypes.create_string_buffer(b"CARD")
    device[GET_NAME] = ctypes.cast(name, ctypes.c_void_p)
    device[GET_TYPE] = ctypes.cast(kind, ctypes.c_void_p)
    return device, [name, kind, text]


@contextmanager
def offloaded(
    path: Path, n_gpu_layers: int, *, flash_attn: bool = False, eval_callback: Any = None
) -> Iterator[Context]:
    """A model with a context, that many layers of it on the card."""
    device, alive = card()
    params = llama.llama_model_default_params()
    devices = (ctypes.c_void_p * 2)(ctypes.addressof(device), None)
    params.devices = ctypes.cast(devices, ctypes.c_void_p)
    params.n_gpu_layers = n_gpu_layers
    model = llama.llama_model_load_from_file(str(path).encode(), params)
    assert model
    context_params = llama.llama_context_default_params()
    context_params.n_ctx = context_params.n_batch = 256
    context_params.n_threads = context_params.n_threads_batch = 1
    context_params.flash_attn_type = int(flash_attn)
    if eval_callback is not None:
        context_params.cb_eval = eval_callback
    handle = llama.llama_init_from_model(model, context_params)
    assert handle
    try:
        yield Context(model, handle)
    finally:
        llama.llama_free(handle)
        llama.llama_model_free(model)
        alive.clear()


@pytest.mark.parametrize("n_gpu_layers", [0, 1, 2, 3, 4, 5, 12, 13, -1])
@pytest.mark.parametrize("model_type", ["ouro", "melt"])
def test_offload_counts_the_layers_of_the_file(make_gguf, caplog, model_type: str, n_gpu_layers: int) -> None:
    """A count below Ouro's layers times loops moved no weights: it was taken from the last cache slot."""
    path = make_gguf(tiny_config(model_type, layers=LAYERS, num_loops=LOOPS))
    with context(path, kv_type="f16") as plain:
        expected_logits = plain.logits(TOKENS)
    caplog.set_level(logging.DEBUG, logger="melt_edge.llama")
    with offloaded(path, n_gpu_layers) as model:
        np.testing.assert_allclose(model.logits(TOKENS), expected_logits, atol=1e-5)
    text = "\n".join(caplog.messages)
    weights = dict(re.findall(r"load_tensors: layer +(\d+) assigned to device (\w+)", text))
    slots = re.findall(r"layer +(\d+): dev = (\w+)", text)

    n_gpu = LAYERS + 1 if n_gpu_layers < 0 else min(n_gpu_layers, LAYERS + 1)  # the output layer is the last
    expected = ["CPU"] * (LAYERS + 1 - n_gpu) + ["CARD"] * n_gpu
    assert [weights[str(il)] for il in range(LAYERS + 1)] == expected
    n_slots = LAYERS * (LOOPS if model_type == "ouro" else 1)
    assert [(int(il), device) for il, device in slots] == [(il, expected[il % LAYERS]) for il in range(n_slots)]


@pytest.mark.parametrize("n_gpu_layers", [0, 2, -1])
def test_latents_wait_in_the_buffer_where_a_card_may_compute(make_gguf, n_gpu_layers: int) -> None:
    """It would copy the CPU's whole cache to read a few rows of it. Without a card they wait in the cache."""
    path = make_gguf(tiny_config("melt", layers=LAYERS, num_loops=LOOPS))
    plain_names: set[str] = set()
    names: set[str] = set()
    with context(path, flash_attn=True, kv_type="f16", eval_callback=collector(plain_names, "ggml_get_name")) as plain:
        expected = plain.logits(TOKENS)
    with offloaded(path, n_gpu_layers, flash_attn=True, eval_callback=collector(names, "ggml_get_name")) as model:
        np.testing.assert_allclose(model.logits(TOKENS), expected, atol=1e-3)
    assert "kv_gate_latent" in plain_names
    assert "kv_gate_h" in names
    assert "kv_gate_latent" not in names
