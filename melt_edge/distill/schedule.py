"""What changes from step to step: alpha, the learning rates, the weight of the alignment, the chunk size."""

from __future__ import annotations

import math
from random import Random

from melt_edge.distill.settings import Settings

TRANSITION, ALIGNMENT = "transition", "alignment"


def phase(settings: Settings, step: int) -> str:
    """The phase that a step belongs to."""
    return TRANSITION if step < settings.transition_steps else ALIGNMENT


def alpha(settings: Settings, step: int) -> float:
    """MELT's share of the keys and values, rising by equal steps; 1 in the last step of phase 1 and ever after.

    The first step is one step away from 0, where the student is its teacher and there is nothing to learn.
    """
    if phase(settings, step) == ALIGNMENT:
        return 1.0
    return (step + 1) / settings.transition_steps


def beta(settings: Settings, step: int) -> float:
    """Weight of the attention alignment."""
    return settings.transition_beta if phase(settings, step) == TRANSITION else settings.beta


def learning_rate_share(settings: Settings, step: int) -> float:
    """Both learning rates as a share of their peaks: linear warm-up, then a cosine over both phases."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.total_steps - settings.warmup_steps)
    low = settings.final_learning_rate_share
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))


def chunk_size(settings: Settings, step: int) -> int:
    """The chunk size of a step's batch; 0 is the whole sequence. Depends on seed and step alone."""
    return Random(f"chunk {settings.seed} {step}").choice(settings.chunk_size)
