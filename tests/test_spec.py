"""The tensor table: the reference model's own tensors, and a report of every gap at once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from melt_edge.config import LoopConfig
from melt_edge.errors import SpecError
from melt_edge.modeling import LoopLM
from melt_edge.spec import MAX_GAPS_SHOWN, tensor_specs, validate
from tiny import configs, tiny_config

Found = dict[str, tuple[str, tuple[int, ...]]]


def found_of(config: LoopConfig) -> Found:
    return {name: ("F32", spec.shape) for name, spec in tensor_specs(config).items()}


@settings(max_examples=50, deadline=None)
@given(configs())
def test_spec_is_the_reference_models_state(config: LoopConfig) -> None:
    state = {name: tuple(t.shape) for name, t in LoopLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert {name: spec.shape for name, spec in tensor_specs(config).items()} == state


def test_all_gaps_are_reported_at_once() -> None:
    config = tiny_config("melt")
    found = found_of(config)
    del found["model.norm.weight"]
    del found["model.early_exit_gate.bias"]
    found["model.layers.9.mlp.up_proj.weight"] = ("F32", (1, 1))
    found["lm_head.weight"] = ("F32", (7, 64))
    found["model.embed_tokens.weight"] = ("I8", (301, 64))
    with pytest.raises(SpecError) as caught:
        validate(config, found, source="there")
    message = str(caught.value)
    assert message.startswith("there: 5 tensor(s)")
    for words in (
        "model.norm.weight: missing, expected shape [64]",
        "model.early_exit_gate.bias: missing",
        "model.layers.9.mlp.up_proj.weight: not a tensor",
        "lm_head.weight: shape [7, 64], expected [301, 64]",
        "model.embed_tokens.weight: dtype I8, expected one of F32, F16, BF16",
    ):
        assert words in message


def test_half_a_gate_is_a_gap() -> None:
    config = tiny_config("melt")
    found = found_of(config)
    del found["model.layers.1.self_attn.kv_gate.h_proj.weight"]
    with pytest.raises(SpecError, match=r"h_proj\.weight: missing"):
        validate(config, found, source="there")
    with pytest.raises(SpecError, match=r"kv_gate\.x_proj\.weight: not a tensor"):
        validate(tiny_config("melt", kv_gate="none"), found_of(config), source="there")


def test_a_long_report_is_cut() -> None:
    with pytest.raises(SpecError) as caught:
        validate(tiny_config("melt", layers=10), {}, source="there")
    assert str(caught.value).count("\n") == MAX_GAPS_SHOWN + 1
    assert "more" in str(caught.value)
