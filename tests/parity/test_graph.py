"""What the graph is made of: LoRA on every matrix, and operations that Metal has."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from melt_edge.checkpoint import save_checkpoint
from melt_edge.names import gguf_name
from melt_edge.spec import tensor_specs
from parity.native import collector, context, sequence
from parity.reference import distance, random_tokens, reference_logits, reference_model
from tiny import tiny_config, tiny_tensors

LIMIT = 1e-3  # standard deviations of the logits

# The operations that the Metal back end of the pinned llama.cpp implements, among those that a decoder can be
# made of. `make test-upstream` reads them again from ggml-metal-device.m.
METAL_OPS = {
    "ADD", "CONT", "CPY", "FLASH_ATTN_EXT", "GET_ROWS", "GLU", "MUL", "MUL_MAT", "NONE", "PERMUTE", "RESHAPE",
    "RMS_NORM", "ROPE", "SCALE", "SET_ROWS", "SOFT_MAX", "SUB", "TRANSPOSE", "VIEW",
    "NEG", "SIGMOID", "SILU", "STEP", "SWIGLU",
}  # fmt: skip


@pytest.mark.parametrize("model_type", ["ouro", "melt"])
def test_a_lora_adapter_reaches_every_loop(make_gguf, tmp_path, model_type: str) -> None:
    """An adapter on every matrix, gates included, equals the checkpoint with the product added."""
    config = tiny_config(model_type, tied=False)
    rng, rank, alpha = np.random.default_rng(5), 4, 8.0
    merged = tiny_tensors(config)
    path = tmp_path / "adapter.gguf"
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, spec in tensor_specs(config).items():
        if spec.role not in ("matrix", "gate", "head"):
            continue
        a = 0.1 * rng.standard_normal((rank, spec.shape[1])).astype(np.float32)
        b = 0.2 * rng.standard_normal((spec.shape[0], rank)).astype(np.float32)
        writer.add_tensor(gguf_name(name) + ".lora_a", a)
        writer.add_tensor(gguf_name(name) + ".lora_b", b)
        merged[name] = merged[name] + alpha / rank * (b @ a)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    tokens = random_tokens(20, config.vocab_size)
    expected = reference_logits(reference_model(save_checkpoint(tmp_path / "merged", config, merged)), tokens, 8)
    with context(make_gguf(config), lora=path) as ctx:
        assert distance(ctx.logits(sequence(tokens)), expected) < LIMIT
    with context(make_gguf(config)) as ctx:
        assert distance(ctx.logits(sequence(tokens)), expected) > 0.1


@pytest.mark.parametrize("flash_attn", [False, True], ids=["plain", "flash"])
@pytest.mark.parametrize("threshold", [1.0, 0.6])
@pytest.mark.parametrize("model_type", ["ouro", "melt"])
def test_metal_has_every_operation_of_the_graph(make_gguf, model_type: str, threshold: float, flash_attn: bool) -> None:
    """The operations are read from the graph that runs."""
    config = tiny_config(model_type, early_exit_threshold=threshold)
    found: set[str] = set()
    callback = collector(found, "ggml_op_desc")
    with context(make_gguf(config), flash_attn=flash_attn, eval_callback=callback) as ctx:
        ctx.logits(sequence(random_tokens(9, config.vocab_size)))
    assert {"MUL_MAT", "ROPE", "SET_ROWS"} <= found  # the callback saw the graph
    assert ("SIGMOID" in found) == (config.has_gate or threshold < 1.0)
    assert found <= METAL_OPS
