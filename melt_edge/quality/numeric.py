"""The arithmetic that both measures share, in float64: log-softmax by rows, means and their errors."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

# Logits are widened to float64 so many values at a time (16 MiB), however large the vocabulary is.
BLOCK_VALUES = 2**21


def log_softmax(logits: Float32Array | Float64Array) -> Float64Array:
    """Natural logarithms of the softmax over the last axis. Shapes: (..., V) -> (..., V)."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return x


def row_blocks(n_rows: int, n_vocab: int) -> Iterator[slice]:
    """Slices that cover the rows in order, each of at most BLOCK_VALUES values or one row."""
    step = max(1, BLOCK_VALUES // n_vocab)
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def mean_and_error(values: Float64Array) -> tuple[float, float]:
    """The mean and its standard error, as if the values were independent; the error of one value is nan."""
    mean = float(values.mean())
    if len(values) < 2:
        return mean, math.nan
    return mean, float(values.std(ddof=1)) / math.sqrt(len(values))


def exp_with_error(mean: float, error: float) -> tuple[float, float]:
    """exp(mean) and its standard error to first order; infinite where float64 ends."""
    value = math.exp(mean) if mean < math.log(np.finfo(np.float64).max) else math.inf
    return value, value * error if error else 0.0


def wilson_interval(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a share, of 95 % unless ``z`` says otherwise. Needs n > 0."""
    share, spread = hits / n, z * z / n
    center = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, (center - half) / (1 + spread)), min(1.0, (center + half) / (1 + spread))
