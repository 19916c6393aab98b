"""The llama.cpp backend: llama-cpp-python over our patched library, behind base.Backend.

Every value that comes from a file or a user is checked before it reaches the library, because llama.cpp
answers many of them by ending the process.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from melt_edge.errors import BackendError
from melt_edge.runtime.base import DoubleArray, FloatArray, Memory
from melt_edge.runtime.bindings import llama_class
from melt_edge.runtime.gguf_check import check_gguf
from melt_edge.runtime.library import captured_log, import_llama_cpp, last_reason, native_function
from melt_edge.runtime.machine import rss_bytes
from melt_edge.runtime.memory import KV_TYPES, check_array, check_budget
from melt_edge.runtime.options import LoadOptions, Settings, estimate_file, model_info, resolve
from melt_edge.runtime.state import (
    ByteArray,
    CacheLayout,
    StateHeader,
    model_digest,
    read_state,
    write_state,
)
from melt_edge.runtime.vocab import Vocabulary, VocabularyText

_SEQUENCE = 0


class LlamaBackend(VocabularyText):
    """One GGUF file opened by llama.cpp, with one conversation in its cache. Not thread-safe."""

    def __init__(self, path: Path, options: LoadOptions) -> None:
        """Raises: as loading.load."""
        self.file = check_gguf(path)
        self.settings = settings = resolve(self.file, options)
        needed = estimate_file(self.file, settings)
        check_budget(needed, n_ctx=settings.n_ctx, kv_type=settings.kv_type, source=str(path))
        self._low = import_llama_cpp().llama_cpp
        self._llama = self._open()
        try:
            self._vocab = Vocabulary(self._llama._model.vocab, self.file)
        except BaseException:
            self._llama.close()
            raise
        self.info = model_info(self.file, settings, backend="llama")

    @property
    def tokens(self) -> list[int]:
        """The tokens whose rows the cache holds, in order."""
        return [int(token) for token in self._llama.input_ids[: self._llama.n_tokens]]

    @property
    def n_tokens(self) -> int:
        """How many tokens the cache holds."""
        return int(self._llama.n_tokens)

    def raw(self) -> Any:
        """The llama_cpp.Llama, on the same cache."""
        return self._llama

    def close(self) -> None:
        """Free context and model; may be called twice."""
        self._llama.close()

    # -- computing

    @property
    def native_s(self) -> float | None:
        """Not measured: the library's own clock leaves out what it does around a graph."""
        return None

    def reset(self) -> None:
        """Empty the cache."""
        self._llama.reset()
        self._llama._ctx.kv_cache_clear()

    def eval(self, tokens: Sequence[int]) -> None:
        """Append tokens to the cache. Raises: BackendError with the library's reason."""
        with captured_log() as lines:
            try:
                # Cuts into pieces of n_batch, a multiple of the chunk, from the first new token on.
                self._llama.eval(list(tokens))
            except RuntimeError as err:
                raise BackendError(f"llama.cpp could not evaluate {len(tokens)} tokens: {_reason(lines, err)}") from err

    def last_logits(self) -> FloatArray:
        """Logits [n_vocab] after the last evaluated token: a view that the next eval overwrites."""
        row = self._low.llama_get_logits_ith(self._llama.ctx, -1)
        if not row:
            raise BackendError("llama.cpp has no logits: nothing was evaluated since the state was loaded")
        return np.ctypeslib.as_array(row, shape=(self.info.n_vocab,))

    def logits(self, tokens: Sequence[int]) -> FloatArray:
        """Logits [n_tokens, n_vocab] from an empty cache. Raises: MemoryBudgetError, BackendError."""
        shape = (len(tokens), self.info.n_vocab)
        check_array(4 * shape[0] * shape[1], f"logits of {shape[0]} tokens")
        return self._rows(tokens, shape, self._low.llama_get_logits)

    def embed(self, tokens: Sequence[int]) -> FloatArray:
        """Normed outputs of the last loop [n_tokens, n_embd]; empties the cache."""
        context = self._llama.ctx
        self._low.llama_set_embeddings(context, True)
        try:
            return self._rows(tokens, (len(tokens), self.info.n_embd), self._low.llama_get_embeddings)
        finally:
            self._low.llama_set_embeddings(context, False)
            self.reset()

    def memory(self) -> Memory:
        """Bytes as the library counts them."""
        weights, kv, compute = (
            native_function(f"melt_edge_{part}_bytes", ctypes.c_uint64, ctypes.c_void_p)(self._llama.ctx)
            for part in ("weights", "kv", "compute")
        )
        return Memory(weights_bytes=weights, kv_bytes=kv, compute_bytes=compute, rss_bytes=rss_bytes())

    # -- for benchmarks

    def truncate(self, n_tokens: int) -> None:
        """Keep the first n_tokens of the cache."""
        self._llama.n_tokens = min(n_tokens, self.n_tokens)
        self._llama._ctx.kv_cache_seq_rm(_SEQUENCE, self.n_tokens, -1)
        self._llama._requires_eval = True

    def repeat_rows(self, n_tokens: int) -> None:
        """Write the cache's rows again and again until it holds n_tokens; they mean nothing, they take as long."""
        before = self.tokens
        with captured_log() as lines:
            function = native_function("melt_edge_kv_repeat", ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint32)
            if not before or function(self._llama.ctx, n_tokens) != n_tokens:
                self.reset()
                raise BackendError(
                    f"the rows of {len(before)} tokens could not be repeated to {n_tokens} ({last_reason(lines)})"
                )
        self._llama.input_ids[:n_tokens] = np.resize(before, n_tokens)
        self._llama.n_tokens = n_tokens
        self._llama._requires_eval = True

    def time_parts(self, tokens: Sequence[int]) -> DoubleArray:
        """Seconds of the parts of a token, the mean of all tokens but the first; the cache is as long as before after.

        Shape: [num_loops + 1, 3]: each loop, then what follows; attention over the cache, gates, all else.
        """
        parts: DoubleArray = np.zeros((self.info.num_loops + 1, 3))
        ids = (self._low.llama_token * len(tokens))(*tokens)
        function = native_function(
            "melt_edge_time_parts",
            ctypes.c_uint32,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_uint32,
            ctypes.c_void_p,
            ctypes.c_uint32,
        )
        with captured_log() as lines:
            n_timed = function(self._llama.ctx, ids, len(tokens), parts.ctypes.data, self.info.num_loops)
        self.truncate(self.n_tokens)
        if n_timed == 0:
            raise BackendError(f"llama.cpp could not time {len(tokens)} tokens: {last_reason(lines)}")
        parts /= n_timed
        return parts

    # -- state

    def save_state(self, path: Path, *, force: bool) -> None:
        """Write the conversation as state.write_state does."""
        payload = self._sequence_bytes()
        write_state(path, self._header(len(payload)), self.tokens, payload, force=force)

    def load_state(self, path: Path) -> None:
        """Replace the conversation; the live one comes back if the library refuses the new one."""
        tokens, payload = read_state(path, self._header(0), self._layout())
        live_tokens, live = self.tokens, self._sequence_bytes()
        with captured_log() as lines:
            ok = self._restore(tokens, payload)
        if not ok:
            if not self._restore(live_tokens, live):
                self.reset()
                raise BackendError(
                    f"{path}: llama.cpp refused the state ({last_reason(lines)}) and the old one; it is empty now"
                )
            raise BackendError(f"{path}: llama.cpp refused the state ({last_reason(lines)}); the conversation is kept")

    def _restore(self, tokens: list[int], payload: ByteArray) -> bool:
        self.reset()
        if tokens:
            source = payload.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
            if self._low.llama_state_seq_set_data(self._llama.ctx, source, len(payload), _SEQUENCE) != len(payload):
                return False
        self._llama.input_ids[: len(tokens)] = tokens
        self._llama.n_tokens = len(tokens)
        self._llama._requires_eval = True
        return True

    def _sequence_bytes(self) -> ByteArray:
        # An interrupted eval may have left rows that the token list does not know.
        self._llama._ctx.kv_cache_seq_rm(_SEQUENCE, self.n_tokens, -1)
        size = self._low.llama_state_seq_get_size(self._llama.ctx, _SEQUENCE)
        check_array(size, "a copy of the conversation's cache")
        payload = np.empty(size, dtype=np.uint8)
        target = payload.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if self._low.llama_state_seq_get_data(self._llama.ctx, target, size, _SEQUENCE) != size or size == 0:
            raise BackendError("llama.cpp could not copy the conversation's cache")
        return payload

    @functools.cached_property
    def _digest(self) -> str:
        return model_digest(self.file)

    def _header(self, n_payload: int) -> StateHeader:
        chunk = self.settings.wanted_chunk
        return StateHeader.of(self.info, self._digest, chunk_size=chunk, n_tokens=self.n_tokens, n_payload=n_payload)

    def _layout(self) -> CacheLayout:
        config = self.settings.config
        return CacheLayout(
            n_slots=config.cache_slots,
            row_values=config.num_key_value_heads * config.head_dim,
            kv_type=self.info.kv_type,
            # The library makes V rows whole wherever flash attention is on or may be.
            v_transposed=self.settings.flash_attn is False,
        )

    # -- helpers

    def _rows(self, tokens: Sequence[int], shape: tuple[int, int], get: Any) -> FloatArray:
        """One output row per token, evaluated from an empty cache in pieces of whole chunks."""
        self.reset()
        llama = self._llama
        rows = np.empty(shape, dtype=np.float32)
        for start in range(0, len(tokens), llama.n_batch):
            piece = list(tokens[start : start + llama.n_batch])
            llama._batch.set_batch(batch=piece, n_past=start, logits_all=True)
            with captured_log() as lines:
                try:
                    llama._ctx.decode(llama._batch)
                except RuntimeError as err:
                    raise BackendError(
                        f"llama.cpp could not evaluate {len(tokens)} tokens: {_reason(lines, err)}"
                    ) from err
            end = start + len(piece)
            rows[start:end] = np.ctypeslib.as_array(get(llama.ctx), shape=(len(piece), shape[1]))
            llama.input_ids[start:end] = piece
            llama.n_tokens = end
            llama._requires_eval = False
        if not np.isfinite(rows).all():
            raise BackendError(
                f"{self.file.path}: the model computed values that are not finite; the file is damaged or "
                "the number of loops is far from the trained one"
            )
        return rows

    def _open(self) -> Any:
        settings, low, path = self.settings, self._low, self.file.path
        overrides: dict[str, int] = {f"{settings.config.model_type}.num_loops": settings.config.num_loops}
        if settings.config.shares_kv:
            overrides["melt.chunk_size"] = settings.chunk
        type_id = KV_TYPES[settings.kv_type][0]
        n_gpu_layers = settings.n_gpu_layers
        if n_gpu_layers is None:
            n_gpu_layers = -1 if sys.platform == "darwin" and low.llama_supports_gpu_offload() else 0
        with captured_log() as lines:
            try:
                return llama_class()(
                    str(path),
                    self.render_chat,
                    flash_attn_type=_flash_type(settings, low),
                    kv_overrides=overrides,
                    n_ctx=settings.n_ctx,
                    n_batch=settings.n_batch,
                    n_ubatch=settings.chunk,
                    n_threads=settings.n_threads,
                    n_threads_batch=settings.n_threads,
                    n_gpu_layers=n_gpu_layers,
                    type_k=type_id,
                    type_v=type_id,
                    pooling_type=low.LLAMA_POOLING_TYPE_NONE,
                    verbose=False,
                )
            except (ValueError, RuntimeError, OSError) as err:
                raise BackendError(f"{path}: llama.cpp cannot load this file: {_reason(lines, err)}") from err


def _flash_type(settings: Settings, low: Any) -> int:
    # A quantised cache needs flash attention; otherwise the library may choose.
    if settings.flash_attn is None and KV_TYPES[settings.kv_type][1] == 1:
        return int(low.LLAMA_FLASH_ATTN_TYPE_AUTO)
    off = settings.flash_attn is False
    return int(low.LLAMA_FLASH_ATTN_TYPE_DISABLED if off else low.LLAMA_FLASH_ATTN_TYPE_ENABLED)


def _reason(lines: list[tuple[int, str]], err: Exception) -> str:
    reason = last_reason(lines)
    return reason if reason != "the library gave no reason" else str(err)
