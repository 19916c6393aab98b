"""The cache of the patched llama.cpp: its size, its types, and what upstream can do with a sequence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from melt_edge.modeling import KVCache, rope
from parity.native import Token, context, llama, sequence
from parity.reference import distance, kl_divergence, random_tokens, reference_logits, reference_model
from tiny import tiny_config

LIMIT = 1e-3  # standard deviations of the logits
N_CTX = 256


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0", "q4_0"])
def test_bytes_do_not_depend_on_loops_for_melt_and_scale_for_ouro(make_gguf, kv_type: str) -> None:
    """The library's own figure, for 1, 2, 4 and 8 loops; equal to the formula of the configuration."""
    bytes_per_value = {"f32": 4, "f16": 2, "q8_0": 34 / 32, "q4_0": 18 / 32}[kv_type]
    kv_bytes = {}
    for model_type in ("melt", "ouro"):
        config = tiny_config(model_type)
        for loops in (1, 2, 4, 8):
            with context(make_gguf(config), loops=loops, kv_type=kv_type, flash_attn=True, n_ctx=N_CTX) as ctx:
                kv_bytes[model_type, loops] = ctx.kv_bytes()
            expected = config.with_loops(loops).kv_bytes_per_token(bytes_per_value) * N_CTX
            assert kv_bytes[model_type, loops] == expected
    assert len({kv_bytes["melt", loops] for loops in (1, 2, 4, 8)}) == 1
    assert all(kv_bytes["ouro", loops] == loops * kv_bytes["ouro", 1] for loops in (2, 4, 8))
    assert kv_bytes["ouro", 1] == kv_bytes["melt", 1]


# Mean KL divergence from a float32 cache, in nats: 1.5 times the largest of 24 random tiny models (12 seeds of each
# architecture: f16 2e-5, q8_0 2e-3, q4_0 1.1).
KV_LIMITS = {"f16": 3e-5, "q8_0": 3e-3, "q4_0": 1.6}


@pytest.mark.parametrize("kv_type", KV_LIMITS)
@pytest.mark.parametrize("model_type", ["ouro", "melt"])
def test_smaller_caches_stay_close(make_gguf, model_type: str, kv_type: str) -> None:
    """What a cache type costs has a bound, and is not nothing: the type is really used."""
    config = tiny_config(model_type)
    tokens = random_tokens(64, config.vocab_size)
    with context(make_gguf(config), flash_attn=True) as ctx:
        expected = ctx.logits(sequence(tokens))
    with context(make_gguf(config), flash_attn=True, kv_type=kv_type) as ctx:
        assert 0 < kl_divergence(ctx.logits(sequence(tokens)), expected) < KV_LIMITS[kv_type]


@pytest.mark.parametrize("model_type", ["ouro", "melt"])
def test_context_shift_rotates_the_rows_that_stay(make_checkpoint, make_gguf, model_type: str) -> None:
    """Dropping the first tokens and moving the rest: the next token's logits are the reference's."""
    config = tiny_config(model_type)
    tokens, dropped = random_tokens(20, config.vocab_size), 7
    with context(make_gguf(config)) as ctx:
        ctx.logits(sequence(tokens[:-1]))
        assert llama.llama_memory_can_shift(ctx.memory)
        assert llama.llama_memory_seq_rm(ctx.memory, 0, 0, dropped)
        llama.llama_memory_seq_add(ctx.memory, 0, dropped, -1, -dropped)
        got = ctx.logits(sequence(tokens[-1:], start=len(tokens) - 1 - dropped))

    model = reference_model(make_checkpoint(config))
    cache = KVCache(config)
    with torch.no_grad():
        model(torch.tensor([tokens[:-1]]), cache, chunk_size=8)
        for slot, (k, v) in cache._kept.items():
            shift = torch.full((k.shape[2] - dropped,), -dropped)
            cache._kept[slot] = (rope(k[:, :, dropped:], shift, config.rope_theta), v[:, :, dropped:])
        expected = model(torch.tensor([tokens[-1:]]), cache).logits[0].numpy()
    assert distance(got, expected) < LIMIT


@pytest.mark.parametrize("model_type", ["ouro", "melt"])
def test_sequences_can_be_copied_saved_and_restored(make_checkpoint, make_gguf, model_type: str) -> None:
    """A copied and a restored sequence go on as the one that they came from."""
    config = tiny_config(model_type)
    tokens = random_tokens(20, config.vocab_size)
    expected = reference_logits(reference_model(make_checkpoint(config)), tokens, 8, decode=1)[-1:]
    with context(make_gguf(config), n_seq_max=3) as ctx:
        assert ctx.decode(sequence(tokens[:-1])) == 0
        llama.llama_memory_seq_cp(ctx.memory, 0, 1, -1, -1)
        size = llama.llama_state_seq_get_size(ctx.handle, 0)
        buffer = (llama.ctypes.c_uint8 * size)()
        assert llama.llama_state_seq_get_data(ctx.handle, buffer, size, 0) == size
        assert llama.llama_memory_seq_rm(ctx.memory, 0, -1, -1)
        assert llama.llama_state_seq_set_data(ctx.handle, buffer, size, 2) == size
        for seq in (1, 2):
            got = ctx.logits(sequence(tokens[-1:], start=len(tokens) - 1, seq=seq))
            assert distance(got, expected) < LIMIT


def test_embeddings_are_the_state_that_the_head_reads(make_checkpoint, make_gguf) -> None:
    """Embeddings output, per token."""
    config = tiny_config("melt")
    tokens = random_tokens(20, config.vocab_size)
    with torch.no_grad():
        expected = reference_model(make_checkpoint(config))(torch.tensor([tokens])).hidden[0].numpy()
    with context(make_gguf(config), embeddings=True) as ctx:
        assert distance(ctx.embeddings(sequence(tokens)), expected) < LIMIT


def test_a_shared_prefix_serves_two_sequences(make_checkpoint, make_gguf) -> None:
    """Tokens that belong to two sequences are computed once, and both go on from them."""
    config = tiny_config("melt", chunk_size=8)
    prefix = random_tokens(11, config.vocab_size)
    tails = [random_tokens(5, config.vocab_size, seed=seed) for seed in (1, 2)]
    batch = [Token(token, i, (0, 1)) for i, token in enumerate(prefix)]
    batch += [Token(token, len(prefix) + i, (seq,)) for seq in (0, 1) for i, token in enumerate(tails[seq])]
    with context(make_gguf(config), n_seq_max=2) as ctx:
        got = ctx.logits(batch)
    model = reference_model(make_checkpoint(config))
    for seq in (0, 1):
        cache = KVCache(config)
        with torch.no_grad():
            model(torch.tensor([prefix]), cache)
            expected = model(torch.tensor([tails[seq]]), cache).logits[0].numpy()
        rows = got[len(prefix) + 5 * seq : len(prefix) + 5 * (seq + 1)]
        assert distance(np.asarray(rows), expected) < LIMIT


def test_a_full_cache_is_an_answer_and_not_a_crash(make_gguf) -> None:
    """llama_decode returns 1, and the context still works after it."""
    config = tiny_config("melt")
    tokens = random_tokens(N_CTX, config.vocab_size)
    with context(make_gguf(config), n_ctx=N_CTX) as ctx:
        assert ctx.decode(sequence(tokens)) == 0
        assert ctx.decode(sequence(tokens[:1], start=N_CTX)) == 1
        llama.llama_memory_clear(ctx.memory, True)
        assert ctx.decode(sequence(tokens[:3])) == 0
