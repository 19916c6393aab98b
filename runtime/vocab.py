"""Text on llama.cpp's vocabulary: tokens, bytes, chat prompts and samplers, the same for every backend."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from melt_edge.errors import BackendError, ConfigError
from melt_edge.runtime.base import SamplingParams
from melt_edge.runtime.gguf_file import GGUFInfo
from melt_edge.runtime.library import captured_log, import_llama_cpp, last_reason
from melt_edge.runtime.sampling import ChainSampler
from melt_edge.runtime.template import render_chat

MAX_TOKEN_BYTES = 2**20


class Vocabulary:
    """The tokenizer of a checked GGUF file, and what llama.cpp makes of it.

    The library's pointer belongs to whoever gave it and has to outlive this.
    """

    def __init__(self, pointer: Any, file: GGUFInfo) -> None:
        """pointer: llama_model_get_vocab's. Raises: BackendError if the library counts other tokens."""
        self._low = import_llama_cpp().llama_cpp
        self._pointer = pointer
        self._path: Path = file.path
        self.metadata: Mapping[str, Any] = file.metadata
        self.n_tokens = len(file.metadata["tokenizer.ggml.tokens"])  # type: ignore[arg-type]
        if self._low.llama_vocab_n_tokens(pointer) != self.n_tokens:
            raise BackendError(f"{file.path}: the library counts other tokens than the file has; export it again")

    @functools.cached_property
    def max_token_bytes(self) -> int:
        """A bound on the bytes of any token: a byte-level text never stands for more than its own length."""
        tokens = self.metadata["tokenizer.ggml.tokens"]
        assert isinstance(tokens, list)
        return max(len(str(token).encode("utf-8", "replace")) for token in tokens)

    @property
    def has_chat_template(self) -> bool:
        """True if the file brings a chat template."""
        return bool(self.metadata.get("tokenizer.chat_template"))

    def tokenize(self, text: bytes, *, add_special: bool, parse_special: bool) -> list[int]:
        """The token ids of UTF-8 bytes."""
        low, vocab = self._low, self._pointer
        # A first call without room returns minus the number of tokens.
        count = -low.llama_tokenize(vocab, text, len(text), None, 0, add_special, parse_special)
        if count <= 0:
            return []
        ids = (low.llama_token * count)()
        found = low.llama_tokenize(vocab, text, len(text), ids, count, add_special, parse_special)
        if found != count:
            raise BackendError(f"the library cut the same text into {count} and then {found} tokens")
        return list(ids)

    def token_bytes(self, token: int, *, special: bool) -> bytes:
        """The bytes of one token; control tokens are empty unless ``special``."""
        size = 64
        while size <= MAX_TOKEN_BYTES:
            buffer = ctypes.create_string_buffer(size)
            found = self._low.llama_token_to_piece(self._pointer, token, buffer, size, 0, special)
            if found >= 0:
                return buffer.raw[:found]
            size = -found
        raise BackendError(f"token {token} stands for more than {MAX_TOKEN_BYTES} bytes; export the file again")

    def is_eog(self, token: int) -> bool:
        """True for a token that ends a generation."""
        return bool(self._low.llama_vocab_is_eog(self._pointer, token))

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The prompt text of these messages by the file's own template.

        Raises: ConfigError if the file has none, or for messages of another shape; see template.render_chat.
        """
        template = self.metadata.get("tokenizer.chat_template")
        if not isinstance(template, str) or not template:
            raise ConfigError(
                f"{self._path}: has no chat template (key 'tokenizer.chat_template'); "
                "use generate, or export the file from a checkpoint that has one"
            )
        return render_chat(
            template,
            messages,
            bos_token=self._text(self._low.llama_vocab_bos(self._pointer)),
            eos_token=self._text(self._low.llama_vocab_eos(self._pointer)),
            add_generation_prompt=add_generation_prompt,
            source=str(self._path),
        )

    def sampler(self, params: SamplingParams, history: Sequence[int]) -> ChainSampler:
        """llama.cpp's chain for these parameters."""
        return ChainSampler(self._pointer, self.n_tokens, params, history)

    def _text(self, token: int) -> str:
        return self.token_bytes(token, special=True).decode("utf-8", errors="replace") if token >= 0 else ""


class VocabularyFile:
    """A checked GGUF file that holds a vocabulary and no weights, opened by llama.cpp for its text functions."""

    def __init__(self, file: GGUFInfo) -> None:
        """Raises: BackendError with the library's reason if it refuses the file."""
        self._low = low = import_llama_cpp().llama_cpp
        params = low.llama_model_default_params()
        params.vocab_only = True
        params.n_gpu_layers = 0
        with captured_log() as lines:
            self._model = low.llama_model_load_from_file(str(file.path).encode("utf-8"), params)
        if not self._model:
            raise BackendError(f"{file.path}: llama.cpp cannot load this vocabulary: {last_reason(lines)}")
        try:
            self.vocabulary = Vocabulary(low.llama_model_get_vocab(self._model), file)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Free the native vocabulary; may be called twice."""
        model, self._model = self._model, None
        if model:
            self._low.llama_model_free(model)

    def __del__(self) -> None:
        self.close()


class VocabularyText:
    """The text methods of base.Backend, for a backend that has a ``_vocab``."""

    _vocab: Vocabulary

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The file's own keys and values."""
        return self._vocab.metadata

    @property
    def max_token_bytes(self) -> int:
        """No token stands for more bytes than this."""
        return self._vocab.max_token_bytes

    @property
    def has_chat_template(self) -> bool:
        """True if the file brings a chat template."""
        return self._vocab.has_chat_template

    def tokenize(self, text: bytes, *, add_special: bool, parse_special: bool) -> list[int]:
        """The token ids of UTF-8 bytes."""
        return self._vocab.tokenize(text, add_special=add_special, parse_special=parse_special)

    def token_bytes(self, token: int, *, special: bool) -> bytes:
        """The bytes of one token; control tokens are empty unless ``special``."""
        return self._vocab.token_bytes(token, special=special)

    def is_eog(self, token: int) -> bool:
        """True for a token that ends a generation."""
        return self._vocab.is_eog(token)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The prompt text of these messages by the file's own template. Raises: as Vocabulary.render_chat."""
        return self._vocab.render_chat(messages, add_generation_prompt=add_generation_prompt)

    def sampler(self, params: SamplingParams, history: Sequence[int]) -> ChainSampler:
        """llama.cpp's chain for these parameters."""
        return self._vocab.sampler(params, history)
