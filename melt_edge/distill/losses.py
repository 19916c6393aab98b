"""The two parts of the loss, as sums over tokens: the caller divides by the tokens of the whole batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def kd_sum(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of the next token, temperature 1, summed over tokens, in nats.

    Shapes: logits (M, V) -> ().
    """
    log_p = F.log_softmax(_wide(teacher), dim=-1)
    log_q = F.log_softmax(_wide(student), dim=-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="sum")


def alignment_sum(student: Tensor, teacher: Tensor, present: Tensor) -> Tensor:
    """Squared distance of the attention outputs, mean over loops and layers, summed over the tokens present.

    (ours) The outputs are those after the output projection, before the norm that follows it.
    Shapes: outputs (T * N, B, C, D), present (B, C) bool -> ().
    """
    squared = (_wide(student) - _wide(teacher)).square().sum(-1)  # (T * N, B, C)
    return (squared * present).sum() / len(squared)


def _wide(x: Tensor) -> Tensor:
    """At least float32: a sum of many bfloat16 values would lose most of them."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
