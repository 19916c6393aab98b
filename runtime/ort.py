"""The onnxruntime backend: an ONNX folder of one loop step, behind base.Backend.

Text is llama.cpp's: the folder brings the vocabulary as a GGUF file, so that the tokenizer, the sampler chain
and grammars are the ones every other backend uses. The graphs run in ort_loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from melt_edge.errors import BackendError
from melt_edge.runtime.base import FloatArray, Memory
from melt_edge.runtime.generate import check_fits
from melt_edge.runtime.machine import rss_bytes
from melt_edge.runtime.memory import check_array, check_budget
from melt_edge.runtime.onnx_folder import open_folder
from melt_edge.runtime.onnx_graphs import has_free_n_ctx, with_n_ctx
from melt_edge.runtime.options import LoadOptions
from melt_edge.runtime.ort_buffers import Memory as TensorMemory
from melt_edge.runtime.ort_loop import LoopRunner
from melt_edge.runtime.ort_options import estimate_folder, exit_rule, folder_info, resolve_folder
from melt_edge.runtime.ort_session import import_onnxruntime, open_sessions
from melt_edge.runtime.ort_state import RowLayout
from melt_edge.runtime.state import StateHeader, read_state, write_state
from melt_edge.runtime.vocab import VocabularyFile, VocabularyText


class OrtBackend(VocabularyText):
    """One ONNX folder opened by onnxruntime, with one conversation in its cache. Not thread-safe."""

    def __init__(self, path: Path, options: LoadOptions) -> None:
        """Raises: as loading.load."""
        import_onnxruntime()  # a missing package is told before gigabytes are checked
        folder = open_folder(path)
        self.settings = settings = resolve_folder(folder, options)
        needed = estimate_folder(folder, settings)
        check_budget(needed, n_ctx=settings.n_ctx, kv_type=settings.kv_type, source=str(path))
        folder.check_weights()
        graphs = dict(folder.graph_bytes)
        if settings.n_ctx != folder.n_ctx and has_free_n_ctx(folder.graphs["loop"].model):
            graphs["loop"] = with_n_ctx(folder.graphs["loop"].model, settings.n_ctx)
        self.info = folder_info(folder, settings)
        self._digest = folder.digest
        self._weights_bytes = folder.weights_bytes
        self._vocabulary = VocabularyFile(folder.vocabulary)
        self._vocab = self._vocabulary.vocabulary
        self._vocab.metadata = folder.metadata
        assert settings.provider is not None
        self._runner: LoopRunner | None = LoopRunner(
            open_sessions(folder.path, graphs, provider=settings.provider, n_threads=settings.n_threads),
            settings.config,
            n_ctx=settings.n_ctx,
            chunk=settings.chunk,
            dtype=folder.activations,
            memory=TensorMemory(settings.provider),
            exit_rule=exit_rule(settings),
        )
        self._tokens: list[int] = []
        self._has_logits = False

    @property
    def tokens(self) -> list[int]:
        """The tokens whose rows the cache holds, in order."""
        return list(self._tokens)

    @property
    def n_tokens(self) -> int:
        """How many tokens the cache holds."""
        return len(self._tokens)

    def raw(self) -> LoopRunner:
        """The runner of the loops, with its sessions, state tensors and counters."""
        return self._live

    def close(self) -> None:
        """Free sessions, state and vocabulary; may be called twice."""
        self._runner = None
        self._vocabulary.close()

    # -- computing

    @property
    def native_s(self) -> float | None:
        """Seconds spent inside onnxruntime since loading."""
        return self._live.counters.native_s

    def reset(self) -> None:
        """Empty the cache."""
        self._tokens.clear()

    def eval(self, tokens: Sequence[int]) -> None:
        """Append tokens to the cache, in chunks from the first new one on. Raises: BackendError."""
        check_fits(len(tokens), self.n_tokens, self.info.n_ctx)
        runner, size = self._live, self.settings.chunk
        self._has_logits = False
        n_tokens = 1
        for start in range(0, len(tokens), size):
            n_tokens = self._run_chunk(tokens[start : start + size])
        runner.read_last(n_tokens)
        self._has_logits = True

    def last_logits(self) -> FloatArray:
        """Logits [n_vocab] after the last evaluated token: a view that the next eval overwrites."""
        if not self._has_logits:
            raise BackendError("there are no logits: nothing was evaluated since the state was loaded")
        return self._live.last_row

    def logits(self, tokens: Sequence[int]) -> FloatArray:
        """Logits [n_tokens, n_vocab] from an empty cache. Raises: MemoryBudgetError, BackendError."""
        shape = (len(tokens), self.info.n_vocab)
        check_array(4 * shape[0] * shape[1], f"logits of {shape[0]} tokens")
        return self._rows(tokens, shape, self._live.read_logits)

    def embed(self, tokens: Sequence[int]) -> FloatArray:
        """Normed outputs of the last loop [n_tokens, n_embd]; empties the cache."""
        try:
            return self._rows(tokens, (len(tokens), self.info.n_embd), self._live.read_states)
        finally:
            self.reset()

    def memory(self) -> Memory:
        """Bytes of weights, state and buffers, with onnxruntime's arena as it was seen to grow."""
        runner = self._live
        return Memory(
            weights_bytes=self._weights_bytes,
            kv_bytes=runner.kv_bytes,
            compute_bytes=runner.buffer_bytes + runner.arena_bytes,
            rss_bytes=rss_bytes(),
        )

    # -- state

    def save_state(self, path: Path, *, force: bool) -> None:
        """Write the conversation as state.write_state does."""
        size = self._layout.payload_bytes(self.n_tokens)
        check_array(size, "a copy of the conversation's cache")
        payload = self._layout.copy_out(self._live.slots, self.n_tokens)
        write_state(path, self._header(size), self._tokens, payload, force=force)

    def load_state(self, path: Path) -> None:
        """Replace the conversation; everything in the file is checked before the live one is touched."""
        tokens, payload = read_state(path, self._header(0), self._layout)
        self._layout.copy_in(self._live.slots, payload, len(tokens))
        self._tokens = tokens
        self._has_logits = False

    def _header(self, n_payload: int) -> StateHeader:
        chunk = self.settings.wanted_chunk
        return StateHeader.of(self.info, self._digest, chunk_size=chunk, n_tokens=self.n_tokens, n_payload=n_payload)

    @property
    def _layout(self) -> RowLayout:
        info = self.info
        dtype = {"f32": "float32", "f16": "float16"}[info.kv_type]
        return RowLayout(self.settings.config.cache_slots, info.n_head_kv, info.head_dim, dtype)

    # -- helpers

    @property
    def _live(self) -> LoopRunner:
        assert self._runner is not None, "closed"
        return self._runner

    def _run_chunk(self, tokens: Sequence[int]) -> int:
        self._live.run_chunk(np.asarray(tokens, dtype=np.int64), self.n_tokens)
        self._tokens += tokens
        return len(tokens)

    def _rows(self, tokens: Sequence[int], shape: tuple[int, int], read: Any) -> FloatArray:
        """One output row per token, evaluated from an empty cache in chunks."""
        check_fits(len(tokens), 0, self.info.n_ctx)
        self.reset()
        self._has_logits = False
        rows = np.empty(shape, dtype=np.float32)
        for start in range(0, len(tokens), self.settings.chunk):
            n_tokens = self._run_chunk(tokens[start : start + self.settings.chunk])
            read(n_tokens, rows[start : start + n_tokens])
        if not np.isfinite(rows).all():
            raise BackendError(
                f"{self.info.path}: the model computed values that are not finite; the folder is damaged or "
                "the number of loops is far from the trained one"
            )
        return rows
