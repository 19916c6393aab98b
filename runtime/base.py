"""What every backend gives and what a user gets back: protocols and plain data, no computation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Timings:
    """Wall-clock speed of one generation.

    Units: tokens and tokens per second. prompt: the tokens evaluated before the first new one (tokens
    that were in the cache already are not counted); decode: the tokens evaluated one at a time after it.
    A rate is 0.0 where nothing was evaluated. decode_overhead: the share of the decode time that was not spent
    inside the library that computes, sampling included; None where the backend does not measure it.
    """

    prompt_tokens: int
    prompt_tps: float
    decode_tokens: int
    decode_tps: float
    decode_overhead: float | None = None


@dataclass(frozen=True)
class Completion:
    """A finished generation.

    tokens: every generated token in order, without the end-of-generation token. finish_reason: "stop"
    for an end token or a stop string, "length" for max_tokens or a full context.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    timings: Timings


@dataclass(frozen=True)
class Memory:
    """Bytes held by a loaded model, as the library reports them; rss_bytes is the whole process's."""

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    rss_bytes: int


@dataclass(frozen=True)
class ModelInfo:
    """What a loaded model is and how it was loaded.

    num_loops, chunk_size: as used now; trained_*: as the file says. For ouro, whose results do not
    depend on chunks, chunk_size is the number of prompt tokens computed together and trained_chunk_size
    is None. quantisation: the most frequent type of the weight matrices, by bytes; an ONNX folder's precision.
    provider: onnxruntime's execution provider, None for a GGUF file. exit_threshold: as given to load.
    """

    architecture: str
    path: Path
    name: str
    n_params: int
    file_bytes: int
    num_loops: int
    trained_loops: int
    chunk_size: int
    trained_chunk_size: int | None
    kv_gate: str
    kv_gate_init: str
    n_ctx: int
    n_ctx_train: int
    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_embd: int
    n_vocab: int
    quantisation: str
    kv_type: str
    n_threads: int
    backend: str
    provider: str | None = None
    exit_threshold: float | None = None


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen; the values are llama.cpp's own defaults.

    temperature 0 is greedy. top_k 0, top_p 1, min_p 0 and repeat_penalty 1 switch the respective step
    off. repeat_penalty looks at the last ``repeat_last_n`` tokens, prompt included. grammar: GBNF text.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int = 0
    grammar: str | None = None


class Sampler(Protocol):
    """Chooses tokens; holds the random state, the penalty window and the grammar's position."""

    def sample(self, logits: FloatArray) -> int:
        """The next token for logits [n_vocab], accepted into the sampler's history."""

    def close(self) -> None:
        """Free the native sampler; may be called twice."""


class Backend(Protocol):
    """One loaded model and its one conversation cache.

    ``eval`` appends to the cache and is the only method of the generation loop that computes.
    """

    info: ModelInfo

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The file's own keys and values, GGUF names."""

    @property
    def max_token_bytes(self) -> int:
        """No token stands for more bytes than this."""

    @property
    def has_chat_template(self) -> bool:
        """True if the file brings a chat template."""

    @property
    def tokens(self) -> list[int]:
        """The tokens whose rows the cache holds, in order."""

    @property
    def n_tokens(self) -> int:
        """How many tokens the cache holds."""

    def tokenize(self, text: bytes, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of UTF-8 bytes; add_special begins them as the file says, parse_special reads <|...|>."""

    def token_bytes(self, token: int, *, special: bool) -> bytes:
        """The UTF-8 bytes a token stands for; control tokens are empty unless ``special``."""

    def is_eog(self, token: int) -> bool:
        """True for a token that ends a generation."""

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The prompt text of these messages by the file's own template."""

    @property
    def native_s(self) -> float | None:
        """Seconds spent inside the library that computes since loading; None where that is not measured."""

    def reset(self) -> None:
        """Empty the cache."""

    def eval(self, tokens: Sequence[int]) -> None:
        """Append tokens to the cache. A prompt is cut into chunks from its first token on."""

    def last_logits(self) -> FloatArray:
        """Logits [n_vocab] after the last evaluated token; overwritten by the next eval."""

    def logits(self, tokens: Sequence[int]) -> FloatArray:
        """Logits [n_tokens, n_vocab] from an empty cache, which holds the tokens afterwards."""

    def embed(self, tokens: Sequence[int]) -> FloatArray:
        """Normed last-loop outputs [n_tokens, n_embd] from an empty cache, which is empty afterwards."""

    def sampler(self, params: SamplingParams, history: Sequence[int]) -> Sampler:
        """A sampler whose penalty window starts with the tokens of ``history``."""

    def save_state(self, path: Path, *, force: bool) -> None:
        """Write the conversation to a checked container."""

    def load_state(self, path: Path) -> None:
        """Replace the conversation by a saved one; the live one is kept if that fails."""

    def memory(self) -> Memory:
        """Bytes held now."""

    def raw(self) -> Any:
        """The backend's own model object."""

    def close(self) -> None:
        """Free the model; may be called twice."""


@runtime_checkable
class EditsRows(Protocol):
    """A backend whose cache can be shortened, and lengthened without computing: benchmarks fill long contexts so."""

    def truncate(self, n_tokens: int) -> None:
        """Keep the first n_tokens of the cache."""

    def repeat_rows(self, n_tokens: int) -> None:
        """Write the cache's rows again and again until it holds n_tokens, which are more than it holds."""


@runtime_checkable
class TimesParts(Protocol):
    """A backend that can say where a token's time goes."""

    def time_parts(self, tokens: Sequence[int]) -> DoubleArray:
        """Mean seconds of a token [num_loops + 1, 3]: each loop, then what follows; attention, gates, all else.

        The first token is not timed. The cache holds what it held before.
        """
