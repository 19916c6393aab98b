"""The patched llama.cpp through its C API: what the parity tests compare with the reference.

Below the package's own runtime on purpose, so that batches, sequences and cache types are the test's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from melt_edge.runtime.library import import_llama_cpp, native_function

llama = import_llama_cpp().llama_cpp
llama.llama_backend_init()

KV_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8}  # ggml_type


@dataclass
class Token:
    """One entry of a batch."""

    id: int
    pos: int
    seqs: tuple[int, ...] = (0,)
    output: bool = True


def sequence(tokens: Sequence[int], start: int = 0, seq: int = 0) -> list[Token]:
    """Consecutive tokens of one sequence."""
    return [Token(token, start + i, (seq,)) for i, token in enumerate(tokens)]


class Context:
    """A llama_context with the few calls that the tests need."""

    def __init__(self, model: Any, handle: Any) -> None:
        self.model, self.handle = model, handle
        self.memory = llama.llama_get_memory(handle)

    def decode(self, tokens: Sequence[Token]) -> int:
        """llama_decode of one batch; returns its code."""
        batch = llama.llama_batch_init(len(tokens), 0, 8)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token.id, token.pos
            batch.n_seq_id[i] = len(token.seqs)
            for j, seq in enumerate(token.seqs):
                batch.seq_id[i][j] = seq
            batch.logits[i] = int(token.output)
        code = llama.llama_decode(self.handle, batch)
        llama.llama_batch_free(batch)
        return int(code)

    def logits(self, tokens: Sequence[Token]) -> np.ndarray:
        """Decode one batch; the logits of its tokens, (n_tokens, V) float32."""
        assert self.decode(tokens) == 0
        n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        return self._rows(llama.llama_get_logits_ith, len(tokens), n_vocab)

    def embeddings(self, tokens: Sequence[Token]) -> np.ndarray:
        """Decode one batch; the states that the head reads, (n_tokens, D) float32."""
        assert self.decode(tokens) == 0
        return self._rows(llama.llama_get_embeddings_ith, len(tokens), llama.llama_model_n_embd(self.model))

    def _rows(self, get: Any, n_rows: int, width: int) -> np.ndarray:
        return np.stack([np.ctypeslib.as_array(get(self.handle, i), (width,)).copy() for i in range(n_rows)])

    def kv_bytes(self) -> int:
        """Bytes of the K/V cache as the library reports them."""
        return int(native_function("melt_edge_kv_bytes", ctypes.c_uint64, ctypes.c_void_p)(self.handle))

    def compute_bytes(self) -> int:
        """Bytes of the compute buffers as the library reports them."""
        return int(native_function("melt_edge_compute_bytes", ctypes.c_uint64, ctypes.c_void_p)(self.handle))


def collector(found: set[str], getter: str) -> Any:
    """A context's eval_callback that adds what ggml's getter says of each node, of a name "name-layer" only "name"."""
    get = native_function(getter, ctypes.c_char_p, ctypes.c_void_p)

    @llama.ggml_backend_sched_eval_callback
    def collect(tensor: int, ask: bool, user_data: object) -> bool:
        found.add(get(tensor).decode().partition("-")[0])
        return not ask

    return collect


@contextmanager
def context(
    path: Path,
    *,
    n_ctx: int = 256,
    n_ubatch: int = 512,
    loops: int | None = None,
    chunk_size: int | None = None,
    flash_attn: bool = False,
    kv_type: str = "f32",
    n_seq_max: int = 1,
    kv_unified: bool = True,
    embeddings: bool = False,
    lora: Path | None = None,
    eval_callback: Any = None,
) -> Iterator[Context]:
    """Load a model with the given overrides and make a context on it. Raises: RuntimeError if either fails."""
    arch = "melt" if chunk_size is not None else path.name.split("-")[0]
    overrides = {f"{arch}.num_loops": loops, f"{arch}.chunk_size": chunk_size}
    overrides = {key: value for key, value in overrides.items() if value is not None}
    array = (llama.llama_model_kv_override * (len(overrides) + 1))()
    for item, (key, value) in zip(array, overrides.items(), strict=False):
        item.tag, item.key, item.value.val_i64 = 0, key.encode(), value

    model_params = llama.llama_model_default_params()
    model_params.kv_overrides = array
    model_params.check_tensors = True
    model = llama.llama_model_load_from_file(str(path).encode(), model_params)
    if not model:
        raise RuntimeError(f"{path} was refused")
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_ctx, n_ubatch
    params.n_threads = params.n_threads_batch = 1
    params.flash_attn_type = int(flash_attn)
    params.type_k = params.type_v = KV_TYPES[kv_type]
    params.n_seq_max, params.kv_unified, params.embeddings = n_seq_max, kv_unified, embeddings
    if eval_callback is not None:
        params.cb_eval = eval_callback
    handle = llama.llama_init_from_model(model, params)
    try:
        if not handle:
            raise RuntimeError(f"{path}: no context with these parameters")
        if lora is not None:
            adapter = llama.llama_adapter_lora_init(model, str(lora).encode())
            if not adapter:
                raise RuntimeError(f"{lora} was refused")
            adapters, scales = (llama.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(1.0)
            assert llama.llama_set_adapters_lora(handle, adapters, 1, scales) == 0
        yield Context(model, handle)
    finally:
        if handle:
            llama.llama_free(handle)
        llama.llama_model_free(model)
