"""The looped language-model objective that a teacher is trained with: every loop's output, and the exit gate.

Source: Ouro, arXiv 2510.25741, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from melt_edge.modeling import KVCache, LoopLM

# Weight of the exit distribution's entropy: keeps the gate from settling on one loop.
ENTROPY_WEIGHT = 0.1


def loop_loss(
    model: LoopLM,
    tokens: Tensor,
    is_answer: Tensor,
    cuts: Sequence[int] = (),
    *,
    entropy_weight: float = ENTROPY_WEIGHT,
) -> tuple[Tensor, Tensor]:
    """The training loss, and the cross entropy of every loop's output (T,) in nats per answer token.

    Ouro's objective, sum_t p_t L_t - entropy_weight H(p) with p the exit gate's distribution over the
    loops, plus the last loop's own loss, which is the one that is read by default. The tokens are cut
    into chunks before the positions ``cuts``; rows of earlier chunks are those that the cache of
    ``model.config`` keeps. is_answer: tokens to be learned; all but those are context.
    Shapes: tokens (B, n) int64, is_answer (B, n) bool.
    """
    cache = KVCache(model.config)
    chunks = [model.forward_chunk(chunk, cache) for chunk in tokens[:, :-1].tensor_split(list(cuts), dim=1)]
    wanted = is_answer[:, 1:]  # (B, n - 1): the next token is part of an answer
    states = torch.cat([s for s, _ in chunks], dim=2)[:, wanted]  # (T, M, D), M answer tokens
    exits = torch.cat([e for _, e in chunks], dim=2)[:, wanted]  # (T, M)
    logits = model.lm_head(states)  # (T, M, V)
    targets = tokens[:, 1:][wanted].expand(logits.shape[0], -1)  # (T, M)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(exits)
    p = exit_distribution(exits)
    entropy = -(p * p.clamp_min(1e-9).log()).sum(0)  # (M,)
    loss = losses[-1] + (p * losses).sum(0) - entropy_weight * entropy
    return loss.mean(), losses.mean(1).detach()


def exit_distribution(exits: Tensor) -> Tensor:
    """The chance that a token leaves at each loop; the last loop takes the rest. Shapes: (T, M) -> (T, M)."""
    stays = torch.cumprod(1 - exits, dim=0)
    before = torch.cat((torch.ones_like(stays[:1]), stays[:-1]))
    return torch.cat((before[:-1] * exits[:-1], before[-1:]))
