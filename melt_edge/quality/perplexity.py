"""Perplexity of a text: how surprised a model is by each token, on logits that a function gives."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from melt_edge.quality.numeric import (
    Float32Array,
    Float64Array,
    exp_with_error,
    log_softmax,
    mean_and_error,
    row_blocks,
)
from melt_edge.quality.windows import LogitsFunction, Windows

# Windows done so far and the value over them, after each window.
Progress = Callable[[int, float], None]


@dataclass(frozen=True)
class Perplexity:
    """A text's perplexity under a model.

    value: exp of the mean surprise; error: its standard error, as if tokens were independent.
    bits_per_byte: the scored tokens' surprise in bits, divided by the bytes they stand for; unlike the
    perplexity it may be compared between models of different vocabularies.
    """

    value: float
    error: float
    bits_per_byte: float
    n_scored: int


def surprise(logits: Float32Array, targets: npt.NDArray[np.int64]) -> Float64Array:
    """Minus the log probability of each row's target, in nats. Shapes: (n, V), (n,) -> (n,)."""
    result = np.empty(len(targets))
    for rows in row_blocks(*logits.shape):
        log_p = log_softmax(logits[rows])
        result[rows] = -np.take_along_axis(log_p, targets[rows, None], axis=1)[:, 0]
    return result


def measure_perplexity(
    logits: LogitsFunction,
    windows: Windows,
    *,
    token_bytes: Callable[[int], int],
    progress: Progress | None = None,
) -> Perplexity:
    """The perplexity over the scored tokens, window by window: one window's logits are held at a time.

    token_bytes: the number of bytes a token id stands for.
    """
    size = functools.cache(token_bytes)
    nats = np.empty(windows.total_scored)
    n_bytes = done = 0
    for count, window in enumerate(windows, 1):
        end = done + windows.n_scored
        nats[done:end] = surprise(window.scored_rows(logits(window.inputs)), window.targets)
        n_bytes += sum(size(int(token)) for token in window.targets)
        done = end
        if progress is not None:
            progress(count, exp_with_error(float(nats[:done].mean()), 0.0)[0])
    value, error = exp_with_error(*mean_and_error(nats))
    bits = float(nats.sum()) / math.log(2)
    return Perplexity(value, error, bits / n_bytes if n_bytes else math.nan, len(nats))
