"""LoopConfig: config.json keys in, the same keys out, and a sentence for every value it cannot take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from melt_edge.config import DEFAULT_CHUNK_SIZE, LoopConfig, read_json_object
from melt_edge.errors import ConfigError
from tiny import configs, tiny_config

OURO_1_4B: dict[str, Any] = {
    "architectures": ["OuroForCausalLM"],
    "model_type": "ouro",
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "intermediate_size": 5632,
    "vocab_size": 49152,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "max_position_embeddings": 65536,
    "tie_word_embeddings": False,
    "total_ut_steps": 4,
    "early_exit_threshold": 1.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 0,
    "use_sliding_window": False,
}


@settings(max_examples=100, deadline=None)
@given(configs())
def test_config_round_trips_through_json(config: LoopConfig) -> None:
    assert LoopConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_reads_a_released_ouro_config() -> None:
    config = LoopConfig.from_dict(OURO_1_4B)
    assert (config.num_loops, config.cache_slots, config.shares_kv, config.has_gate) == (4, 96, False, False)
    assert config.kv_bytes_per_token(2) == 786_432  # Ouro-1.4B in f16: 4 loops, 24 layers, 2048 wide
    assert config.share_kv().kv_bytes_per_token(2) == 196_608


def test_newer_spellings_of_the_same_keys() -> None:
    keys = {k: v for k, v in OURO_1_4B.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    keys |= {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "dtype": "float16", "eos_token_id": [2, 0]}
    config = LoopConfig.from_dict(keys)
    assert (config.rope_theta, config.torch_dtype, config.eos_token_id) == (5e5, "float16", 2)


def test_heads_and_head_size_have_defaults() -> None:
    keys = {k: v for k, v in OURO_1_4B.items() if k not in ("num_key_value_heads", "head_dim")}
    config = LoopConfig.from_dict(keys)
    assert (config.num_key_value_heads, config.head_dim) == (16, 128)


def test_share_kv_makes_a_melt_without_a_gate() -> None:
    shared = tiny_config("ouro").share_kv()
    assert (shared.model_type, shared.kv_gate, shared.chunk_size) == ("melt", "none", DEFAULT_CHUNK_SIZE)
    assert tiny_config("ouro").share_kv(7).chunk_size == 7
    with pytest.raises(ConfigError, match="shared already"):
        tiny_config("melt").share_kv()


def test_slots_grow_with_the_loops_of_ouro_alone() -> None:
    melt, ouro = tiny_config("melt"), tiny_config("ouro")
    assert {melt.with_loops(t).cache_slots for t in (1, 2, 4, 8)} == {2}
    assert [ouro.with_loops(t).cache_slots for t in (1, 2, 4, 8)] == [2, 4, 8, 16]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("hidden_size", 0),
        ("hidden_size", "64"),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 200),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 3),
        ("head_dim", 7),
        ("vocab_size", 2**31),
        ("total_ut_steps", 0),
        ("total_ut_steps", 65),
        ("total_ut_steps", True),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", 0.5),
        ("rope_theta", 1.0),
        ("rope_theta", "1e6"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4}),
        ("early_exit_threshold", 0),
        ("early_exit_threshold", 1.5),
        ("hidden_act", "gelu"),
        ("tie_word_embeddings", 1),
        ("eos_token_id", 49152),
        ("use_sliding_window", True),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("partial_rotary_factor", 0.5),
    ],
)
def test_unsupported_value_names_file_key_and_value(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        LoopConfig.from_dict({**OURO_1_4B, key: value}, source="there/config.json")
    message = str(caught.value)
    assert "there/config.json" in message
    assert repr(key) in message
    assert "expected" in message


def test_each_spelling_of_rope_scaling_is_refused() -> None:
    """A yarn in rope_scaling went unseen behind rope_parameters, and half-rotary heads ran as whole ones."""
    plain = {"rope_type": "default", "rope_theta": 5e5}
    for keys in (
        {"rope_parameters": plain, "rope_scaling": {"rope_type": "yarn", "factor": 4}},
        {"rope_parameters": {**plain, "partial_rotary_factor": 0.5}},
    ):
        with pytest.raises(ConfigError, match="expected"):
            LoopConfig.from_dict({**OURO_1_4B, **keys})


@pytest.mark.parametrize("key", ["model_type", "hidden_size", "vocab_size", "total_ut_steps", "rope_theta"])
def test_missing_key_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        LoopConfig.from_dict({k: v for k, v in OURO_1_4B.items() if k != key})


@pytest.mark.parametrize(("key", "value"), [("kv_gate", "scalar"), ("kv_gate_init", "ones"), ("chunk_size", 0)])
def test_unsupported_melt_value_is_named(key: str, value: object) -> None:
    keys = {**OURO_1_4B, "model_type": "melt", "kv_gate": "elementwise", key: value}
    with pytest.raises(ConfigError, match=key):
        LoopConfig.from_dict(keys)
    with pytest.raises(ConfigError, match="kv_gate"):
        LoopConfig.from_dict({**OURO_1_4B, "model_type": "melt"})


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"a": ' * 100_000, "\udcff"])
def test_a_file_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=r"config\.json"):
        LoopConfig.from_file(path)


def test_a_missing_or_oversized_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        LoopConfig.from_file(tmp_path / "config.json")
    (tmp_path / "big.json").write_text(json.dumps({"a": "x" * 100}))
    with pytest.raises(ConfigError, match="larger than"):
        read_json_object(tmp_path / "big.json", max_bytes=50)
