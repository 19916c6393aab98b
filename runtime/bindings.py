"""The bindings' Llama class, with the three things its constructor cannot be told, and a careful sampler.

Tensors are checked, flash attention can be left to the library, and the file's chat template is neither
compiled nor rendered in this process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from melt_edge.runtime.library import import_llama_cpp
from melt_edge.runtime.sampling import Candidates, grammar_sampler

Render = Callable[[Sequence[Mapping[str, Any]]], str]


class GuardedSampler:
    """The bindings' sampler chain, with the grammar beside it and errors where the library would abort."""

    def __init__(self, chain: Any, vocab: Any, n_vocab: int, grammar: str | None) -> None:
        """chain: the bindings' LlamaSampler, closed with this. Raises: ConfigError as grammar_sampler."""
        self._low = import_llama_cpp().llama_cpp
        self._chain = chain
        self._n_vocab = n_vocab
        self._candidates = Candidates(n_vocab)
        self._grammar: Any = None
        if grammar is not None:
            self._grammar = grammar_sampler(vocab, grammar)

    def sample(self, context: Any, index: int = -1) -> int:
        """The next token. Raises: BackendError for broken logits, or if the grammar leaves no token."""
        low = self._low
        row = low.llama_get_logits_ith(context.ctx, index)
        self._candidates.fill(np.ctypeslib.as_array(row, shape=(self._n_vocab,)))
        if self._grammar is not None:
            self._candidates.restrict(self._grammar)
        token = self._candidates.draw(self._chain.sampler)
        low.llama_sampler_accept(self._chain.sampler, token)
        if self._grammar is not None:
            low.llama_sampler_accept(self._grammar, token)
        return token

    def close(self) -> None:
        """Free the native samplers; may be called twice."""
        grammar, self._grammar = self._grammar, None
        if grammar is not None:
            self._low.llama_sampler_free(grammar)
        self._chain.close()

    def __del__(self) -> None:
        self.close()


@functools.cache
def llama_class() -> Any:
    """llama_cpp.Llama with tensors checked, flash attention chosen by the library, and a safe template."""
    module = import_llama_cpp()
    chat_format = module.llama_chat_format

    class CheckedLlama(module.Llama):  # type: ignore[misc, name-defined]
        """The bindings' own class; what differs is only what its constructor cannot be told."""

        def __init__(self, path: str, render: Render, *, flash_attn_type: int, **options: Any) -> None:
            self._flash_attn_type = flash_attn_type

            def format_chat(*, messages: Sequence[Mapping[str, Any]], **ignored: Any) -> Any:
                prompt = render(messages)
                return chat_format.ChatFormatterResponse(prompt=prompt, stop=None, added_special=True)

            handler = chat_format.chat_formatter_to_chat_completion_handler(format_chat)
            super().__init__(path, chat_handler=handler, **options)

        @property
        def model_params(self) -> Any:
            return self._checked_model_params

        @model_params.setter
        def model_params(self, params: Any) -> None:
            params.check_tensors = True
            self._checked_model_params = params

        @property
        def context_params(self) -> Any:
            self._chosen_context_params.flash_attn_type = self._flash_attn_type
            return self._chosen_context_params

        @context_params.setter
        def context_params(self, params: Any) -> None:
            self._chosen_context_params = params

        def _init_sampler(self, *, grammar: Any = None, **options: Any) -> Any:
            text = None if grammar is None else grammar._grammar
            return GuardedSampler(super()._init_sampler(**options), self._model.vocab, self._n_vocab, text)

        @property
        def metadata(self) -> dict[str, str]:
            return self._plain_metadata

        @metadata.setter
        def metadata(self, metadata: dict[str, str]) -> None:
            # The constructor would compile the file's templates here, in this process.
            self._plain_metadata = {
                key: value for key, value in metadata.items() if not key.startswith("tokenizer.chat_template")
            }

    return CheckedLlama
