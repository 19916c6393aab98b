"""Tiny seeded checkpoints: two layers, a real byte-level BPE tokenizer, everything from a seed.

The same seed feeds the reference, GGUF and later formats. Imported as ``from tiny import ...``.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from melt_edge.checkpoint import plan_shards, save_checkpoint
from melt_edge.config import LoopConfig
from melt_edge.spec import tensor_specs

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MIN_VOCAB = len(SPECIAL_TOKENS) + 256
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a careful assistant<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Learned merges come from here; its only job is to give a few hundred real ones.
CORPUS = (
    "What is 12 plus 30? The answer is 42. A loop is one block of layers that is run again and again. "
    "The cache keeps one row per token and layer, and each loop overwrites the row of the loop before. "
    "Tom has 3 apples and Anna gives him 5 more; how many apples does Tom have now? He has 8 apples. "
    "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(add(i, 1))\n"
    "Der schnelle braune Fuchs springt über den faulen Hund. El niño comió una manzana en el jardín. "
    "It isn't hard: they've done it, we'll do it, I'm sure you'd do it too. "
)
_DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def tiny_config(
    model_type: str = "melt",
    *,
    kv_gate: str = "elementwise",
    kv_gate_init: str = "zeros",
    num_loops: int = 4,
    n_head: int = 4,
    n_head_kv: int = 2,
    head_dim: int = 32,
    hidden_size: int = 64,
    layers: int = 2,
    vocab: int = 301,
    tied: bool = False,
    chunk_size: int = 8,
    **more: Any,
) -> LoopConfig:
    """A small configuration; head_dim * n_head differs from hidden_size unless asked otherwise."""
    melt = {"kv_gate": kv_gate, "kv_gate_init": kv_gate_init, "chunk_size": chunk_size} if model_type == "melt" else {}
    keys: dict[str, Any] = {
        "model_type": model_type,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": n_head,
        "num_key_value_heads": n_head_kv,
        "head_dim": head_dim,
        "intermediate_size": 2 * hidden_size,
        "vocab_size": vocab,
        "num_loops": num_loops,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LoopConfig(**{**keys, **melt, **more})


def tiny_tensors(config: LoopConfig, seed: int = 0) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Random weights scaled so that states and logits are O(1), the gates are half open, norms differ from 1."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, spec in tensor_specs(config).items():
        values = rng.standard_normal(spec.shape)
        if spec.role == "norm":
            values = 1.0 + 0.2 * values
        elif spec.role == "bias":
            values = 0.5 * values
        elif spec.role in ("embedding", "head"):
            values *= 2.0 / math.sqrt(config.hidden_size)
        else:
            values *= 1.0 / math.sqrt(spec.shape[-1])
        tensors[name] = values.astype(np.float32)
    return tensors


def tiny_checkpoint(folder: str | Path, config: LoopConfig, seed: int = 0, dtype: str = "F32", shards: int = 1) -> Path:
    """Write a whole checkpoint folder; config.vocab_size is also the tokenizer's. Returns the folder."""
    tensors = tiny_tensors(config, seed)
    itemsize = 4 if dtype == "F32" else 2
    sizes = {name: t.size * itemsize for name, t in tensors.items()}
    shard_bytes = math.ceil(sum(sizes.values()) / shards)
    while len(plan_shards(sizes, shard_bytes)) > shards:
        shard_bytes += 64
    return save_checkpoint(
        folder,
        replace(config, torch_dtype=_DTYPE_NAMES[dtype]),
        tensors,
        tokenizer_json=tiny_tokenizer_json(config.vocab_size),
        tokenizer_config=tiny_tokenizer_config(),
        generation_config={"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "eos_token_id": 2},
        shard_bytes=None if shards == 1 else shard_bytes,
    )


def tiny_tokenizer_config() -> dict[str, Any]:
    """tokenizer_config.json as SmolLM2's chat models have it."""
    return {
        "add_prefix_space": False,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
        "tokenizer_class": "GPT2Tokenizer",
    }


@functools.cache
def tiny_tokenizer_json(vocab_size: int) -> str:
    """tokenizer.json of a byte-level BPE with exactly vocab_size tokens, SmolLM2's layout."""
    if vocab_size < MIN_VOCAB:
        raise ValueError(f"a byte-level vocabulary has at least {MIN_VOCAB} tokens, not {vocab_size}")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges(vocab_size - MIN_VOCAB, alphabet)
    tokens = [*SPECIAL_TOKENS, *alphabet, *(left + right for left, right in merges)]
    model = models.BPE(vocab={token: idx for idx, token in enumerate(tokens)}, merges=merges)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    assert tokenizer.get_vocab_size() == vocab_size
    return tokenizer.to_str()


def _merges(count: int, alphabet: list[str]) -> list[tuple[str, str]]:
    """The first ``count`` merges: learned from CORPUS, then pairs of single bytes."""
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    words = Counter(piece for piece, _ in pre_tokenizer.pre_tokenize_str(CORPUS))
    split = {word: tuple(word) for word in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, pieces in split.items():
            for pair in itertools.pairwise(pieces):
                if not any(char.isdigit() for char in "".join(pair)):
                    pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        split = {word: _merge(pieces, best) for word, pieces in split.items()}
    known = set(alphabet) | {left + right for left, right in merges}
    for left in alphabet:
        for right in alphabet:
            if len(merges) == count:
                return merges
            if left + right not in known:
                known.add(left + right)
                merges.append((left, right))
    return merges


def _merge(pieces: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return tuple(merged)


@st.composite
def configs(draw: st.DrawFn) -> LoopConfig:
    """Every kind of small model: both architectures, gates, GQA, tied heads, odd sizes."""
    model_type = draw(st.sampled_from(["ouro", "melt"]))
    n_head_kv = draw(st.integers(1, 3))
    n_head = n_head_kv * draw(st.sampled_from([1, 2, 4]))
    return tiny_config(
        model_type,
        kv_gate=draw(st.sampled_from(["elementwise", "none"])),
        kv_gate_init=draw(st.sampled_from(["zeros", "input"])),
        num_loops=draw(st.integers(1, 8)),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=2 * draw(st.integers(1, 16)),
        hidden_size=draw(st.integers(3, 48)),
        layers=draw(st.integers(1, 3)),
        vocab=draw(st.integers(3, 400)),
        tied=draw(st.booleans()),
        chunk_size=draw(st.integers(1, 16)),
    )
