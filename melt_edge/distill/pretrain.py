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
    wanted = is_answer[:, 1:]  # (B, n - 1): the next token is part of an answer
    states, exits = _unroll(model, tokens, wanted, cuts)  # (T, M, D) and (T, M), M answer tokens
    logits = model.lm_head(states)  # (T, M, V)
    targets = tokens[:, 1:][wanted].expand(logits.shape[0], -1)  # (T, M)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(exits)
    p = exit_distribution(exits)
    entropy = -(p * p.clamp_min(1e-9).log()).sum(0)  # (M,)
    loss = losses[-1] + (p * losses).sum(0) - entropy_weight * entropy
    return loss.mean(), losses.mean(1).detach()


def guided_loss(model: LoopLM, tokens: Tensor, guide: Tensor, cuts: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """A loss that tells every loop what it is to say, for the beginning of a training, and that of every loop (T,).

    Where an answer takes several steps, the loops before the last are given the stations on the way; they
    do not find them from the answer alone as soon. The mean of the loops' losses, plus the last one's own;
    the exit gate is not trained by it. guide: -1 where nothing is to be said.
    Shapes: tokens (B, n) int64, guide (T, B, n - 1) int64.
    """
    wanted = (guide >= 0).any(0)  # (B, n - 1)
    states, _ = _unroll(model, tokens, wanted, cuts)  # (T, M, D)
    said = guide[:, wanted]  # (T, M)
    logits = model.lm_head(states).transpose(1, 2)  # (T, V, M)
    given = said >= 0
    losses = F.cross_entropy(logits, said.clamp_min(0), reduction="none") * given  # (T, M)
    losses = losses.sum(1) / given.sum(1).clamp_min(1)
    return losses.mean() + losses[-1], losses.detach()


def _unroll(model: LoopLM, tokens: Tensor, wanted: Tensor, cuts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """States (T, M, D) and exit probabilities (T, M) of the wanted places; every token but the last is read."""
    cache = KVCache(model.config)
    chunks = [model.forward_chunk(chunk, cache) for chunk in tokens[:, :-1].tensor_split(list(cuts), dim=1)]
    states = torch.cat([s for s, _ in chunks], dim=2)[:, wanted]
    return states, torch.cat([e for _, e in chunks], dim=2)[:, wanted]


def exit_distribution(exits: Tensor) -> Tensor:
    """The chance that a token leaves at each loop; the last loop takes the rest. Shapes: (T, M) -> (T, M)."""
    stays = torch.cumprod(1 - exits, dim=0)
    before = torch.cat((torch.ones_like(stays[:1]), stays[:-1]))
    return torch.cat((before[:-1] * exits[:-1], before[-1:]))
