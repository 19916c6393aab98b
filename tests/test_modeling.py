"""The reference model against a second, naive implementation and against its own invariants.

If these hold, every other backend may be compared with the reference alone.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from melt_edge.config import LoopConfig
from melt_edge.modeling import KVCache, LoopLM, select_exit
from tiny import configs, tiny_config, tiny_tensors

Array = np.ndarray[Any, Any]


def model_of(config: LoopConfig, seed: int = 0) -> LoopLM:
    """The reference model in float64, so that nothing but the mathematics is compared."""
    model = LoopLM(config).double().eval()
    state = {name: torch.from_numpy(t).double() for name, t in tiny_tensors(config, seed).items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


def tokens_of(config: LoopConfig, n: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, config.vocab_size, (1, n)))


def logits_of(model: LoopLM, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokens, **options).logits[0]


# --- a second implementation: numpy, one token, head and key at a time, straight from the paper's equations


def naive_logits(config: LoopConfig, weights: dict[str, Array], tokens: list[int], chunk_size: int) -> Array:
    """Logits (n, V). A dict of rows (slot, position) -> (k, v) is the whole cache."""
    w = {name: t.astype(np.float64) for name, t in weights.items()}
    dh, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    rows: dict[tuple[int, int], tuple[Array, Array]] = {}

    def norm(x: Array, name: str) -> Array:
        return x / math.sqrt(float(np.mean(x * x)) + config.rms_norm_eps) * w[name]

    def sigmoid(x: Array) -> Array:
        return 1 / (1 + np.exp(-x))

    def rotate(head: Array, position: int) -> Array:
        out = head.copy()
        for i in range(dh // 2):
            angle = position * config.rope_theta ** (-2 * i / dh)
            a, b = head[i], head[i + dh // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + dh // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def heads(x: Array, position: int | None) -> Array:
        split = x.reshape(-1, dh)
        return split if position is None else np.stack([rotate(head, position) for head in split])

    logits = []
    for start in range(0, len(tokens), chunk_size):
        chunk = range(start, min(start + chunk_size, len(tokens)))
        x = {p: w["model.embed_tokens.weight"][tokens[p]] for p in chunk}
        h: dict[tuple[int, int], Array] = {}
        for loop_idx in range(config.num_loops):
            for layer_idx in range(config.num_hidden_layers):
                at = f"model.layers.{layer_idx}."
                slot = layer_idx if config.model_type == "melt" else loop_idx * config.num_hidden_layers + layer_idx
                u = {p: norm(x[p], at + "input_layernorm.weight") for p in chunk}
                for p in chunk:
                    latent = u[p]
                    if config.has_gate and not (config.kv_gate_init == "input" and loop_idx == 0):
                        old = h.get((layer_idx, p), np.zeros_like(latent))
                        gate = at + "self_attn.kv_gate."
                        z = sigmoid(
                            w[gate + "x_proj.weight"] @ u[p] + w[gate + "x_proj.bias"] + w[gate + "h_proj.weight"] @ old
                        )
                        latent = z * old + (1 - z) * u[p]
                    h[layer_idx, p] = latent
                    k = heads(w[at + "self_attn.k_proj.weight"] @ latent, p)
                    v = heads(w[at + "self_attn.v_proj.weight"] @ latent, None)
                    rows[slot, p] = (k, v)
                for p in chunk:
                    q = heads(w[at + "self_attn.q_proj.weight"] @ u[p], p)
                    outs = []
                    for head_idx, query in enumerate(q):
                        keys = np.stack([rows[slot, j][0][head_idx // group] for j in range(p + 1)])
                        values = np.stack([rows[slot, j][1][head_idx // group] for j in range(p + 1)])
                        scores = np.exp(keys @ query / math.sqrt(dh))
                        outs.append(scores / scores.sum() @ values)
                    a = w[at + "self_attn.o_proj.weight"] @ np.concatenate(outs)
                    x[p] = x[p] + norm(a, at + "input_layernorm_2.weight")
                    m = norm(x[p], at + "post_attention_layernorm.weight")
                    gated = w[at + "mlp.gate_proj.weight"] @ m
                    m = w[at + "mlp.down_proj.weight"] @ (gated * sigmoid(gated) * (w[at + "mlp.up_proj.weight"] @ m))
                    x[p] = x[p] + norm(m, at + "post_attention_layernorm_2.weight")
            for p in chunk:
                x[p] = norm(x[p], "model.norm.weight")
        head = w["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
        logits += [head @ x[p] for p in chunk]
    return np.stack(logits)


@settings(max_examples=25, deadline=None)
@given(configs(), st.integers(1, 12), st.integers(1, 12))
def test_equals_the_naive_implementation(config: LoopConfig, n: int, chunk_size: int) -> None:
    tokens = tokens_of(config, n)
    weights = tiny_tensors(config)
    found = logits_of(model_of(config), tokens, chunk_size=chunk_size).numpy()
    expected = naive_logits(config, weights, tokens[0].tolist(), chunk_size)
    # random weights amplify rounding from loop to loop: how much is measured on one that was made on purpose
    embedding = "model.embed_tokens.weight"
    moved = {**weights, embedding: weights[embedding].astype(np.float64) * (1 + 1e-15)}
    amplified = np.abs(naive_logits(config, moved, tokens[0].tolist(), chunk_size) - expected).max()
    assert np.abs(found - expected).max() <= max(1e-9 * np.abs(expected).max(), 10 * amplified)


@pytest.mark.parametrize(
    "perturbed", ["kv_gate.h_proj.weight", "kv_gate.x_proj.bias", "k_proj.weight", "input_layernorm_2.weight"]
)
def test_the_comparison_sees_one_changed_tensor(perturbed: str) -> None:
    config = tiny_config("melt", num_loops=3)
    weights = tiny_tensors(config)
    name = next(name for name in weights if name.endswith(perturbed))
    weights[name] = weights[name] * 1.01
    tokens = tokens_of(config, 9)
    found = logits_of(model_of(config), tokens, chunk_size=4).numpy()
    assert np.abs(found - naive_logits(config, weights, tokens[0].tolist(), 4)).max() > 1e-6


# --- invariants


@settings(max_examples=25, deadline=None)
@given(configs(), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_a_cache_goes_on_where_it_stopped(config: LoopConfig, pieces: list[int]) -> None:
    """Calls of a whole number of chunks, or of single tokens, give what one call gives."""
    model, tokens = model_of(config), tokens_of(config, sum(pieces))
    whole = logits_of(model, tokens, chunk_size=1)
    cache, found = KVCache(config), []
    for piece in tokens.split(pieces, dim=1):
        found.append(logits_of(model, piece, cache=cache, chunk_size=1))
    assert torch.allclose(torch.cat(found), whole, rtol=0, atol=1e-9)
    assert len(cache) == sum(pieces)


def test_ouro_does_not_depend_on_chunks_and_melt_does() -> None:
    for model_type, depends in (("ouro", False), ("melt", True)):
        config = tiny_config(model_type)
        model, tokens = model_of(config), tokens_of(config, 13)
        a, b = (logits_of(model, tokens, chunk_size=size) for size in (1, 5))
        assert torch.allclose(a, b, rtol=0, atol=1e-9) != depends


def test_a_later_token_never_changes_an_earlier_one() -> None:
    config = tiny_config("melt")
    model, tokens = model_of(config), tokens_of(config, 12)
    changed = tokens.clone()
    changed[0, 9] = (changed[0, 9] + 1) % config.vocab_size
    a, b = logits_of(model, tokens, chunk_size=4), logits_of(model, changed, chunk_size=4)
    assert torch.equal(a[:9], b[:9])
    assert not torch.allclose(a[9:], b[9:])


def test_one_loop_without_a_gate_is_the_plain_model() -> None:
    ouro = tiny_config("ouro", num_loops=1)
    shared = ouro.share_kv(chunk_size=3)
    tokens = tokens_of(ouro, 10)
    assert torch.allclose(logits_of(model_of(ouro), tokens), logits_of(model_of(shared), tokens), rtol=0, atol=1e-9)


def test_the_first_chunk_of_a_shared_cache_is_ouros() -> None:
    """Within one chunk every loop attends to its own rows: sharing costs nothing until the next chunk."""
    ouro = tiny_config("ouro")
    tokens = tokens_of(ouro, 10)
    a, b = logits_of(model_of(ouro), tokens), logits_of(model_of(ouro.share_kv(chunk_size=6)), tokens)
    assert torch.allclose(a[:6], b[:6], rtol=0, atol=1e-9)
    assert not torch.allclose(a[6:], b[6:], rtol=0, atol=1e-3)


@pytest.mark.parametrize("init", ["zeros", "input"])
def test_both_gate_inits_are_different_models(init: str) -> None:
    config = tiny_config("melt", kv_gate_init=init)
    other = tiny_config("melt", kv_gate_init="input" if init == "zeros" else "zeros")
    tokens = tokens_of(config, 6)
    assert not torch.allclose(logits_of(model_of(config), tokens), logits_of(model_of(other), tokens), atol=1e-3)


def test_melts_cache_does_not_grow_with_its_loops_and_ouros_does() -> None:
    sizes: dict[str, list[int]] = {"melt": [], "ouro": []}
    for model_type, found in sizes.items():
        for num_loops in (1, 2, 4, 8):
            config = tiny_config(model_type, num_loops=num_loops)
            cache = KVCache(config)
            logits_of(model_of(config), tokens_of(config, 11), cache=cache, chunk_size=4)
            assert cache.nbytes == 11 * config.kv_bytes_per_token(8)
            found.append(cache.nbytes)
    assert sizes["melt"] == [sizes["melt"][0]] * 4
    assert sizes["ouro"] == [sizes["melt"][0] * t for t in (1, 2, 4, 8)]


def test_a_batch_is_its_sequences() -> None:
    config = tiny_config("melt")
    model = model_of(config)
    a, b = tokens_of(config, 9, seed=1), tokens_of(config, 9, seed=2)
    with torch.inference_mode():
        together = model(torch.cat((a, b)), chunk_size=4).logits
    assert torch.allclose(together[0], logits_of(model, a, chunk_size=4), rtol=0, atol=1e-9)
    assert torch.allclose(together[1], logits_of(model, b, chunk_size=4), rtol=0, atol=1e-9)


def test_the_exit_gate_chooses_which_loop_is_read() -> None:
    config = tiny_config("melt", num_loops=4)
    model, tokens = model_of(config), tokens_of(config, 7)
    with torch.inference_mode():
        states, probs = model.forward_chunk(tokens, KVCache(config))
    remaining = torch.ones(7, dtype=torch.float64)
    chosen = torch.full((7,), 3)
    for loop_idx in range(3):
        remaining = remaining * (1 - probs[loop_idx, 0])
        chosen = torch.where((1 - remaining >= 0.7) & (chosen == 3), loop_idx, chosen)
    assert len(set(chosen.tolist())) > 1  # the case is not trivial
    expected = torch.stack([states[loop_idx, 0, i] for i, loop_idx in enumerate(chosen.tolist())])
    assert torch.equal(select_exit(states, probs, 0.7)[0], expected)
    assert torch.equal(select_exit(states, probs, 1.0), states[-1])


def test_gradients_reach_every_weight_through_the_cache() -> None:
    config = tiny_config("melt", num_loops=2)
    model = model_of(config).train()
    out = model(tokens_of(config, 9), chunk_size=4)
    (out.logits[0, -1].square().mean() + out.exit_probs.square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
