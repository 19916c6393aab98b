"""llama.cpp's sampler chain over a row of logits; checks every parameter before the library sees it.

Owns no sampling mathematics of its own.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from melt_edge.errors import BackendError, ConfigError
from melt_edge.runtime.base import FloatArray, SamplingParams
from melt_edge.runtime.grammar import check_grammar
from melt_edge.runtime.library import captured_log, import_llama_cpp, last_reason
from melt_edge.runtime.text import shown

MAX_SEED = 2**32 - 2  # the library takes 2**32 - 1 for "choose one yourself"

# What llama.cpp's converters write into a file, and the parameter it is the default of.
_FILE_KEYS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repeat_penalty",
    "general.sampling.penalty_last_n": "repeat_last_n",
}
# parameter -> (lowest, highest, whole number)
_RANGES = {
    "temperature": (0, 100, False),
    "top_k": (0, 2**31 - 1, True),
    "top_p": (0, 1, False),
    "min_p": (0, 1, False),
    "repeat_penalty": (0.01, 100, False),
    "repeat_last_n": (0, 2**16, True),
    "seed": (0, MAX_SEED, True),
}


def file_defaults(metadata: Mapping[str, Any], *, source: str) -> SamplingParams:
    """The file's own sampling defaults over llama.cpp's. Raises: ConfigError naming a key out of range."""
    params = SamplingParams()
    for key, name in _FILE_KEYS.items():
        if key in metadata:
            value = metadata[key]
            # llama.cpp writes -1 for "all" where 0 means the same to its samplers.
            if name in ("top_k", "repeat_last_n") and value == -1:
                value = 0
            if isinstance(value, float):  # 7 digits: 0.7, not its float32 neighbour
                value = float(f"{value:.7g}")
            params = _with(params, name, value, f"{source}: key {key!r}")
    return params


def with_overrides(params: SamplingParams, **given: Any) -> SamplingParams:
    """``params`` with the values of a call that are not None. Raises: ConfigError for one out of range."""
    for name, value in given.items():
        if value is not None:
            params = _with(params, name, value, name)
    return params


def checked_seed(seed: int | None) -> int | None:
    """A seed the library takes, or None. Raises: ConfigError for anything else."""
    if seed is not None:
        _with(SamplingParams(), "seed", seed, "seed")
    return seed


def grammar_text(grammar: str | None, json_schema: str | Mapping[str, Any] | None) -> str | None:
    """The GBNF grammar of a call, converted from a JSON schema if that is given.

    Raises: ConfigError if both are given, the schema cannot be converted, or the grammar is beyond the
        limits of grammar.check_grammar.
    """
    if grammar is not None and json_schema is not None:
        raise ConfigError("grammar and json_schema are both given; give one of them")
    if json_schema is not None:
        grammar_module = import_llama_cpp().llama_grammar
        try:
            text = json_schema if isinstance(json_schema, str) else json.dumps(json_schema)
            if not isinstance(json.loads(text), dict):
                raise ConfigError(f"json_schema is {text[:80]!r}, expected a JSON object")
            grammar = grammar_module.json_schema_to_gbnf(text)
        except ConfigError:
            raise
        except Exception as err:  # the converter raises whatever its walk stumbles over
            raise ConfigError(f"json_schema cannot be turned into a grammar ({type(err).__name__}: {err})") from err
    return None if grammar is None else check_grammar(grammar)


def grammar_sampler(vocab: Any, grammar: str) -> Any:
    """llama.cpp's sampler of a grammar, to be freed by the caller. Raises: ConfigError if it does not parse."""
    low = import_llama_cpp().llama_cpp
    with captured_log() as lines:
        sampler = low.llama_sampler_init_grammar(vocab, check_grammar(grammar).encode("utf-8"), b"root")
    if not sampler:
        raise ConfigError(f"grammar cannot be parsed ({last_reason(lines)}); expected GBNF with a rule named root")
    return sampler


class Candidates:
    """A vocabulary's logits, as llama.cpp's samplers take and change them."""

    def __init__(self, n_vocab: int) -> None:
        self._low = import_llama_cpp().llama_cpp
        self._ids = np.arange(n_vocab, dtype=np.intc)
        dtype = np.dtype([("id", np.intc), ("logit", np.single), ("p", np.single)], align=True)
        self._items = np.zeros(n_vocab, dtype=dtype)

    def fill(self, logits: FloatArray) -> None:
        """Start from a row of logits [n_vocab]. Raises: BackendError if they are not finite."""
        if not np.isfinite(logits).all():
            raise BackendError(
                "the model computed logits that are not finite; the file is damaged or "
                "the number of loops is far from the trained one"
            )
        self._items["id"] = self._ids
        self._items["logit"] = logits
        self._items["p"] = 0.0

    def allows(self, grammar: Any, token: int, logits: FloatArray) -> bool:
        """True if a grammar's sampler takes this token next; what was filled in is lost."""
        self._items[0] = (token, logits[token], 0.0)
        self._low.llama_sampler_apply(grammar, ctypes.byref(self._array(1)))
        return bool(np.isfinite(self._items["logit"][0]))

    def restrict(self, grammar: Any) -> None:
        """Leave only what a grammar's sampler takes. Raises: BackendError if that is nothing."""
        self._low.llama_sampler_apply(grammar, ctypes.byref(self._array(len(self._items))))
        # A draw from nothing would be accepted by the chain and then abort in the grammar.
        if not np.isfinite(self._items["logit"]).any():
            raise BackendError("the grammar allows no token of this model's vocabulary at this place; check its rules")

    def draw(self, chain: Any) -> int:
        """The token a chain chooses. Raises: BackendError if it chooses none, or one that was ruled out."""
        array = self._array(len(self._items))
        self._low.llama_sampler_apply(chain, ctypes.byref(array))
        if not 0 <= array.selected < array.size or not math.isfinite(array.data[array.selected].logit):
            raise BackendError("the sampler chose no token; the model's logits or the sampling values are unusable")
        return int(array.data[array.selected].id)

    def _array(self, size: int) -> Any:
        data = self._items.ctypes.data_as(self._low.llama_token_data_p)
        return self._low.llama_token_data_array(data=data, size=size, selected=-1, sorted=False)


class ChainSampler:
    """llama.cpp's chain: penalties, top_k, top_p, min_p, temperature, draw; a grammar beside it.

    As llama.cpp's own programs do, a token is drawn without the grammar first and only drawn again under
    it when the grammar refuses that token: testing one token is cheap, testing a vocabulary is not.
    """

    def __init__(self, vocab: Any, n_vocab: int, params: SamplingParams, history: Sequence[int]) -> None:
        """vocab: the library's vocabulary pointer. Raises: ConfigError for a grammar that does not parse."""
        self._low = import_llama_cpp().llama_cpp
        self._chain: Any = None
        self._grammar: Any = None
        self._candidates = Candidates(n_vocab)
        try:
            if params.grammar is not None:
                self._grammar = grammar_sampler(vocab, params.grammar)
            self._chain = self._build_chain(n_vocab, params)
        except BaseException:
            self.close()
            raise
        for token in history[-params.repeat_last_n :] if params.repeat_last_n else ():
            self._low.llama_sampler_accept(self._chain, token)

    def sample(self, logits: FloatArray) -> int:
        """The next token. Raises: BackendError if the logits are broken or the grammar leaves no token."""
        self._candidates.fill(logits)
        token = self._candidates.draw(self._chain)
        if self._grammar is not None and not self._candidates.allows(self._grammar, token, logits):
            self._candidates.fill(logits)
            self._candidates.restrict(self._grammar)
            token = self._candidates.draw(self._chain)
        self._low.llama_sampler_accept(self._chain, token)
        if self._grammar is not None:
            self._low.llama_sampler_accept(self._grammar, token)
        return token

    def close(self) -> None:
        """Free the native samplers; may be called twice."""
        chain, self._chain = self._chain, None
        grammar, self._grammar = self._grammar, None
        for sampler in (chain, grammar):
            if sampler is not None:
                self._low.llama_sampler_free(sampler)

    def __del__(self) -> None:
        self.close()

    def _build_chain(self, n_vocab: int, params: SamplingParams) -> Any:
        low = self._low
        chain = low.llama_sampler_chain_init(low.llama_sampler_chain_default_params())
        if params.repeat_penalty != 1.0 and params.repeat_last_n > 0:
            window, penalty = params.repeat_last_n, params.repeat_penalty
            low.llama_sampler_chain_add(chain, low.llama_sampler_init_penalties(n_vocab, window, penalty, 0.0, 0.0))
        if params.temperature == 0.0:
            low.llama_sampler_chain_add(chain, low.llama_sampler_init_greedy())
            return chain
        low.llama_sampler_chain_add(chain, low.llama_sampler_init_top_k(params.top_k))
        low.llama_sampler_chain_add(chain, low.llama_sampler_init_top_p(params.top_p, 1))
        low.llama_sampler_chain_add(chain, low.llama_sampler_init_min_p(params.min_p, 1))
        low.llama_sampler_chain_add(chain, low.llama_sampler_init_temp(params.temperature))
        low.llama_sampler_chain_add(chain, low.llama_sampler_init_dist(params.seed))
        return chain


def _with(params: SamplingParams, name: str, value: Any, what: str) -> SamplingParams:
    if name == "grammar":
        return replace(params, grammar=value)
    assert name in {field.name for field in fields(SamplingParams)}
    low, high, whole = _RANGES[name]
    kinds = (int,) if whole else (int, float)
    ok = isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high
    if not ok:
        kind = "a whole number" if whole else "a number"
        raise ConfigError(f"{what} is {shown(value)}, expected {kind} from {low} to {high}")
    checked: dict[str, Any] = {name: value if whole else float(value)}
    return replace(params, **checked)
