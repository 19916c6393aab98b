"""The table of tensor names is a bijection over everything either architecture has."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from melt_edge.config import LoopConfig
from melt_edge.names import checkpoint_name, gguf_name
from melt_edge.spec import tensor_specs
from tiny import configs, tiny_config


@settings(max_examples=50, deadline=None)
@given(configs())
def test_names_are_a_bijection(config: LoopConfig) -> None:
    names = list(tensor_specs(config))
    translated = [gguf_name(name) for name in names]
    assert len(set(translated)) == len(names)
    assert [checkpoint_name(name) for name in translated] == names


def test_the_sandwich_norms_are_not_mixed_up() -> None:
    at = "model.layers.7."
    assert gguf_name(at + "input_layernorm.weight") == "blk.7.attn_norm.weight"
    assert gguf_name(at + "input_layernorm_2.weight") == "blk.7.post_attention_norm.weight"
    assert gguf_name(at + "post_attention_layernorm.weight") == "blk.7.ffn_norm.weight"
    assert gguf_name(at + "post_attention_layernorm_2.weight") == "blk.7.post_ffw_norm.weight"


def test_gate_names_are_those_of_the_file_format() -> None:
    names = {gguf_name(n) for n in tensor_specs(tiny_config("melt", layers=1)) if "kv_gate" in n or "exit" in n}
    assert names == {
        "blk.0.kv_gate_x.weight",
        "blk.0.kv_gate_x.bias",
        "blk.0.kv_gate_h.weight",
        "exit_gate.weight",
        "exit_gate.bias",
    }


@pytest.mark.parametrize(
    "name", ["", "model.layers.x.input_layernorm.weight", "model.layers.1.nothing", "blk.-1.attn_q"]
)
def test_unknown_names_are_key_errors(name: str) -> None:
    with pytest.raises(KeyError):
        gguf_name(name)
    with pytest.raises(KeyError):
        checkpoint_name(name)
