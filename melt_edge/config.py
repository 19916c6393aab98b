"""LoopConfig: the keys of a checkpoint's config.json as one validated dataclass.

The only place that knows Hugging Face key names; reads no tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from melt_edge.errors import ConfigError

ARCHITECTURES = ("ouro", "melt")
KV_GATES = ("elementwise", "none")
KV_GATE_INITS = ("zeros", "input")
MAX_LOOPS = 64
# llama.cpp's LLAMA_MAX_LAYERS: Ouro takes one of its layer slots per (loop, layer).
MAX_SLOTS = 512
# key -> (lowest, highest). The check of a GGUF file takes them from here. At most six digits each, so that
# a value between them is still between them as a float32; and inside those of cpp/src/looped-keys.cpp, which
# compares a file's float32 with 1e-12, 1e30 and 1e-6 to the last bit.
REAL_LIMITS = {
    "rms_norm_eps": (1e-11, 0.099),
    "rope_theta": (1.001, 1e29),
    "early_exit_threshold": (1e-5, 1.0),
}
# The chunk the MELT paper trains with (arXiv 2605.07721); a file without one gets it.
DEFAULT_CHUNK_SIZE = 500


@dataclass(frozen=True)
class LoopConfig:
    """One looped transformer: sizes, loops, and how its KV cache is shared.

    Field names are those of the checkpoint's config.json, but for ``num_loops`` (its
    ``total_ut_steps``). ``kv_gate``, ``kv_gate_init`` and ``chunk_size`` matter for "melt" alone.

    Raises: ConfigError for a value outside what the runtimes support.
    """

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    num_loops: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_position_embeddings: int = 65536
    tie_word_embeddings: bool = False
    early_exit_threshold: float = 1.0
    hidden_act: str = "silu"
    torch_dtype: str = "float32"
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    kv_gate: str = "none"
    kv_gate_init: str = "zeros"
    chunk_size: int = DEFAULT_CHUNK_SIZE

    def __post_init__(self) -> None:
        _require(self.model_type in ARCHITECTURES, "model_type", self.model_type, " or ".join(ARCHITECTURES))
        for key in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "intermediate_size",
            "vocab_size",
            "max_position_embeddings",
            "chunk_size",
        ):
            value = getattr(self, key)
            _require(_is_int(value) and 1 <= value < 2**31, key, value, "an integer from 1 to 2147483647")
        _require(
            _is_int(self.num_loops) and 1 <= self.num_loops <= MAX_LOOPS,
            "total_ut_steps",
            self.num_loops,
            f"1 to {MAX_LOOPS} loops",
        )
        _require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number (rotary pairs)")
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_key_value_heads",
            self.num_key_value_heads,
            f"a divisor of num_attention_heads = {self.num_attention_heads}",
        )
        _require(
            self.cache_slots <= MAX_SLOTS,
            "num_hidden_layers",
            self.num_hidden_layers,
            f"at most {MAX_SLOTS} cache slots in all (found {self.cache_slots})",
        )
        for key, (low, high) in REAL_LIMITS.items():
            value = getattr(self, key)
            _require(_is_real(value) and low <= value <= high, key, value, f"a number from {low:g} to {high:g}")
        _require(self.hidden_act == "silu", "hidden_act", self.hidden_act, "silu")
        _require(self.kv_gate in KV_GATES, "kv_gate", self.kv_gate, " or ".join(KV_GATES))
        _require(self.kv_gate_init in KV_GATE_INITS, "kv_gate_init", self.kv_gate_init, " or ".join(KV_GATE_INITS))
        _require(
            isinstance(self.tie_word_embeddings, bool),
            "tie_word_embeddings",
            self.tie_word_embeddings,
            "true or false",
        )
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, key)
            _require(
                value is None or (_is_int(value) and 0 <= value < self.vocab_size),
                key,
                value,
                f"null or a token id below vocab_size = {self.vocab_size}",
            )

    @property
    def shares_kv(self) -> bool:
        """True for MELT: one cache row per (token, layer), whatever the number of loops."""
        return self.model_type == "melt"

    @property
    def has_gate(self) -> bool:
        """True if the checkpoint carries kv_gate weights."""
        return self.shares_kv and self.kv_gate == "elementwise"

    @property
    def cache_slots(self) -> int:
        """K/V rows kept per token: N for MELT, N*T for Ouro."""
        return self.num_hidden_layers * (1 if self.shares_kv else self.num_loops)

    def kv_bytes_per_token(self, bytes_per_value: float) -> float:
        """Cache bytes per token for values of this size (2 for f16). Keys and values alike."""
        return self.cache_slots * 2 * self.num_key_value_heads * self.head_dim * bytes_per_value

    def with_loops(self, num_loops: int) -> LoopConfig:
        """The same model run with another number of loops."""
        return replace(self, num_loops=num_loops)

    def share_kv(self, chunk_size: int | None = None) -> LoopConfig:
        """This Ouro as a MELT without a gate: the last loop's row is kept, 1/T of the cache."""
        if self.shares_kv:
            raise ConfigError(f"model_type is {self.model_type!r}: its cache is shared already, drop --share-kv")
        return replace(self, model_type="melt", kv_gate="none", chunk_size=chunk_size or self.chunk_size)

    def to_dict(self) -> dict[str, Any]:
        """The config.json keys of this model, as Ouro's checkpoints name them."""
        keys = asdict(self)
        keys["total_ut_steps"] = keys.pop("num_loops")
        if not self.shares_kv:
            for key in ("kv_gate", "kv_gate_init", "chunk_size"):
                del keys[key]
        return keys

    @classmethod
    def from_dict(cls, keys: Mapping[str, Any], *, source: str = "config.json") -> LoopConfig:
        """The validated config of a parsed config.json.

        Raises: ConfigError naming the file, the key, what was found and what was expected.
        """
        try:
            return cls(**_fields_from_keys(keys))
        except ConfigError as err:
            raise ConfigError(f"{source}: {err}") from None

    @classmethod
    def from_file(cls, path: Path) -> LoopConfig:
        """The validated config of a config.json on disk.

        Raises: ConfigError if it is missing, no JSON object, or has unsupported values.
        """
        return cls.from_dict(read_json_object(path), source=str(path))


def read_json_object(path: Path, *, max_bytes: int = 64 * 2**20) -> dict[str, Any]:
    """The JSON object in a file. Raises: ConfigError if it is missing, too large or something else."""
    try:
        if path.stat().st_size > max_bytes:
            raise ConfigError(f"{path}: larger than {max_bytes} bytes, which no such file is")
        keys = json.loads(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise ConfigError(f"{path}: cannot be read ({err.strerror or err})") from err
    except (ValueError, RecursionError) as err:
        raise ConfigError(f"{path}: not valid JSON ({err})") from err
    if not isinstance(keys, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(keys).__name__}")
    return keys


def _fields_from_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key in (
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
        "total_ut_steps",
    ):
        if key not in keys:
            raise ConfigError(f"key {key!r} is missing")
        fields[key] = keys[key]
    fields["num_loops"] = fields.pop("total_ut_steps")
    fields["rope_theta"] = _rope_theta(keys)
    # Newer Hugging Face files write dtype for torch_dtype.
    if keys.get("dtype") is not None:
        fields["torch_dtype"] = keys["dtype"]
    for key in (
        "rms_norm_eps",
        "max_position_embeddings",
        "tie_word_embeddings",
        "early_exit_threshold",
        "hidden_act",
        "torch_dtype",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    ):
        if keys.get(key) is not None:
            fields[key] = keys[key]
    if isinstance(fields.get("eos_token_id"), list):  # several end tokens: the first is the model's own
        fields["eos_token_id"] = fields["eos_token_id"][0] if fields["eos_token_id"] else None
    heads = fields["num_attention_heads"]
    _require(_is_int(heads) and heads > 0, "num_attention_heads", heads, "an integer from 1 to 2147483647")
    _require(_is_int(fields["hidden_size"]), "hidden_size", fields["hidden_size"], "an integer")
    fields["num_key_value_heads"] = keys["num_key_value_heads"] if keys.get("num_key_value_heads") else heads
    fields["head_dim"] = keys["head_dim"] if keys.get("head_dim") else fields["hidden_size"] // heads
    if fields["model_type"] == "melt":
        if "kv_gate" not in keys:
            raise ConfigError("key 'kv_gate' is missing (expected elementwise or none)")
        fields["kv_gate"] = keys["kv_gate"]
        for key in ("kv_gate_init", "chunk_size"):
            if keys.get(key) is not None:
                fields[key] = keys[key]
    sliding = keys.get("use_sliding_window", False)
    _require(not sliding, "use_sliding_window", sliding, "false (full attention)")
    layer_types = keys.get("layer_types") or ["full_attention"]
    full = isinstance(layer_types, list) and all(kind == "full_attention" for kind in layer_types)
    _require(full, "layer_types", layer_types, "full_attention in every layer")
    return fields


def _rope_theta(keys: Mapping[str, Any]) -> Any:
    """The base of the rotary angles; newer Hugging Face files have it in rope_parameters."""
    theta, share = keys.get("rope_theta"), keys.get("partial_rotary_factor")
    for name in ("rope_parameters", "rope_scaling"):
        rope = keys.get(name) or {}
        _require(isinstance(rope, Mapping), name, rope, "null or an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        _require(kind == "default", name, kind, "no rope scaling")
        theta = rope.get("rope_theta", theta)
        share = rope.get("partial_rotary_factor", share)
    _require(share in (None, 1), "partial_rotary_factor", share, "1 (the whole head)")
    # No default: Hugging Face's is 10 000, the released checkpoints' is a million.
    if theta is None:
        raise ConfigError("key 'rope_theta' is missing")
    return theta


def _require(ok: bool, key: str, found: object, expected: str) -> None:
    if not ok:
        raise ConfigError(f"key {key!r} is {found!r:.80}, expected {expected}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
