"""The bindings' Llama class, with the three things its constructor cannot be told.

Tensors are checked, flash attention can be left to the library, and the file's chat template is neither
compiled nor rendered in this process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from melt_edge.runtime.library import import_llama_cpp

Render = Callable[[Sequence[Mapping[str, Any]]], str]


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
