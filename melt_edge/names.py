"""One table: checkpoint tensor name <-> GGUF tensor name.

The GGUF side uses llama.cpp's names for sandwich-norm models; each runtime's exporter reads from here.
"""

from __future__ import annotations

GLOBAL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "model.early_exit_gate.weight": "exit_gate.weight",
    "model.early_exit_gate.bias": "exit_gate.bias",
}

# Suffixes below model.layers.{i}. and blk.{i}. ; post_attention_layernorm is the norm BEFORE the
# feed-forward, the two *_2 norms close attention and feed-forward.
LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.kv_gate.x_proj.weight": "kv_gate_x.weight",
    "self_attn.kv_gate.x_proj.bias": "kv_gate_x.bias",
    "self_attn.kv_gate.h_proj.weight": "kv_gate_h.weight",
    "input_layernorm_2.weight": "post_attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "post_attention_layernorm_2.weight": "post_ffw_norm.weight",
}

_LAYER_NAMES_REVERSED = {gguf: checkpoint for checkpoint, gguf in LAYER_NAMES.items()}
_GLOBAL_NAMES_REVERSED = {gguf: checkpoint for checkpoint, gguf in GLOBAL_NAMES.items()}


def gguf_name(checkpoint_name: str) -> str:
    """The GGUF name of a checkpoint tensor. Raises: KeyError if neither architecture has it."""
    if checkpoint_name in GLOBAL_NAMES:
        return GLOBAL_NAMES[checkpoint_name]
    layer_idx, suffix = _split_layer(checkpoint_name, "model.layers.")
    return f"blk.{layer_idx}.{LAYER_NAMES[suffix]}"


def checkpoint_name(gguf_name: str) -> str:
    """The checkpoint name of a GGUF tensor. Raises: KeyError if neither architecture has it."""
    if gguf_name in _GLOBAL_NAMES_REVERSED:
        return _GLOBAL_NAMES_REVERSED[gguf_name]
    layer_idx, suffix = _split_layer(gguf_name, "blk.")
    return f"model.layers.{layer_idx}.{_LAYER_NAMES_REVERSED[suffix]}"


def _split_layer(name: str, prefix: str) -> tuple[int, str]:
    layer_idx, _, suffix = name.removeprefix(prefix).partition(".")
    if not name.startswith(prefix) or not layer_idx.isascii() or not layer_idx.isdigit():
        raise KeyError(name)
    return int(layer_idx), suffix
