"""Model: what a user of the Python API holds. Checks arguments and owns the cache's rules.

Which rows the cache holds when a call starts:

* ``generate`` and ``stream`` start from an empty cache; with ``append=True`` they continue what is there
  (an earlier call's text, a loaded state).
* ``chat`` and ``chat_stream`` keep the cache if the conversation's tokens extend it token by token, and
  start from an empty one otherwise.
* ``logits`` starts from an empty cache and leaves its tokens there; ``embed`` empties it.

The prompt of each call is cut into chunks from its first NEW token on. A melt model's result depends on
those cuts, so a continued conversation equals a fresh one exactly only with chunk_size 1; ouro's does not.
"""

from __future__ import annotations

import inspect
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np

from melt_edge.errors import BackendError, ConfigError
from melt_edge.runtime.base import Backend, Completion, FloatArray, Memory, ModelInfo, SamplingParams
from melt_edge.runtime.generate import TextStream, check_fits, check_max_tokens, check_text_fits, generate
from melt_edge.runtime.sampling import MAX_SEED, file_defaults, grammar_text, with_overrides
from melt_edge.runtime.text import checked_path, checked_stop, shown

Prompt = str | Sequence[int]
_P = ParamSpec("_P")
_R = TypeVar("_R")


def _with_arguments_of(stream: Callable[_P, TextStream]) -> Callable[[Callable[..., _R]], Callable[_P, _R]]:
    """Makes a method that passes all its options on show those of the method it passes them to."""

    def decorate(method: Callable[..., _R]) -> Callable[_P, _R]:
        result = inspect.signature(method).return_annotation
        signature = inspect.signature(stream).replace(return_annotation=result)
        method.__signature__ = signature  # type: ignore[attr-defined]
        return cast(Callable[_P, _R], method)

    return decorate


class Model:
    """A loaded model with one conversation.

    Use it as a context manager or call ``close``. Calls from several threads are taken one after the
    other; they share the one conversation, and a stream that another call interrupts says so when read.
    An interrupted call (Ctrl-C) leaves the model usable.
    """

    def __init__(self, backend: Backend, *, seed: int | None = None) -> None:
        """backend: an open one, which this model closes; ``load`` is the usual way here."""
        self._open: Backend | None = backend
        self._seed = seed
        self._lock = threading.RLock()
        self._calls = 0  # every call that touches the cache takes the next number
        self._defaults = file_defaults(backend.metadata, source=str(backend.info.path))

    # -- text

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repeat_penalty: float | None = None,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        grammar: str | None = None,
        json_schema: str | Mapping[str, Any] | None = None,
        append: bool = False,
    ) -> TextStream:
        """The pieces of text that follow a prompt, and ``.completion`` after the last one.

        prompt: text (special tokens in it count as such) or token ids. max_tokens: None goes on until the
        model ends or the context is full, which ends with "length". temperature 0 is greedy. Sampling
        values left at None come from the file's general.sampling keys, else llama.cpp's: temperature 0.8,
        top_k 40, top_p 0.95, min_p 0.05, repeat_penalty 1 (over the last 64 tokens). stop: one or more
        texts that end the generation and are not part of it. seed: the same seed gives the same text.
        grammar: GBNF; json_schema: a schema as text or dictionary. append: continue what the cache holds.

        Arguments are checked here; the computation starts with the first piece.
        Raises: ConfigError, ContextOverflowError, BackendError.
        """
        with self._lock:
            backend = self._backend()
            cached = backend.tokens if append else []
            tokens = self._prompt_tokens(prompt, n_cached=len(cached))
            return self._start(
                tokens,
                n_keep=len(cached),
                max_tokens=max_tokens,
                stop=stop,
                grammar=grammar_text(grammar, json_schema),
                sampling={
                    "temperature": temperature,
                    "top_k": top_k,
                    "top_p": top_p,
                    "min_p": min_p,
                    "repeat_penalty": repeat_penalty,
                    "seed": seed,
                },
            )

    @_with_arguments_of(stream)
    def generate(self, prompt: Prompt, **options: Any) -> Completion:
        """The completion of a prompt; takes every option of ``stream``."""
        return self.stream(prompt, **options).result()

    def chat_stream(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repeat_penalty: float | None = None,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        grammar: str | None = None,
        json_schema: str | Mapping[str, Any] | None = None,
    ) -> TextStream:
        """The pieces of the assistant's next message, by the file's own chat template.

        messages: [{"role": "user", "content": "..."}, ...], the whole conversation each time. Options as
        in ``stream``. The cache is kept as far as the conversation extends it (see this module).

        Raises: as ``stream``; ConfigError also if the file has no template or it refuses the messages,
            FormatError if the template does not work or takes more than 2 s or 256 MB.
        """
        with self._lock:
            backend = self._backend()
            text = backend.render_chat(messages)
            # The template writes the special tokens itself, the first one too.
            check_text_fits(text, backend.max_token_bytes, backend.info.n_ctx)
            tokens = backend.tokenize(_utf8(text), add_special=False, parse_special=True)
            cached = backend.tokens
            n_keep = len(cached) if len(tokens) > len(cached) and tokens[: len(cached)] == cached else 0
            return self._start(
                tokens[n_keep:],
                n_keep=n_keep,
                max_tokens=max_tokens,
                stop=stop,
                grammar=grammar_text(grammar, json_schema),
                sampling={
                    "temperature": temperature,
                    "top_k": top_k,
                    "top_p": top_p,
                    "min_p": min_p,
                    "repeat_penalty": repeat_penalty,
                    "seed": seed,
                },
            )

    @_with_arguments_of(chat_stream)
    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Completion:
        """The assistant's next message; takes every option of ``chat_stream``."""
        return self.chat_stream(messages, **options).result()

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The text the file's chat template makes of these messages. Raises: as ``chat_stream``."""
        with self._lock:
            return self._backend().render_chat(messages, add_generation_prompt=add_generation_prompt)

    # -- numbers

    def logits(self, tokens: Sequence[int]) -> FloatArray:
        """Logits of every position, computed from an empty cache in chunks of ``info.chunk_size``.

        Shapes: tokens [n_tokens] -> float32 [n_tokens, n_vocab].
        Raises: ConfigError for no tokens or an id outside the vocabulary, ContextOverflowError,
            MemoryBudgetError if the result would not fit.
        """
        with self._lock:
            backend = self._backend()
            ids = self._checked_ids(tokens)
            check_fits(len(ids), 0, backend.info.n_ctx)
            self._calls += 1
            return backend.logits(ids)

    def embed(self, text: Prompt) -> FloatArray:
        """One vector for a text: the mean over its tokens of the last loop's normed output, at length 1.

        Shapes: float32 [n_embd]. Empties the cache. Raises: as ``logits``.
        """
        with self._lock:
            backend = self._backend()
            ids = self._prompt_tokens(text, n_cached=0)
            check_fits(len(ids), 0, backend.info.n_ctx)
            self._calls += 1
            mean = backend.embed(ids).mean(axis=0, dtype=np.float64)
            length = float(np.linalg.norm(mean))
            vector: FloatArray = (mean / length if length > 0.0 else mean).astype(np.float32)
            return vector

    def tokenize(self, text: str | bytes, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """The token ids of a text; bytes that are no UTF-8 count as U+FFFD.

        add_special: begin as the file says a prompt begins. parse_special: read <|...|> as control tokens.
        """
        with self._lock:
            return self._backend().tokenize(_utf8(text), add_special=add_special, parse_special=parse_special)

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """The text of token ids; control tokens only with ``special``. Raises: ConfigError for a foreign id."""
        with self._lock:
            backend = self._backend()
            ids = self._checked_ids(tokens)
            pieces = [backend.token_bytes(token, special=special) for token in ids]
            return b"".join(pieces).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for, which may end within a character. Raises: ConfigError for a foreign id."""
        with self._lock:
            (checked,) = self._checked_ids([token])
            return self._backend().token_bytes(checked, special=True)

    def check_grammar(self, grammar: str) -> None:
        """Raises: ConfigError for a grammar that does not parse, or is beyond grammar.check_grammar's limits."""
        with self._lock:
            backend = self._backend()
            backend.sampler(replace(self._defaults, grammar=grammar_text(grammar, None)), ()).close()

    # -- the conversation

    @property
    def tokens(self) -> list[int]:
        """The token ids whose rows the cache holds now."""
        with self._lock:
            return self._backend().tokens

    def reset(self) -> None:
        """Empty the cache."""
        with self._lock:
            self._calls += 1
            self._backend().reset()

    def save_state(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write the conversation's cache to a file that ``load_state`` checks.

        Raises: ConfigError if the file exists without ``force`` or cannot be written; a file that was
            there before stays whole.
        """
        with self._lock:
            self._backend().save_state(checked_path(path, "path"), force=force)

    def load_state(self, path: str | os.PathLike[str]) -> None:
        """Replace the conversation by a saved one; continue it with ``append=True`` or ``chat``.

        Raises: FormatError for a file that is damaged or was saved with another model, number of loops,
            chunk size or cache type; ContextOverflowError if it does not fit; the live conversation is
            kept then.
        """
        with self._lock:
            backend = self._backend()
            file = checked_path(path, "path")
            self._calls += 1
            backend.load_state(file)

    # -- about the model

    @property
    def info(self) -> ModelInfo:
        """What the model is and how it was loaded."""
        return self._backend().info

    def memory(self) -> Memory:
        """Bytes of weights, cache and buffers as the library reports them, and of the process."""
        with self._lock:
            return self._backend().memory()

    @property
    def sampling_defaults(self) -> SamplingParams:
        """What sampling values left at None stand for in this file."""
        return self._defaults

    @property
    def has_chat_template(self) -> bool:
        """True if ``chat`` can work with this file."""
        return self._backend().has_chat_template

    @property
    def llama(self) -> Any:
        """The underlying ``llama_cpp.Llama``, on the same cache; its own prefix reuse may recut chunks."""
        return self._backend().raw()

    def close(self) -> None:
        """Free the model; may be called twice. Every other call raises BackendError afterwards."""
        with self._lock:
            backend, self._open = self._open, None
            self._calls += 1
            if backend is not None:
                backend.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._open is None:
            return "<Model closed>"
        info = self._open.info
        return f"<Model {info.name!r} {info.architecture} loops={info.num_loops} n_ctx={info.n_ctx}>"

    # -- helpers

    def _backend(self) -> Backend:
        if self._open is None:
            raise BackendError("the model is closed; load it again")
        return self._open

    def _prompt_tokens(self, prompt: Prompt, *, n_cached: int) -> list[int]:
        if not isinstance(prompt, str):
            return self._checked_ids(prompt)
        backend = self._backend()
        check_text_fits(prompt, backend.max_token_bytes, backend.info.n_ctx - n_cached)
        return backend.tokenize(_utf8(prompt), add_special=n_cached == 0, parse_special=True)

    def _checked_ids(self, tokens: Sequence[int]) -> list[int]:
        n_vocab = self._backend().info.n_vocab
        try:
            ids = np.asarray(tokens)
        except (TypeError, ValueError, OverflowError) as err:
            raise ConfigError(f"tokens are {shown(tokens)}, expected a list of token ids") from err
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ConfigError(f"tokens have shape {list(ids.shape)} and type {ids.dtype}, expected a list of token ids")
        foreign = ids[(ids < 0) | (ids >= n_vocab)] if ids.size else ids
        if foreign.size:
            raise ConfigError(f"token id {foreign[0]} is not in the vocabulary, expected 0 to {n_vocab - 1}")
        return [int(token) for token in ids]

    def _start(
        self,
        tokens: list[int],
        *,
        n_keep: int,
        max_tokens: int | None,
        stop: str | Sequence[str] | None,
        grammar: str | None,
        sampling: Mapping[str, Any],
    ) -> TextStream:
        backend = self._backend()
        check_fits(len(tokens), n_keep, backend.info.n_ctx)
        check_max_tokens(max_tokens)
        words = checked_stop(stop)
        params = with_overrides(self._defaults, **sampling)
        if sampling["seed"] is None:
            params = replace(params, seed=secrets.randbelow(MAX_SEED) if self._seed is None else self._seed)
        params = replace(params, grammar=grammar)
        backend.sampler(params, ()).close()  # a grammar that does not parse is told before anything changes
        self._calls += 1
        own_call = self._calls

        def check_owner() -> None:
            if self._calls != own_call:
                raise BackendError(
                    "the model was used by another call while this stream was being read; start it again"
                )

        def pieces() -> Iterator[str | Completion]:
            if n_keep == 0:
                backend.reset()
            yield from generate(backend, tokens, params, max_tokens=max_tokens, stop=words, check_owner=check_owner)

        return TextStream(self._locked(pieces(), check_owner))

    def _locked(
        self, pieces: Iterator[str | Completion], check_owner: Callable[[], None]
    ) -> Iterator[str | Completion]:
        """The same items, each computed while this model's lock is held."""
        while True:
            with self._lock:
                check_owner()
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece


def _utf8(text: str | bytes) -> bytes:
    if not isinstance(text, str | bytes):
        raise ConfigError(f"the text is {shown(text)}, expected str or bytes")
    if isinstance(text, bytes):
        return text.decode("utf-8", errors="replace").encode("utf-8")
    return text.encode("utf-8", errors="replace")  # lone surrogates
