"""The sizes of the published models by name, so that memory can be measured without their weights."""

from __future__ import annotations

from typing import Any

from melt_edge.config import LoopConfig
from melt_edge.errors import ConfigError

_OURO_1_4B: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "intermediate_size": 5632,
    "vocab_size": 49152,
}
SHAPES: dict[str, dict[str, Any]] = {
    "ouro-1.4b": _OURO_1_4B,
    "ouro-2.6b": {**_OURO_1_4B, "num_hidden_layers": 48},
    # two narrow layers, to try a command or a script in seconds
    "tiny": {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 256,
        "vocab_size": 512,
    },
}


def shape_config(name: str, model_type: str) -> LoopConfig:
    """The configuration of a named shape; as "melt" it has the gates, which ouro-1.4b takes to 1.6 B parameters.

    Raises: ConfigError for a name that is none.
    """
    if name not in SHAPES:
        raise ConfigError(f"shape is {name!r}, expected one of {', '.join(SHAPES)}")
    gate = "elementwise" if model_type == "melt" else "none"
    return LoopConfig(model_type=model_type, num_loops=4, kv_gate=gate, **SHAPES[name])
