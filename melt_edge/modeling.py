"""The reference model in PyTorch: slow, clear, the ground truth of every other implementation.

A token's path reads from top to bottom: embedding, loops, gate, cache, attention, feed-forward, head.
Axes: B batch, C tokens of a chunk, L tokens in the cache, D hidden, H heads, Dh head dim, V vocab,
T loops. Sources: MELT, arXiv 2605.07721; Ouro, arXiv 2510.25741.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from melt_edge.config import LoopConfig


class KVCache:
    """The keys and values kept between chunks: the whole difference between Ouro and MELT.

    A row is one token's K and V in one slot. Ouro has a slot per (loop, layer); MELT has one per
    layer, and each loop restages it. Rows are staged while a chunk runs and kept by ``commit``, so
    that gradients flow through the cache from chunk to chunk.

    Shapes: k, v (B, Hkv, L, Dh) per slot.
    """

    def __init__(self, config: LoopConfig) -> None:
        self.config = config
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._staged: dict[int, tuple[Tensor, Tensor]] = {}

    def slot(self, loop_idx: int, layer_idx: int) -> int:
        """The slot that layer ``layer_idx`` reads and writes in loop ``loop_idx``."""
        if self.config.shares_kv:
            return layer_idx
        return loop_idx * self.config.num_hidden_layers + layer_idx

    def update(self, slot: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stage this chunk's rows in a slot, over those of an earlier loop; return all rows to attend to.

        Shapes: k, v (B, Hkv, C, Dh) -> (B, Hkv, L + C, Dh).
        """
        self._staged[slot] = (k, v)
        if slot not in self._kept:
            return k, v
        past_k, past_v = self._kept[slot]
        return torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)

    def commit(self) -> None:
        """Keep the rows staged last in every slot: the chunk is done."""
        for slot, (k, v) in self._staged.items():
            if slot in self._kept:
                past_k, past_v = self._kept[slot]
                k, v = torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)
            self._kept[slot] = (k, v)
        self._staged = {}

    def __len__(self) -> int:
        """Tokens kept (L)."""
        return self._kept[0][0].shape[2] if self._kept else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the rows kept."""
        return sum(t.numel() * t.element_size() for pair in self._kept.values() for t in pair)


@dataclass
class LoopOutput:
    """What the model returns for the tokens it was given.

    Shapes: logits (B, T_tokens, V); hidden (B, T_tokens, D), the state the head reads;
    exit_probs (T, B, T_tokens), the exit gate after each loop.
    """

    logits: Tensor
    hidden: Tensor
    exit_probs: Tensor


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (..., D) -> (..., D)."""
        x = x.to(self.weight.dtype)  # under autocast a linear layer's output is narrower than the weight
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotate the half-split pairs (i, i + Dh/2) of each head by its position (NEOX order).

    Shapes: x (B, H, C, Dh), positions (C,).
    """
    return rotate(x, *rope_angles(positions, x.shape[-1], theta, x.dtype))


def rope_angles(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every pair's angle. Shapes: positions (C,) -> two of (C, Dh/2)."""
    half = head_dim // 2
    device = "cpu" if positions.device.type == "mps" else positions.device  # Metal has no float64
    freqs = theta ** (-torch.arange(half, dtype=torch.float64, device=device) / half)
    angles = positions.to(device, torch.float64)[:, None] * freqs  # (C, Dh/2)
    return angles.cos().to(positions.device, dtype), angles.sin().to(positions.device, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The half-split pairs turned by these angles. Shapes: x (B, H, C, Dh), cos and sin (C, Dh/2)."""
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


class KVGate(nn.Module):
    """MELT's learned element-wise gate: what of the last loop's latent stays in the cache row.

    (ours) It acts on the normed input u, and its latent h starts from ``kv_gate_init``.
    """

    def __init__(self, config: LoopConfig) -> None:
        super().__init__()
        self.init = config.kv_gate_init
        self.x_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=True)  # Wz, bz
        self.h_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)  # Uz

    def forward(self, u: Tensor, h: Tensor | None) -> Tensor:
        """The new latent h, from which this loop's K and V are made.

        h is None in the first loop. Shapes: u, h (B, C, D) -> (B, C, D).
        """
        if h is None:
            if self.init == "input":
                return u
            h = torch.zeros_like(u)
        z = self.openness(u, h)
        return z * h + (1 - z) * u

    def openness(self, u: Tensor, h: Tensor) -> Tensor:
        """z, the share of the old latent that stays, 0 to 1. Shapes: u, h (B, C, D) -> (B, C, D)."""
        return torch.sigmoid(self.x_proj(u) + self.h_proj(h))


class Attention(nn.Module):
    """Causal attention over the cache; K and V come from the gate's latent, Q from the normed input."""

    def __init__(self, config: LoopConfig) -> None:
        super().__init__()
        self.config = config
        d, q = config.hidden_size, config.num_attention_heads * config.head_dim
        kv = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(d, q, bias=False)
        self.k_proj = nn.Linear(d, kv, bias=False)
        self.v_proj = nn.Linear(d, kv, bias=False)
        self.o_proj = nn.Linear(q, d, bias=False)
        if config.has_gate:
            self.kv_gate = KVGate(config)

    def forward(
        self, u: Tensor, h: Tensor | None, cache: KVCache, slot: int, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the attention output and the gate's latent. Shapes: u, h (B, C, D)."""
        h = self.kv_gate(u, h) if self.config.has_gate else u
        theta = self.config.rope_theta
        q = rope(self._heads(self.q_proj(u)), positions, theta)  # (B, H, C, Dh)
        k = rope(self._heads(self.k_proj(h)), positions, theta)  # (B, Hkv, C, Dh)
        v = self._heads(self.v_proj(h))
        k, v = cache.update(slot, k, v)  # (B, Hkv, L + C, Dh)
        key_positions = torch.arange(k.shape[2], device=u.device)
        causal = key_positions[None, :] <= positions[:, None]  # (C, L + C)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=causal, enable_gqa=True)
        return self.o_proj(a.transpose(1, 2).flatten(2)), h  # (B, C, D)

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)  # (B, C, H*Dh) -> (B, H, C, Dh)
        return heads


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: LoopConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, C, D) -> (B, C, D)."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderLayer(nn.Module):
    """One layer with sandwich norms: a norm before and one after each of attention and feed-forward."""

    def __init__(self, config: LoopConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.input_layernorm_2 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm_2 = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, h: Tensor | None, cache: KVCache, slot: int, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the residual stream and the gate's latent. Shapes: (B, C, D)."""
        u = self.input_layernorm(x)
        a, h = self.self_attn(u, h, cache, slot, positions)
        x = x + self.input_layernorm_2(a)
        x = x + self.post_attention_layernorm_2(self.mlp(self.post_attention_layernorm(x)))
        return x, h


class LoopStack(nn.Module):
    """Embedding, the N layers that every loop runs, the norm that closes each loop, the exit gate."""

    def __init__(self, config: LoopConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.early_exit_gate = nn.Linear(config.hidden_size, 1)


class LoopLM(nn.Module):
    """Ouro or MELT, as the configuration says. Parameter names are the checkpoint's."""

    def __init__(self, config: LoopConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LoopStack(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward_chunk(self, tokens: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        """Run all loops over one chunk and keep its rows in the cache.

        Shapes: tokens (B, C) int64 -> states after each loop (T, B, C, D), exit_probs (T, B, C).
        """
        config = self.config
        positions = torch.arange(len(cache), len(cache) + tokens.shape[1], device=tokens.device)
        x = self.model.embed_tokens(tokens)  # (B, C, D)
        latents: list[Tensor | None] = [None] * config.num_hidden_layers
        states, exit_probs = [], []
        for loop_idx in range(config.num_loops):
            for layer_idx, layer in enumerate(self.model.layers):
                slot = cache.slot(loop_idx, layer_idx)
                x, latents[layer_idx] = layer(x, latents[layer_idx], cache, slot, positions)
            x = self.model.norm(x)  # the final norm closes EVERY loop
            states.append(x)
            exit_probs.append(torch.sigmoid(self.model.early_exit_gate(x)).squeeze(-1))
        cache.commit()
        return torch.stack(states), torch.stack(exit_probs)

    def forward(self, tokens: Tensor, cache: KVCache | None = None, *, chunk_size: int | None = None) -> LoopOutput:
        """Logits of the tokens that follow those in the cache, cut into chunks from the first one on.

        chunk_size: tokens that see each other loop by loop; default the configuration's for MELT,
        all of them for Ouro, whose result does not depend on it.
        Shapes: tokens (B, n) int64 -> logits (B, n, V).
        """
        config = self.config
        cache = self.new_cache() if cache is None else cache
        if chunk_size is None:
            chunk_size = config.chunk_size if config.shares_kv else tokens.shape[1]
        hidden, exit_probs = [], []
        for chunk in tokens.split(chunk_size, dim=1):
            states, probs = self.forward_chunk(chunk, cache)
            hidden.append(select_exit(states, probs, config.early_exit_threshold))
            exit_probs.append(probs)
        x = torch.cat(hidden, dim=1)
        return LoopOutput(self.lm_head(x), x, torch.cat(exit_probs, dim=2))

    def new_cache(self) -> KVCache:
        """An empty cache of the kind that this model's attention reads."""
        return KVCache(self.config)


def select_exit(states: Tensor, exit_probs: Tensor, threshold: float) -> Tensor:
    """The state of the loop at which each token leaves; all loops run all the same.

    remaining *= 1 - exit_t; loop t is read as soon as 1 - remaining >= threshold, the last loop takes
    the rest. A threshold of 1 reads the last loop. Source: Ouro's released code.
    Shapes: states (T, B, C, D), exit_probs (T, B, C) -> (B, C, D).
    """
    if threshold >= 1.0:
        return states[-1]
    leaves = 1 - torch.cumprod(1 - exit_probs, dim=0) >= threshold  # (T, B, C)
    leaves[-1] = True
    first = leaves.to(torch.int8).argmax(dim=0)  # (B, C)
    return states.gather(0, first[None, ..., None].expand(1, *states.shape[1:]))[0]
