"""What a model will need before it is loaded; the numbers after loading come from the library itself."""

from __future__ import annotations

from dataclasses import dataclass

from melt_edge.config import LoopConfig
from melt_edge.errors import MemoryBudgetError
from melt_edge.runtime.gguf_check import GGUFInfo
from melt_edge.runtime.machine import available_bytes

# Cache types a user can ask for: name -> (ggml type number, values per block, bytes per block).
KV_TYPES = {"f32": (0, 1, 4), "f16": (1, 1, 2), "q8_0": (8, 32, 34), "q4_0": (2, 32, 18)}
CTX_STEP = 256  # llama.cpp rounds a context's cells up to a multiple of this


@dataclass(frozen=True)
class Estimate:
    """Bytes a loaded model is expected to hold."""

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int

    @property
    def total_bytes(self) -> int:
        """Everything together."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes


def padded_ctx(n_ctx: int) -> int:
    """The number of cells llama.cpp makes for a context of n_ctx tokens."""
    return -(-n_ctx // CTX_STEP) * CTX_STEP


def estimate(
    info: GGUFInfo, config: LoopConfig, *, n_ctx: int, n_ubatch: int, n_batch: int, kv_type: str, flash_attn: bool
) -> Estimate:
    """The bytes of weights, cache and buffers.

    The cache is exact; the compute buffer is a bound fitted to what the library allocates: the widest
    intermediate states of n_ubatch tokens, the attention matrix where flash attention is off, the
    logits of a whole batch, and the graph's own nodes, which grow with loops times layers.
    """
    _, block, block_bytes = KV_TYPES[kv_type]
    cells = padded_ctx(n_ctx)
    kv = int(config.kv_bytes_per_token(block_bytes / block)) * cells
    d, ff = config.hidden_size, config.intermediate_size
    width = 8 * d + 3 * ff + 2 * (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    attention = cells if flash_attn else cells * (config.num_attention_heads + 1) * 2
    states = 4 * n_ubatch * (width + attention)
    logits = 4 * config.vocab_size * (n_ubatch + n_batch)
    graph = 64 * 1024 * config.num_loops * config.num_hidden_layers + 8 * 2**20
    weights = sum(-(-tensor.nbytes // info.alignment) * info.alignment for tensor in info.tensors)
    return Estimate(weights, kv, states + logits + graph)


def check_budget(needed: Estimate, *, n_ctx: int, kv_type: str, source: str) -> None:
    """Raises: MemoryBudgetError with the numbers if the machine cannot give what is needed."""
    available = available_bytes()
    if available is None or needed.total_bytes <= available:
        return
    smaller = [f"n_ctx below {n_ctx}"] + (["kv_type='q8_0'"] if kv_type in ("f32", "f16") else [])
    raise MemoryBudgetError(
        f"{source}: needs about {_mib(needed.total_bytes)} (weights {_mib(needed.weights_bytes)}, cache of "
        f"{n_ctx} tokens in {kv_type} {_mib(needed.kv_bytes)}, buffers {_mib(needed.compute_bytes)}), this machine "
        f"can give {_mib(available)}; load it with {' or '.join(smaller)}, or use a smaller quantisation"
    )


def check_array(n_bytes: int, what: str) -> None:
    """Raises: MemoryBudgetError if a result of n_bytes would not fit."""
    available = available_bytes()
    if available is not None and n_bytes > available:
        raise MemoryBudgetError(
            f"{what} takes {_mib(n_bytes)}, this machine can give {_mib(available)}; ask for fewer tokens at once"
        )


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.0f} MiB"
