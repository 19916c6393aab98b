"""How the gates start, and the gates that the element-wise one is compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from melt_edge.config import LoopConfig
from melt_edge.modeling import KVGate

# Standard deviation of the gate's matrices at the start, times 1 / sqrt(hidden_size).
START_SCALE = 0.1


@torch.no_grad()
def start_gate(gate: KVGate | ScalarGate, bias: float, generator: torch.Generator) -> None:
    """Give a gate the weights that training starts from: h = u nearly holds.

    z = sigmoid(b) is small for a negative bias (0.03 at -3.5), so that the row that stays is almost made
    from the last loop's normed input u, as the teacher's own last row is: the student starts next to a
    computation whose quality is known, and the transition only has to bridge the shared rows. It must not
    be smaller: the gradient of z is z (1 - z), and a gate at sigmoid(-10) would hardly ever open again.
    The matrices are small and random, so that z differs between channels and between tokens from the
    first step on, without moving far from sigmoid(b). The gates have a learning rate of their own, because
    they start from nothing while the other weights start from a trained model.
    """
    std = START_SCALE * gate.x_proj.in_features**-0.5
    gate.x_proj.weight.normal_(0.0, std, generator=generator)
    gate.h_proj.weight.normal_(0.0, std, generator=generator)
    gate.x_proj.bias.fill_(bias)


class ScalarGate(nn.Module):
    """Experiment: one z for a whole token instead of one for every channel."""

    def __init__(self, config: LoopConfig) -> None:
        super().__init__()
        self.init = config.kv_gate_init
        self.x_proj = nn.Linear(config.hidden_size, 1, bias=True)
        self.h_proj = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, u: Tensor, h: Tensor | None, loop_idx: int) -> Tensor:
        """The new latent; h is None in the first loop. Shapes: u, h (B, C, D) -> (B, C, D)."""
        if h is None:
            if self.init == "input":
                return u
            h = torch.zeros_like(u)
        z = self.openness(u, h)
        return z * h + (1 - z) * u

    def openness(self, u: Tensor, h: Tensor) -> Tensor:
        """z, the share of the old latent that stays. Shapes: u, h (B, C, D) -> (B, C, 1)."""
        return torch.sigmoid(self.x_proj(u) + self.h_proj(h))


class MeanGate(nn.Module):
    """Experiment: the latent is the mean of the loops' inputs so far. No weights."""

    def forward(self, u: Tensor, h: Tensor | None, loop_idx: int) -> Tensor:
        """The new latent; h is None in the first loop. Shapes: u, h (B, C, D) -> (B, C, D)."""
        return u if h is None else h + (u - h) / (loop_idx + 1)


class EmaGate(nn.Module):
    """Experiment: the latent is an exponential moving average of the loops' inputs. No weights."""

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay

    def forward(self, u: Tensor, h: Tensor | None, loop_idx: int) -> Tensor:
        """The new latent; h is None in the first loop. Shapes: u, h (B, C, D) -> (B, C, D)."""
        return u if h is None else self.decay * h + (1 - self.decay) * u


def make_gate(kind: str, config: LoopConfig, ema_decay: float) -> nn.Module | None:
    """The gate of one layer by its name in the settings; None for "none", which keeps the last loop's row."""
    if kind == "elementwise":
        return KVGate(config)
    if kind == "scalar":
        return ScalarGate(config)
    if kind == "mean":
        return MeanGate()
    return EmaGate(ema_decay) if kind == "ema" else None
