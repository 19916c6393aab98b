"""Runs the graphs of an ONNX folder: embedding, ONE loop num_loops times, head, over a K/V state bound in place.

A chunk's path reads from top to bottom in ``LoopRunner.run_chunk``, under the names of melt_edge/modeling.py.
Bindings are made once for each number of tokens in a chunk; decoding a token makes none, copies no cache and
allocates nothing here. Axes: C tokens of a chunk, D hidden, V vocab.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from melt_edge.config import LoopConfig
from melt_edge.errors import BackendError
from melt_edge.runtime.base import FloatArray
from melt_edge.runtime.machine import rss_bytes
from melt_edge.runtime.ort_buffers import Array, Memory, Tensor
from melt_edge.runtime.ort_session import first_line

# Besides one token and a whole chunk, the ends of prompts: bindings of the last few lengths are kept.
_KEPT_STEPS = 4


@dataclass
class Counters:
    """What was computed since loading. native_s: seconds inside onnxruntime; loops: loop graphs run."""

    native_s: float = 0.0
    chunks: int = 0
    loops: int = 0


@dataclass(frozen=True)
class ExitRule:
    """When a token's output is that of an earlier loop (modeling.select_exit).

    stops: a chunk's loops end once every token of it has left, which only a cache shared by loops allows.
    """

    threshold: float
    stops: bool


@dataclass(frozen=True)
class _Step:
    """The tensors and bindings of chunks of one length. loops: one binding, or one for each loop's own slots."""

    tokens: Tensor  # int64 [1, C]
    x: Tensor  # [1, C, D], read and overwritten by every loop
    latents: list[Tensor]  # [1, C, D] each, likewise
    exit_prob: Tensor  # float32 [1, C]
    embed: Any
    loops: list[Any]


class LoopRunner:
    """The sessions of one folder, the K/V state of one conversation, and the tensors between the graphs."""

    def __init__(
        self,
        sessions: dict[str, Any],
        config: LoopConfig,
        *,
        n_ctx: int,
        chunk: int,
        dtype: str,
        memory: Memory,
        exit_rule: ExitRule | None,
    ) -> None:
        """config: with the loops to run. chunk: the most tokens of one chunk. dtype: of states and cache rows."""
        self.sessions = sessions
        self.config = config
        self.exit_rule = exit_rule
        self.counters = Counters()
        # The package does not tell the size of its arena: this is what the process grew by while loops ran.
        self.arena_bytes = 0
        self._memory = memory
        self._dtype = np.dtype(dtype)
        rows = (1, config.num_key_value_heads, n_ctx, config.head_dim)
        # The gated cache as state tensors of fixed size: MELT has a slot per layer, Ouro one per loop and layer.
        self.slots = [(memory.zeros(rows, dtype), memory.zeros(rows, dtype)) for _ in range(config.cache_slots)]
        self.kv_bytes = memory.nbytes
        self._seqlens_k = memory.view(np.zeros(1, np.int32))
        self._total = memory.view(np.zeros((), np.int32))
        self._first_loop = memory.view(np.zeros((), np.bool_))
        self._logits = memory.view(np.zeros((1, 1, config.vocab_size), np.float32))
        # Chunks of every length share this memory where it is the processor's.
        n_latents = config.num_hidden_layers if config.has_gate else 0
        self._pool: Array | None = None
        if memory.is_host:
            self._pool = memory.array((1 + n_latents, chunk * config.hidden_size), dtype)
        self._n_latents = n_latents
        self._kept: OrderedDict[int, _Step] = OrderedDict()
        self._one = self._make_step(1)
        self._whole = self._make_step(chunk) if chunk > 1 else self._one
        self._chunk = chunk
        self._last_row = self._head_binding(self._one, self._logits)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the tensors between the graphs."""
        return self._memory.nbytes - self.kv_bytes

    @property
    def last_row(self) -> FloatArray:
        """Logits [V] of the last ``read_last``; the next one overwrites them."""
        row: FloatArray = self._logits.read()[0, 0]
        return row

    def run_chunk(self, tokens: npt.NDArray[np.int64], n_past: int) -> int:
        """All loops over one chunk that follows n_past tokens. Returns the loops that were run.

        The chunk's rows are in the state afterwards, and the output of each of its tokens waits to be read.
        """
        step = self._step(len(tokens))
        step.tokens.write(tokens[None])
        total = n_past + len(tokens)
        self._seqlens_k.read()[0] = total - 1
        self._total.read()[...] = total
        self._run("embed", step.embed)  # [1, C, D]
        self._clear_latents(step, len(tokens))
        leaving = None if self.exit_rule is None else _Leaving(self.exit_rule, len(tokens))
        # One token after another needs no more than the first: reading the process's size takes some 20 us.
        watched = len(tokens) > 1 or self.counters.chunks == 0
        rss_before = rss_bytes() if watched else 0
        loop_idx = 0
        for loop_idx in range(self.config.num_loops):
            self._first_loop.read()[...] = loop_idx == 0
            self._run("loop", step.loops[loop_idx % len(step.loops)])
            if leaving is not None and leaving.take(step, is_last=loop_idx == self.config.num_loops - 1):
                break
        if watched:
            self.arena_bytes += max(0, rss_bytes() - rss_before)
        if leaving is not None:
            step.x.write(leaving.states)
        self.counters.chunks += 1
        self.counters.loops += loop_idx + 1
        return loop_idx + 1

    def read_last(self, n_tokens: int) -> None:
        """Compute the logits of the last token of the chunk of n_tokens that was run last."""
        step = self._step(n_tokens)
        if step is not self._one:
            self._one.x.write(step.x.read()[:, -1:])
        self._run("head", self._last_row)

    def read_logits(self, n_tokens: int, rows: FloatArray) -> None:
        """Compute the logits of every token of that chunk into ``rows`` [C, V], contiguous."""
        self._run("head", self._head_binding(self._step(n_tokens), self._memory.view(rows[None])))

    def read_states(self, n_tokens: int, rows: FloatArray) -> None:
        """Copy what the head would read of that chunk into ``rows`` [C, D]."""
        rows[...] = self._step(n_tokens).x.read()[0]

    # -- helpers

    def _run(self, name: str, binding: Any) -> None:
        start = time.perf_counter()
        try:
            self.sessions[name].run_with_iobinding(binding)
        except Exception as err:  # the package raises a class of its own for every cause
            raise BackendError(f"onnxruntime could not run {name}.onnx: {first_line(err)}") from err
        self.counters.native_s += time.perf_counter() - start

    def _clear_latents(self, step: _Step, n_tokens: int) -> None:
        if self._pool is not None:
            self._pool[1:, : n_tokens * self.config.hidden_size] = 0.0
            return
        for latent in step.latents:
            latent.write(np.zeros((1, n_tokens, self.config.hidden_size), self._dtype))

    def _step(self, n_tokens: int) -> _Step:
        if n_tokens == 1:
            return self._one
        if n_tokens == self._chunk:
            return self._whole
        step = self._kept.pop(n_tokens, None) or self._make_step(n_tokens)
        self._kept[n_tokens] = step
        while len(self._kept) > _KEPT_STEPS:
            self._kept.popitem(last=False)
        return step

    def _make_step(self, n_tokens: int) -> _Step:
        memory, config = self._memory, self.config
        shape = (1, n_tokens, config.hidden_size)
        if self._pool is not None:
            size = n_tokens * config.hidden_size
            states = [memory.view(part[:size].reshape(shape)) for part in self._pool]
        else:
            states = [memory.zeros(shape, self._dtype) for _ in range(1 + self._n_latents)]
        x, *latents = states
        tokens = memory.view(np.zeros((1, n_tokens), np.int64))
        exit_prob = memory.view(np.zeros((1, n_tokens), np.float32))
        embed = self.sessions["embed"].io_binding()
        embed.bind_ortvalue_input("input_ids", tokens.value)
        embed.bind_ortvalue_output("x", x.value)
        n_layers = config.num_hidden_layers
        loops = [
            self._loop_binding(x, latents, exit_prob, self.slots[first : first + n_layers])
            for first in range(0, config.cache_slots, n_layers)
        ]
        return _Step(tokens, x, latents, exit_prob, embed, loops)

    def _loop_binding(
        self, x: Tensor, latents: list[Tensor], exit_prob: Tensor, slots: list[tuple[Tensor, Tensor]]
    ) -> Any:
        binding = self.sessions["loop"].io_binding()
        binding.bind_ortvalue_input("x", x.value)
        binding.bind_ortvalue_output("x_out", x.value)
        for i, latent in enumerate(latents):
            binding.bind_ortvalue_input(f"h.{i}", latent.value)
            binding.bind_ortvalue_output(f"h_out.{i}", latent.value)
        for i, rows in enumerate(slots):
            for kind, tensor in zip(("key", "value"), rows, strict=True):
                binding.bind_ortvalue_input(f"past.{i}.{kind}", tensor.value)
                binding.bind_ortvalue_output(f"present.{i}.{kind}", tensor.value)
        binding.bind_ortvalue_input("seqlens_k", self._seqlens_k.value)
        binding.bind_ortvalue_input("total_sequence_length", self._total.value)
        if self.config.has_gate and self.config.kv_gate_init == "input":
            binding.bind_ortvalue_input("first_loop", self._first_loop.value)
        binding.bind_ortvalue_output("exit_prob", exit_prob.value)
        return binding

    def _head_binding(self, step: _Step, logits: Tensor) -> Any:
        binding = self.sessions["head"].io_binding()
        binding.bind_ortvalue_input("x", step.x.value)
        binding.bind_ortvalue_output("logits", logits.value)
        return binding


class _Leaving:
    """Which tokens of a chunk have left, and the state each left with (modeling.select_exit, loop by loop)."""

    def __init__(self, rule: ExitRule, n_tokens: int) -> None:
        self.states: Array = np.zeros(0)
        self._rule = rule
        self._remaining = np.ones(n_tokens, np.float32)
        self._gone = np.zeros(n_tokens, np.bool_)

    def take(self, step: _Step, *, is_last: bool) -> bool:
        """Note a loop's outputs. True if no further loop is needed."""
        self._remaining *= 1 - step.exit_prob.read()[0]
        leaves = 1 - self._remaining >= np.float32(self._rule.threshold)
        if is_last:
            leaves[:] = True
        new = leaves & ~self._gone
        x = step.x.read()
        if self.states.size == 0:
            self.states = x.copy()
        self.states[0, new] = x[0, new]
        self._gone |= new
        return self._rule.stops and bool(self._gone.all())
