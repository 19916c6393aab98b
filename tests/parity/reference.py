"""The reference's side of the parity tests: float64, one chunking, one number for the distance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from melt_edge.checkpoint import load_model
from melt_edge.modeling import KVCache, LoopLM

torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it gives


def reference_model(checkpoint: Path, *, loops: int | None = None) -> LoopLM:
    """The checkpoint in float64, with another number of loops if asked."""
    model = load_model(checkpoint).double().eval()
    if loops is not None:
        model.config = model.config.with_loops(loops)
    return model


@torch.no_grad()
def reference_logits(model: LoopLM, tokens: list[int], chunk_size: int, decode: int = 0) -> np.ndarray:
    """Logits of a prompt cut into chunks, its last ``decode`` tokens fed one at a time. (n_tokens, V)."""
    cache = KVCache(model.config)
    n_prompt = len(tokens) - decode
    parts = [model(torch.tensor([tokens[:n_prompt]]), cache, chunk_size=chunk_size).logits]
    parts += [model(torch.tensor([[token]]), cache, chunk_size=1).logits for token in tokens[n_prompt:]]
    return torch.cat(parts, dim=1)[0].numpy()


def distance(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, in standard deviations of the expected logits."""
    return float(np.abs(got - expected).max() / expected.std())


def kl_divergence(got: np.ndarray, expected: np.ndarray) -> float:
    """Mean KL(expected || got) over the tokens, in nats."""
    p = torch.log_softmax(torch.from_numpy(expected).double(), -1)
    q = torch.log_softmax(torch.from_numpy(got).double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def random_tokens(n_tokens: int, n_vocab: int, seed: int = 0) -> list[int]:
    """Token ids from a seed."""
    return np.random.default_rng(seed).integers(0, n_vocab, n_tokens).tolist()
