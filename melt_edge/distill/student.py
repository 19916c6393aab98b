"""The student's forward: the reference model with two streams of keys and values, mixed by alpha.

One residual stream runs through the layers. What it attends to is alpha * MELT's rows + (1 - alpha) * the
LoopLM's: at 0 the computation is the teacher's, at 1 it is MELT's, and nothing of the other stream exists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from melt_edge.config import LoopConfig
from melt_edge.distill.gates import ScalarGate, make_gate
from melt_edge.modeling import Attention, KVCache, KVGate, LoopLM, rope_angles, rotate

# The keys and values of one chunk: (MELT's stream, layer) or (the LoopLM's stream, loop and layer) -> K, V.
MELT, LOOP = "melt", "loop"
Rows = dict[tuple[str, int], tuple[Tensor, Tensor]]


class TransitionCache(KVCache):
    """The rows of both streams; alpha is MELT's share of what is attended to.

    MELT's rows are made from the gate's latent, one per layer, and restaged by every loop. The LoopLM's
    are made from the normed input, one per (loop, layer). With ``record`` the attention outputs of every
    (loop, layer) are collected; ``gate_means`` collects the mean of z of every loop if it is a list.
    With ``keep`` false it holds the rows of ``past`` alone, and hands those of the one chunk it is for out
    as ``last_rows``.
    """

    def __init__(
        self,
        config: LoopConfig,
        alpha: float = 1.0,
        past: Sequence[Rows] = (),
        *,
        record: bool = False,
        keep: bool = True,
    ) -> None:
        super().__init__(config)
        self.alpha = alpha
        self.record = record
        self.keep = keep
        self.outputs: list[Tensor] = []
        self.gate_means: list[list[Tensor]] | None = None
        self.last_rows: Rows = {}
        self._per_loop = KVCache(config)
        self._geometry: tuple[Tensor, Tensor, Tensor] | None = None
        for stream, slot in past[0] if past else ():
            pairs = [rows[stream, slot] for rows in past]
            kept = (torch.cat([k for k, _ in pairs], dim=2), torch.cat([v for _, v in pairs], dim=2))
            (self._kept if stream == MELT else self._per_loop._kept)[slot] = kept

    def slot(self, loop_idx: int, layer_idx: int) -> int:
        """The LoopLM's slot, which also names MELT's: the layer alone."""
        return loop_idx * self.config.num_hidden_layers + layer_idx

    def mix(
        self, slot: int, melt: tuple[Tensor, Tensor] | None, loop: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Stage this chunk's rows of the streams that exist at this alpha; return the rows to attend to.

        Shapes: k, v (B, Hkv, C, Dh) -> (B, Hkv, L + C, Dh).
        """
        if melt is not None:
            melt = self.update(slot % self.config.num_hidden_layers, *melt)
        if loop is not None:
            loop = self._per_loop.update(slot, *loop)
        if melt is None or loop is None:
            only = melt or loop
            assert only is not None
            return only
        a = self.alpha
        return a * melt[0] + (1 - a) * loop[0], a * melt[1] + (1 - a) * loop[1]

    def geometry(self, positions: Tensor, n_keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Cosine, sine and causal mask of the chunk: the same for every loop and layer, so made once.

        Shapes: (C, Dh/2) twice, (C, L + C) bool.
        """
        if self._geometry is None:
            cos, sin = rope_angles(positions, self.config.head_dim, self.config.rope_theta, dtype)
            keys = torch.arange(n_keys, device=positions.device)
            self._geometry = cos, sin, keys[None, :] <= positions[:, None]
        return self._geometry

    def commit(self) -> None:
        """Keep the rows staged last in every slot: the chunk is done."""
        self._geometry = None
        if self.keep:
            super().commit()
            self._per_loop.commit()
            return
        self.last_rows = {(MELT, slot): pair for slot, pair in self._staged.items()}
        self.last_rows |= {(LOOP, slot): pair for slot, pair in self._per_loop._staged.items()}

    def take_outputs(self) -> Tensor:
        """The attention outputs recorded since the last call. Shapes: (T * N, B, C, D)."""
        outputs, self.outputs = torch.stack(self.outputs), []
        return outputs

    def detach(self) -> None:
        """Cut the gradient to everything kept so far."""
        for store in (self._kept, self._per_loop._kept):
            for slot, (k, v) in store.items():
                store[slot] = (k.detach(), v.detach())

    def __len__(self) -> int:
        """Tokens kept (L)."""
        return max(super().__len__(), len(self._per_loop))

    @property
    def nbytes(self) -> int:
        """Bytes of the rows kept, of both streams."""
        return super().nbytes + self._per_loop.nbytes


class StudentAttention(Attention):
    """The reference's attention over the rows of a TransitionCache; parameter names are the reference's."""

    def __init__(self, config: LoopConfig, gate: nn.Module | None) -> None:
        super().__init__(replace(config, kv_gate="none"))
        if gate is not None:
            self.add_module("kv_gate", gate)

    def forward(
        self, u: Tensor, h: Tensor | None, cache: KVCache, slot: int, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the attention output and the gate's latent. Shapes: u, h (B, C, D)."""
        assert isinstance(cache, TransitionCache)
        loop_idx = slot // self.config.num_hidden_layers
        latent = u
        if cache.alpha > 0.0:
            latent = self._latent(u, h, loop_idx, cache)
        q = self._heads(self.q_proj(u))  # (B, H, C, Dh)
        cos, sin, causal = cache.geometry(positions, len(cache) + u.shape[1], q.dtype)
        melt = self._rows(latent, cos, sin) if cache.alpha > 0.0 else None
        loop = self._rows(u, cos, sin) if cache.alpha < 1.0 else None
        k, v = cache.mix(slot, melt, loop)  # (B, Hkv, L + C, Dh)
        a = F.scaled_dot_product_attention(rotate(q, cos, sin), k, v, attn_mask=causal, enable_gqa=True)
        out = self.o_proj(a.transpose(1, 2).flatten(2))  # (B, C, D)
        if cache.record:
            cache.outputs.append(out)
        return out, latent

    def _rows(self, source: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rotate(self._heads(self.k_proj(source)), cos, sin), self._heads(self.v_proj(source))

    def _latent(self, u: Tensor, h: Tensor | None, loop_idx: int, cache: TransitionCache) -> Tensor:
        gate: nn.Module | None = getattr(self, "kv_gate", None)
        if gate is None:
            return u
        if cache.gate_means is not None and isinstance(gate, (KVGate, ScalarGate)):
            with torch.no_grad():
                z = gate.openness(u, torch.zeros_like(u) if h is None else h)
            cache.gate_means[loop_idx].append(z.mean())
        latent: Tensor = gate(u, h) if isinstance(gate, KVGate) else gate(u, h, loop_idx)
        return latent


class StudentLM(LoopLM):
    """A LoopLM whose attention mixes two streams: the student at any alpha, and the teacher at 0.

    Parameter names are the checkpoint's; ``forward`` runs what the configuration names unless a cache says
    otherwise.
    """

    def __init__(self, config: LoopConfig, gate: str, *, ema_decay: float = 0.5) -> None:
        super().__init__(replace(config, kv_gate="none"))
        self.config = config
        self.gate = gate
        for layer in self.model.layers:
            layer.self_attn = StudentAttention(config, make_gate(gate, config, ema_decay))

    def chunk_logits(self, tokens: Tensor, cache: TransitionCache, wanted: Tensor) -> Tensor:
        """Run all loops over one chunk; the last loop's logits of the wanted tokens.

        Shapes: tokens (B, C) int64, wanted (B, C) bool with M of them true -> (M, V).
        """
        states, _ = self.forward_chunk(tokens, cache)
        logits: Tensor = self.lm_head(states[-1][wanted])
        return logits

    def new_cache(self) -> TransitionCache:
        """An empty cache at alpha = 1 for a MELT, at 0 for an Ouro."""
        return TransitionCache(self.config, alpha=1.0 if self.config.shares_kv else 0.0)


def student_config(teacher: LoopConfig, *, gate: str, gate_init: str, chunk_size: int) -> LoopConfig:
    """The MELT configuration of a teacher's student; an experiment's gate is called "none" in it."""
    melt = teacher.share_kv(chunk_size)
    return replace(melt, kv_gate="elementwise" if gate == "elementwise" else "none", kv_gate_init=gate_init)


def is_gate_parameter(name: str) -> bool:
    """True for the weights of a gate, which have a learning rate of their own."""
    return ".kv_gate." in name


def tie_head(model: LoopLM, config: LoopConfig) -> None:
    """Make the head the embedding again where the configuration ties them, as after loading."""
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def load_weights(model: LoopLM, tensors: Mapping[str, Tensor]) -> None:
    """Give a model on the meta device its weights. Raises: RuntimeError if the names differ."""
    state = dict(tensors)
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    tie_head(model, model.config)
