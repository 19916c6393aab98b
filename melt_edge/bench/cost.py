"""What a token costs, counted from a model's tensors: bytes read to decode it, products to prefill it. No measuring."""

from __future__ import annotations

from dataclasses import dataclass

from melt_edge.config import LoopConfig
from melt_edge.runtime.gguf_file import GGUFInfo
from melt_edge.runtime.memory import KV_TYPES
from melt_edge.runtime.onnx_folder import OnnxFolder


@dataclass(frozen=True)
class ReadBytes:
    """Bytes read from memory to decode one token, by part.

    layers: the stack, once for every loop; gates: those of MELT, of which the first loop needs one product of two, or
    none if it starts from the input; head: the final norm's and the output matrix; cache: the K and V rows of the
    tokens before, once for every loop.
    """

    layers: int
    gates: int
    head: int
    cache: int

    @property
    def total(self) -> int:
        """Everything that is read."""
        return self.layers + self.gates + self.head + self.cache


def read_bytes(source: GGUFInfo | OnnxFolder, config: LoopConfig, *, kv_type: str, n_past: float) -> ReadBytes:
    """The bytes of one token after n_past others. config: with the loops that run.

    A row of the embedding and the states between operations, which stay in the processor's caches, are left out.
    """
    if isinstance(source, OnnxFolder):
        layers, gates, head = _folder_bytes(source, config)
    else:
        layers, gates, head = _file_bytes(source, config)
    _, block, block_bytes = KV_TYPES[kv_type]
    row = config.num_key_value_heads * config.head_dim * block_bytes / block
    return ReadBytes(
        layers=layers,
        gates=gates,
        head=head,
        # MELT reads its one row per layer in every loop, Ouro a row of each loop: the same bytes
        cache=round(n_past * config.num_loops * config.num_hidden_layers * 2 * row),
    )


def _file_bytes(file: GGUFInfo, config: LoopConfig) -> tuple[int, int, int]:
    """Layers, gates, head of all loops; llama.cpp leaves out the gate's products that the first loop does not need."""
    sizes = {tensor.name: tensor.nbytes for tensor in file.tensors}
    layers = gates = gates_later = 0
    for name, n_bytes in sizes.items():
        if ".kv_gate_h." in name:
            gates_later += n_bytes
        elif ".kv_gate_x." in name:
            gates += n_bytes
        elif name.startswith("blk."):
            layers += n_bytes
    loops = config.num_loops
    x_loops = loops - 1 if config.kv_gate_init == "input" else loops
    return (
        loops * (layers + sizes["output_norm.weight"]),
        x_loops * gates + (loops - 1) * gates_later,
        sizes.get("output.weight", sizes["token_embd.weight"]),
    )


def _folder_bytes(folder: OnnxFolder, config: LoopConfig) -> tuple[int, int, int]:
    """Layers, gates, head of all loops; the loop's graph computes everything in every loop."""
    loop = {w.name: w.length for w in folder.graphs["loop"].weights if not w.name.startswith("rotary.")}
    head = sum(weight.length for weight in folder.graphs["head"].weights)
    gates = sum(size for name, size in loop.items() if "kv_gate" in name)
    return config.num_loops * (sum(loop.values()) - gates), config.num_loops * gates, head


def prefill_products(config: LoopConfig, n_tokens: int) -> int:
    """Multiply-adds that a prompt of n_tokens takes from an empty cache: matrices and attention, logits of the last."""
    d, ff, loops = config.hidden_size, config.intermediate_size, config.num_loops
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer = d * (2 * q + 2 * kv) + 3 * d * ff
    gate = 0
    if config.has_gate:
        first = 0 if config.kv_gate_init == "input" else 1
        gate = d * d * (first + 2 * (loops - 1))
    attention = 2 * q * (n_tokens + 1) // 2  # a token sees half of the others on average
    per_token = config.num_hidden_layers * (loops * (layer + attention) + gate)
    return n_tokens * per_token + config.vocab_size * d
