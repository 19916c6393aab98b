"""The check of a GGUF file's tokenizer: what llama.cpp asserts on, and what would garble text in silence."""

from __future__ import annotations

import math
from typing import NoReturn

from melt_edge.errors import ConfigError, FormatError
from melt_edge.runtime.gguf_file import GGUFInfo
from melt_edge.runtime.gguf_keys import MAX_TOKEN_CHARS, PRE_TOKENIZERS, TOKEN_TYPES

_TOKENS = "tokenizer.ggml.tokens"
_TYPES = "tokenizer.ggml.token_type"
_NORMAL = 1
# GPT-2's byte alphabet: the printable bytes stand for themselves, the 68 others for U+0100 and up.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_ALPHABET = frozenset(map(chr, _PRINTABLE)) | frozenset(chr(0x100 + i) for i in range(256 - len(_PRINTABLE)))


def check_vocabulary(info: GGUFInfo, n_vocab: int) -> None:
    """Tokens, merges and special ids of a byte-level BPE tokenizer; the keys' types are checked before.

    Raises: FormatError if a table is damaged; ConfigError for an id or a pre-tokenizer it cannot have.
    """
    meta = info.metadata
    pre = meta["tokenizer.ggml.pre"]
    if pre not in PRE_TOKENIZERS:
        raise ConfigError(
            f"{info.path}: key 'tokenizer.ggml.pre' is {pre!r}, expected one of {', '.join(PRE_TOKENIZERS)}"
        )
    tokens = _texts(info, _TOKENS)
    _check_tokens(info, tokens)
    _check_merges(info, set(tokens))
    for key, value in meta.items():
        if key.endswith("_token_id") and isinstance(value, int) and value >= n_vocab:
            raise ConfigError(f"{info.path}: key {key!r} is {value}, expected a token id below {n_vocab}")
    # llama.cpp takes token 11 where a byte-level vocabulary names no bos.
    bos = "tokenizer.ggml.bos_token_id"
    if meta.get("tokenizer.ggml.add_bos_token", PRE_TOKENIZERS[str(pre)]) and bos not in meta:
        _fail(info, bos, "is missing, and the tokenizer puts that token before every prompt")


def _check_tokens(info: GGUFInfo, tokens: list[str]) -> None:
    if len(set(tokens)) != len(tokens):
        seen: set[str] = set()
        twice = next(i for i, token in enumerate(tokens) if token in seen or seen.add(token))  # type: ignore[func-returns-value]
        _fail(info, _TOKENS, f"has the token {tokens[twice]!r} twice (second time at {twice})")
    types = info.metadata[_TYPES]
    assert isinstance(types, list)  # by its KeyRule
    for key in (_TYPES, "tokenizer.ggml.scores"):
        values = info.metadata.get(key)
        if isinstance(values, list) and len(values) != len(tokens):
            _fail(info, key, f"has {len(values)} items, expected one for each of the {len(tokens)} tokens")
    unknown = next((kind for kind in types if kind not in TOKEN_TYPES), None)
    if unknown is not None:
        _fail(info, _TYPES, f"has the type {unknown}, expected {TOKEN_TYPES[0]} to {TOKEN_TYPES[-1]}")
    for score in info.metadata.get("tokenizer.ggml.scores", ()):  # type: ignore[union-attr]
        if not math.isfinite(score):  # type: ignore[arg-type]
            _fail(info, "tokenizer.ggml.scores", f"has the value {score}, expected finite numbers")
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if not token:
            _fail(info, _TOKENS, f"has an empty text for token {i}")
        if len(token) > MAX_TOKEN_CHARS:
            _fail(info, _TOKENS, f"has a token of {len(token)} characters at {i}, expected {MAX_TOKEN_CHARS}")
        # Elsewhere llama.cpp writes the whole token once per unknown character into the text.
        if kind == _NORMAL and not BYTE_ALPHABET.issuperset(token):
            _fail(info, _TOKENS, f"has {token!r} at {i}, which is outside the byte-level alphabet and not marked so")


def _check_merges(info: GGUFInfo, tokens: set[str]) -> None:
    key = "tokenizer.ggml.merges"
    for i, merge in enumerate(_texts(info, key)):
        left, _, right = merge.partition(" ")
        if left not in tokens or right not in tokens or left + right not in tokens:
            _fail(info, key, f"has {merge!r} at {i}, expected two tokens that join to a third, with a space between")


def _texts(info: GGUFInfo, key: str) -> list[str]:
    value = info.metadata[key]
    assert isinstance(value, list)  # by its KeyRule
    return [text for text in value if isinstance(text, str)]


def _fail(info: GGUFInfo, key: str, message: str) -> NoReturn:
    raise FormatError(f"{info.path}: key {key!r} {message}; the file is damaged, fetch or export it again")
