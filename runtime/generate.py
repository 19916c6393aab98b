"""The generation loop: prompt, then one token at a time, as text that can be shown.

Knows no backend's arithmetic; works on anything that meets base.Backend.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

from melt_edge.errors import BackendError, ConfigError, ContextOverflowError
from melt_edge.runtime.base import Backend, Completion, FinishReason, SamplingParams, Timings
from melt_edge.runtime.text import TextSplitter, shown


class TextStream(Iterator[str]):
    """Iterates over the text pieces of a generation; ``completion`` is there once it has ended.

    The pieces joined are ``completion.text``. No piece splits a character or shows part of a stop string.
    """

    def __init__(self, pieces: Iterator[str | Completion]) -> None:
        self._pieces = pieces
        self._completion: Completion | None = None

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> str:
        if self._completion is not None:
            raise StopIteration
        piece = next(self._pieces)
        if isinstance(piece, Completion):
            self._completion = piece
            raise StopIteration
        return piece

    @property
    def completion(self) -> Completion:
        """The finished generation. Raises: BackendError while the stream has not ended."""
        if self._completion is None:
            raise BackendError("the stream has not ended yet; read it to its end before asking for its completion")
        return self._completion

    def result(self) -> Completion:
        """Read the stream to its end and return its completion."""
        for _ in self:
            pass
        return self.completion


def check_fits(n_new: int, n_cached: int, n_ctx: int) -> None:
    """Raises: ConfigError for no tokens at all, ContextOverflowError if they are more than the room left."""
    if n_new == 0:
        raise ConfigError("the prompt has no tokens; give at least one")
    if n_cached + n_new > n_ctx:
        cached = f" after the {n_cached} in the cache" if n_cached else ""
        raise ContextOverflowError(
            f"the prompt has {n_new} tokens{cached}, the context has room for {n_ctx}; "
            "shorten it or load the model with a larger n_ctx"
        )


def check_text_fits(text: str, max_token_bytes: int, n_room: int) -> None:
    """Raises: ContextOverflowError for a text that cannot fit, however it is cut into tokens.

    Cheap, and comes before tokenising, which takes seconds for megabytes.
    """
    n_least = -(-len(text) // max_token_bytes)
    if n_least > n_room:
        raise ContextOverflowError(
            f"the prompt has {len(text)} characters, at least {n_least} tokens, the context has room for {n_room}; "
            "shorten it or load the model with a larger n_ctx"
        )


def check_max_tokens(max_tokens: int | None) -> None:
    """Raises: ConfigError unless max_tokens is None or a whole number from 0."""
    if max_tokens is None:
        return
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 0:
        raise ConfigError(f"max_tokens is {shown(max_tokens)}, expected a whole number from 0, or None for no limit")


def generate(
    backend: Backend,
    tokens: Sequence[int],
    params: SamplingParams,
    *,
    max_tokens: int | None,
    stop: Sequence[str],
    check_owner: Callable[[], None],
) -> Iterator[str | Completion]:
    """Append ``tokens`` to the cache and generate: text pieces, then the Completion.

    check_owner: raises if somebody else has used the model since the last piece.
    The last sampled token is not evaluated; the cache holds everything before it.
    Units: rates in tokens per second of wall-clock time, measured around evaluation and sampling alone.
    """
    splitter = TextSplitter(stop)
    history = [*backend.tokens, *tokens]
    generated: list[int] = []
    shown: list[str] = []
    reason: FinishReason = "length"
    prompt_s = decode_s = 0.0
    n_decoded = 0
    with closing(backend.sampler(params, history)) as sampler:
        start = time.perf_counter()
        backend.eval(tokens)
        prompt_s = time.perf_counter() - start
        native_before = backend.native_s
        while max_tokens is None or len(generated) < max_tokens:
            start = time.perf_counter()
            token = sampler.sample(backend.last_logits())
            decode_s += time.perf_counter() - start
            if backend.is_eog(token):
                reason = "stop"
                break
            generated.append(token)
            text = splitter.feed(backend.token_bytes(token, special=False))
            if text:
                shown.append(text)
                yield text
                check_owner()
            if splitter.stopped:
                reason = "stop"
                break
            if len(generated) == max_tokens or backend.n_tokens >= backend.info.n_ctx:
                break
            start = time.perf_counter()
            backend.eval([token])
            decode_s += time.perf_counter() - start
            n_decoded += 1
        native_after = backend.native_s
    overhead = None
    if native_before is not None and native_after is not None and n_decoded:
        overhead = 1.0 - (native_after - native_before) / decode_s
    text = splitter.finish()
    if splitter.stopped:
        reason = "stop"
    if text:
        shown.append(text)
        yield text
    timings = Timings(
        prompt_tokens=len(tokens),
        prompt_tps=_rate(len(tokens), prompt_s),
        decode_tokens=n_decoded,
        decode_tps=_rate(n_decoded, decode_s),
        decode_overhead=overhead,
    )
    yield Completion(text="".join(shown), tokens=generated, finish_reason=reason, timings=timings)


def _rate(n_tokens: int, seconds: float) -> float:
    return n_tokens / seconds if n_tokens and seconds > 0.0 else 0.0
