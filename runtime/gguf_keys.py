"""What an ouro or melt GGUF file may say: its metadata keys, tokenizers and tensor types, as tables.

Only declarations; gguf_check applies them. A key that llama.cpp would read and that is not here is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from melt_edge.config import KV_GATE_INITS, KV_GATES, MAX_LOOPS, MAX_SLOTS, REAL_LIMITS
from melt_edge.runtime.gguf_file import MetaValue

MAX_I32 = 2**31 - 1
MAX_TEMPLATE_BYTES = 2**20
MAX_TOKEN_CHARS = 1024


@dataclass(frozen=True)
class KeyRule:
    """The type a key's value has and the values it may take.

    type: as GGUFInfo.types, or "number" (any numeric scalar). low, high: inclusive. choices: all that is allowed.
    """

    type: str
    required: bool = False
    low: float | None = None
    high: float | None = None
    choices: tuple[MetaValue, ...] | None = None

    def in_range(self, value: float) -> bool:
        """True for a finite number from low to high; 7 digits count, so that a limit's float32 is the limit."""
        if isinstance(value, float):
            if not math.isfinite(value):
                return False
            value = float(f"{value:.7g}")
        return (self.low is None or self.low <= value) and (self.high is None or value <= self.high)

    @property
    def range_text(self) -> str:
        """The range as an error message gives it."""
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        return f"{low:.10g} to {high:.10g}"


_SIZE = KeyRule("u32", required=True, low=1, high=MAX_I32)
_OPTIONAL_SIZE = KeyRule("u32", low=1, high=MAX_I32)


def _real(key: str, *, required: bool = False) -> KeyRule:
    """The rule of a real number whose range config.json's key has."""
    low, high = REAL_LIMITS[key]
    return KeyRule("f32", required=required, low=low, high=high)


# Keys below "{arch}.". Those that are not required have llama.cpp's defaults.
ARCH_KEYS = {
    "block_count": KeyRule("u32", required=True, low=1, high=MAX_SLOTS),
    "num_loops": KeyRule("u32", required=True, low=1, high=MAX_LOOPS),
    "context_length": _SIZE,
    "embedding_length": _SIZE,
    "feed_forward_length": _SIZE,
    "attention.head_count": _SIZE,
    "attention.head_count_kv": _OPTIONAL_SIZE,
    "attention.key_length": _OPTIONAL_SIZE,
    "attention.value_length": _OPTIONAL_SIZE,
    "attention.layer_norm_rms_epsilon": _real("rms_norm_eps", required=True),
    "rope.dimension_count": _OPTIONAL_SIZE,
    "rope.freq_base": _real("rope_theta", required=True),
    "exit_threshold": _real("early_exit_threshold"),
    "vocab_size": _OPTIONAL_SIZE,
    # What llama.cpp's own model saver writes for things these architectures do not have.
    "attention.causal": KeyRule("bool", choices=(True,)),
    "pooling_type": KeyRule("u32", choices=(0, 2**32 - 1)),
    "rope.scaling.type": KeyRule("str", choices=("none", "linear")),
    "rope.scaling.factor": KeyRule("f32", choices=(0.0, 1.0)),
    "rope.scaling.attn_factor": KeyRule("f32", choices=(1.0,)),
    "rope.scaling.original_context_length": _OPTIONAL_SIZE,
    "attention.key_length_swa": _OPTIONAL_SIZE,
    "attention.value_length_swa": _OPTIONAL_SIZE,
    "rope.dimension_count_swa": _OPTIONAL_SIZE,
    "rope.freq_base_swa": KeyRule("f32", low=0.0, high=1e30),
}
# More of the model saver's: its defaults for other architectures. None of them reaches the graph.
_SAVER_DEFAULTS: dict[str, tuple[str, MetaValue]] = {
    "activation.situ_beta": ("f32", 1.0),
    "attention.indexer.kpool_select_tail": ("bool", True),
    "attention.rope_pattern": ("u32", 1),
    "attn_logit_softcapping": ("f32", 50.0),
    "decoder_start_token_id": ("i32", -1),
    "deepstack_mapping": ("arr[i32]", [-1] * MAX_SLOTS),
    "expert_group_scale": ("f32", 0.05000000074505806),
    "final_logit_softcapping": ("f32", 30.0),
    "kda.gate_lower_bound": ("f32", float("-inf")),
    "rope.scaling.yarn_attn_factor": ("f32", 1.0),
    "rope.scaling.yarn_beta_fast": ("f32", 32.0),
    "rope.scaling.yarn_beta_slow": ("f32", 1.0),
    "rope.scaling.yarn_ext_factor": ("f32", -1.0),
    "router_logit_softcapping": ("f32", 30.0),
    "token_shift_count": ("u32", 2),
}
ARCH_KEYS.update({name: KeyRule(type, choices=(value,)) for name, (type, value) in _SAVER_DEFAULTS.items()})
MELT_KEYS = {
    "chunk_size": _SIZE,
    "kv_gate": KeyRule("str", required=True, choices=KV_GATES),
    "kv_gate_init": KeyRule("str", required=True, choices=KV_GATE_INITS),
}

# Keys below "general." that llama.cpp or the runtime interprets; others are free text and allowed.
GENERAL_KEYS = {
    "architecture": KeyRule("str", required=True),
    "type": KeyRule("str", choices=("model",)),
    "alignment": KeyRule("u32"),
    "file_type": KeyRule("u32", low=0, high=2047),
    "quantization_version": KeyRule("u32", low=0, high=2),
    "name": KeyRule("str"),
    "sampling.sequence": KeyRule("str"),
    "sampling.top_k": KeyRule("number", low=-1, high=MAX_I32),
    "sampling.top_p": KeyRule("number", low=0, high=1),
    "sampling.min_p": KeyRule("number", low=0, high=1),
    "sampling.temp": KeyRule("number", low=0, high=100),
    "sampling.xtc_probability": KeyRule("number", low=0, high=1),
    "sampling.xtc_threshold": KeyRule("number", low=0, high=1),
    "sampling.penalty_last_n": KeyRule("number", low=-1, high=MAX_I32),
    "sampling.penalty_repeat": KeyRule("number", low=0.01, high=100),
    "sampling.mirostat": KeyRule("number", low=0, high=2),
    "sampling.mirostat_tau": KeyRule("number", low=0, high=1000),
    "sampling.mirostat_eta": KeyRule("number", low=0, high=1000),
}
# Words in general.name that make llama.cpp change the tokens' attributes, or throw if tokens of its own are
# missing, and what the exporter writes instead.
INTERPRETED_NAMES = {"phi-3": "phi_3", "phi3": "phi_3", "modern-bert": "modern_bert"}

_TOKEN_ID = KeyRule("u32", low=0, high=MAX_I32)
TOKENIZER_KEYS = {
    "tokenizer.ggml.model": KeyRule("str", required=True, choices=("gpt2",)),
    "tokenizer.ggml.pre": KeyRule("str", required=True),
    "tokenizer.ggml.tokens": KeyRule("arr[str]", required=True),
    "tokenizer.ggml.token_type": KeyRule("arr[i32]", required=True),
    "tokenizer.ggml.token_type_count": KeyRule("u32", low=0, high=MAX_I32),
    "tokenizer.ggml.scores": KeyRule("arr[f32]"),
    "tokenizer.ggml.merges": KeyRule("arr[str]", required=True),
    "tokenizer.ggml.bos_token_id": _TOKEN_ID,
    "tokenizer.ggml.eos_token_id": KeyRule("u32", required=True, low=0, high=MAX_I32),
    "tokenizer.ggml.add_bos_token": KeyRule("bool"),
    "tokenizer.ggml.add_eos_token": KeyRule("bool"),
    "tokenizer.ggml.add_sep_token": KeyRule("bool", choices=(False,)),
    "tokenizer.ggml.add_space_prefix": KeyRule("bool"),
    "tokenizer.ggml.remove_extra_whitespaces": KeyRule("bool"),
    "tokenizer.chat_template": KeyRule("str"),
    "tokenizer.chat_templates": KeyRule("arr[str]"),
    **{
        f"tokenizer.ggml.{name}_token_id": _TOKEN_ID
        for name in (
            "eot",
            "eom",
            "unknown",
            "seperator",
            "padding",
            "cls",
            "mask",
            "prefix",
            "suffix",
            "middle",
            "fim_pre",
            "fim_suf",
            "fim_mid",
            "fim_pad",
            "fim_rep",
            "fim_sep",
        )
    },
}
# Byte-level pre-tokenizers of llama.cpp whose splitting is written out in code. Those it gives to
# std::regex recurse once per character, so that a long prompt can overflow the stack. True: adds bos by itself.
PRE_TOKENIZERS = {
    "smollm": False,
    "gpt-2": False,
    "starcoder": False,
    "refact": False,
    "command-r": False,
    "codeshell": False,
    "minerva-7b": False,
    "mpt": False,
    "olmo": False,
    "qwen2": False,
    "stablelm2": False,
    "dbrx": False,
    "smaug-bpe": False,
    "llama-bpe": True,
    "llama3": True,
}
# Token types: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused. Byte tokens (6) are not of byte-level BPE.
TOKEN_TYPES = (1, 2, 3, 4, 5)

# Types with kernels for both get_rows and mul_mat in ggml's CPU backend and in Metal.
MATRIX_TYPES = (
    "F32",
    "F16",
    "BF16",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
)
# The graph adds and multiplies these without a conversion, which ggml aborts on for other types.
VECTOR_TYPES = ("F32",)
ROLE_TYPES = {
    "embedding": MATRIX_TYPES,
    "head": MATRIX_TYPES,
    "matrix": MATRIX_TYPES,
    "gate": MATRIX_TYPES,
    "norm": VECTOR_TYPES,
    "bias": VECTOR_TYPES,
    "exit": VECTOR_TYPES,
}
