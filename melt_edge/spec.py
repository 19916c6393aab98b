"""Every tensor an architecture has: name, shape, role; and the check of a checkpoint against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from melt_edge.config import LoopConfig
from melt_edge.errors import SpecError

CHECKPOINT_DTYPES = ("F32", "F16", "BF16")
# A report of every gap of a wrong 48-layer checkpoint would scroll the cause away.
MAX_GAPS_SHOWN = 40


@dataclass(frozen=True)
class TensorSpec:
    """A tensor the configuration asks for.

    role: "embedding" | "head" | "matrix" | "norm" | "gate" (matrix of the KV gate) | "bias" | "exit".
    """

    name: str
    shape: tuple[int, ...]
    role: str


def tensor_specs(config: LoopConfig) -> dict[str, TensorSpec]:
    """All tensors of a checkpoint with this configuration, in the order of a token's path.

    Shapes: as stored by torch, [out, in].
    """
    d, ff = config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    specs = [TensorSpec("model.embed_tokens.weight", (config.vocab_size, d), "embedding")]
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}."
        specs.append(TensorSpec(at + "input_layernorm.weight", (d,), "norm"))
        if config.has_gate:
            specs += [
                TensorSpec(at + "self_attn.kv_gate.x_proj.weight", (d, d), "gate"),
                TensorSpec(at + "self_attn.kv_gate.x_proj.bias", (d,), "bias"),
                TensorSpec(at + "self_attn.kv_gate.h_proj.weight", (d, d), "gate"),
            ]
        specs += [
            TensorSpec(at + "self_attn.q_proj.weight", (q, d), "matrix"),
            TensorSpec(at + "self_attn.k_proj.weight", (kv, d), "matrix"),
            TensorSpec(at + "self_attn.v_proj.weight", (kv, d), "matrix"),
            TensorSpec(at + "self_attn.o_proj.weight", (d, q), "matrix"),
            TensorSpec(at + "input_layernorm_2.weight", (d,), "norm"),
            TensorSpec(at + "post_attention_layernorm.weight", (d,), "norm"),
            TensorSpec(at + "mlp.gate_proj.weight", (ff, d), "matrix"),
            TensorSpec(at + "mlp.up_proj.weight", (ff, d), "matrix"),
            TensorSpec(at + "mlp.down_proj.weight", (d, ff), "matrix"),
            TensorSpec(at + "post_attention_layernorm_2.weight", (d,), "norm"),
        ]
    specs.append(TensorSpec("model.norm.weight", (d,), "norm"))
    specs.append(TensorSpec("model.early_exit_gate.weight", (1, d), "exit"))
    specs.append(TensorSpec("model.early_exit_gate.bias", (1,), "bias"))
    if not config.tie_word_embeddings:
        specs.append(TensorSpec("lm_head.weight", (config.vocab_size, d), "head"))
    return {spec.name: spec for spec in specs}


def validate(config: LoopConfig, found: Mapping[str, tuple[str, tuple[int, ...]]], *, source: str) -> None:
    """Check every tensor's name, shape and dtype against the configuration.

    found: tensor name -> (safetensors dtype, shape).
    Raises: SpecError that lists every missing, surplus and misshapen tensor at once.
    """
    specs = tensor_specs(config)
    gaps = [f"{name}: missing, expected shape {list(spec.shape)}" for name, spec in specs.items() if name not in found]
    for name, (dtype, shape) in found.items():
        if name not in specs:
            gaps.append(f"{name}: not a tensor of {config.model_type} with this configuration")
            continue
        if shape != specs[name].shape:
            gaps.append(f"{name}: shape {list(shape)}, expected {list(specs[name].shape)}")
        if dtype not in CHECKPOINT_DTYPES:
            gaps.append(f"{name}: dtype {dtype}, expected one of {', '.join(CHECKPOINT_DTYPES)}")
    if gaps:
        shown = gaps[:MAX_GAPS_SHOWN]
        if len(gaps) > len(shown):
            shown.append(f"... and {len(gaps) - len(shown)} more")
        raise SpecError(f"{source}: {len(gaps)} tensor(s) do not match config.json:\n  " + "\n  ".join(shown))
