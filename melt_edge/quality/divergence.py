"""KL divergence of a model from a base on the same text: what quantisation, chunks or a cache type change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from melt_edge.quality.numeric import (
    Float32Array,
    Float64Array,
    exp_with_error,
    log_softmax,
    mean_and_error,
    row_blocks,
    wilson_interval,
)
from melt_edge.quality.perplexity import Progress
from melt_edge.quality.windows import LogitsFunction, Windows


class TokenScores(NamedTuple):
    """One value per scored token: KL(base || model) and both surprises in nats, and whether the top token is one."""

    kl: Float64Array
    same_top: npt.NDArray[np.bool_]
    base_nats: Float64Array
    model_nats: Float64Array


@dataclass(frozen=True)
class Divergence:
    """How a model's predictions differ from a base's, over all scored tokens.

    mean, median, p90, p99, p99_9, maximum: KL(base || model) per token in nats; percentiles interpolate.
    same_top: share of tokens where both would choose the same one; same_top_interval: 95 %, Wilson.
    rms_delta_p: root mean square of the change of the right token's probability.
    ppl_ratio: the model's perplexity over the base's; its error takes both on the same tokens.
    All errors are standard errors, as if tokens were independent.
    """

    mean: float
    mean_error: float
    median: float
    p90: float
    p99: float
    p99_9: float
    maximum: float
    same_top: float
    same_top_interval: tuple[float, float]
    rms_delta_p: float
    ppl: float
    ppl_error: float
    base_ppl: float
    base_ppl_error: float
    ppl_ratio: float
    ppl_ratio_error: float
    n_scored: int


def kl_from_logs(log_p: Float64Array, log_q: Float64Array) -> Float64Array:
    """KL(p || q) of each row, in nats, from natural logarithms. Shapes: (n, V) -> (n,)."""
    result: Float64Array = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    return result


def compare_rows(base: Float32Array, model: Float32Array, targets: npt.NDArray[np.int64]) -> TokenScores:
    """The scores of rows of logits. Shapes: base, model (n, V), targets (n,)."""
    n = len(targets)
    scores = TokenScores(np.empty(n), np.empty(n, dtype=np.bool_), np.empty(n), np.empty(n))
    for rows in row_blocks(*base.shape):
        log_p, log_q = log_softmax(base[rows]), log_softmax(model[rows])
        chosen = targets[rows, None]
        scores.kl[rows] = kl_from_logs(log_p, log_q)
        scores.same_top[rows] = base[rows].argmax(axis=-1) == model[rows].argmax(axis=-1)
        scores.base_nats[rows] = -np.take_along_axis(log_p, chosen, axis=1)[:, 0]
        scores.model_nats[rows] = -np.take_along_axis(log_q, chosen, axis=1)[:, 0]
    return scores


def measure_divergence(
    model: LogitsFunction, base: LogitsFunction, windows: Windows, *, progress: Progress | None = None
) -> Divergence:
    """Compare two models window by window: one window's logits of each are held at a time.

    progress: is told the mean KL divergence so far.
    """
    parts: list[TokenScores] = []
    kl_sum = 0.0
    for count, window in enumerate(windows, 1):
        base_rows, model_rows = window.scored_rows(base(window.inputs)), window.scored_rows(model(window.inputs))
        parts.append(compare_rows(base_rows, model_rows, window.targets))
        kl_sum += float(parts[-1].kl.sum())
        if progress is not None:
            progress(count, kl_sum / (count * windows.n_scored))
    return summarise(parts)


def summarise(parts: list[TokenScores]) -> Divergence:
    """The statistics over the scores of one or more windows."""
    kl = np.concatenate([part.kl for part in parts])
    same = np.concatenate([part.same_top for part in parts])
    base = np.concatenate([part.base_nats for part in parts])
    model = np.concatenate([part.model_nats for part in parts])
    mean, mean_error = mean_and_error(kl)
    median, p90, p99, p99_9 = (float(value) for value in np.percentile(kl, (50, 90, 99, 99.9)))
    ppl, ppl_error = exp_with_error(*mean_and_error(model))
    base_ppl, base_ppl_error = exp_with_error(*mean_and_error(base))
    ratio, ratio_error = exp_with_error(*mean_and_error(model - base))
    return Divergence(
        mean=mean,
        mean_error=mean_error,
        median=median,
        p90=p90,
        p99=p99,
        p99_9=p99_9,
        maximum=float(kl.max()),
        same_top=float(same.mean()),
        same_top_interval=wilson_interval(int(same.sum()), len(same)),
        rms_delta_p=float(np.sqrt(np.mean((np.exp(-model) - np.exp(-base)) ** 2))),
        ppl=ppl,
        ppl_error=ppl_error,
        base_ppl=base_ppl,
        base_ppl_error=base_ppl_error,
        ppl_ratio=ratio,
        ppl_ratio_error=ratio_error,
        n_scored=len(kl),
    )
