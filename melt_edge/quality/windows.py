"""Which tokens of a text are scored, and after which context: windows as llama-perplexity cuts them.

Every window is computed from an empty context, and only tokens of its second half are scored, so that each
of them has at least half a window before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from melt_edge.errors import ConfigError
from melt_edge.quality.numeric import Float32Array

MIN_CTX = 4

# Token ids of one window -> the logits after each of them, (n_ctx, V).
LogitsFunction = Callable[[Sequence[int]], Float32Array]


@dataclass(frozen=True)
class Window:
    """The token ids to compute, and those at its end to score."""

    inputs: list[int]
    targets: npt.NDArray[np.int64]

    def scored_rows(self, logits: Float32Array) -> Float32Array:
        """The rows that predict the targets: a token's row is the one before it. Shapes: (n_ctx, V) -> (n, V)."""
        return logits[-1 - len(self.targets) : -1]


@dataclass(frozen=True)
class Windows:
    """A text cut into ``count`` windows of ``n_ctx`` tokens, ``step`` apart; each scores its last ``n_scored``.

    bos: what a window's first token is replaced by, for a model whose texts begin with it.
    """

    tokens: Sequence[int]
    n_ctx: int
    step: int
    n_scored: int
    count: int
    bos: int | None = None

    @property
    def total_scored(self) -> int:
        """Scored tokens of all windows."""
        return self.count * self.n_scored

    def __iter__(self) -> Iterator[Window]:
        for start in range(0, self.count * self.step, self.step):
            inputs = list(self.tokens[start : start + self.n_ctx])
            targets = np.array(inputs[-self.n_scored :], dtype=np.int64)
            if self.bos is not None:
                inputs[0] = self.bos
            yield Window(inputs, targets)


def cut_windows(
    tokens: Sequence[int], n_ctx: int, *, stride: int | None = None, bos: int | None = None, source: str = "the text"
) -> Windows:
    """Cut a text; tokens after the last whole window are left out.

    stride: None lets the windows follow one another and scores the second half of each, less its first
    token, as llama-perplexity does. A number of tokens, up to half a window, lets them overlap and scores
    the last ``stride`` of each: every token once, after more context, for n_ctx / stride times the work.

    Raises: ConfigError for a window or stride that scores nothing, or a text shorter than one window.
    """
    if n_ctx < MIN_CTX:
        raise ConfigError(f"a window has {n_ctx} tokens, expected at least {MIN_CTX}")
    half = n_ctx // 2
    if stride is not None and not 1 <= stride <= half:
        raise ConfigError(f"the stride is {stride} tokens, expected 1 to {half}, half of a window of {n_ctx}")
    if len(tokens) < n_ctx:
        raise ConfigError(
            f"{source}: has {len(tokens)} tokens, expected at least one window of {n_ctx}; "
            "use a longer text or smaller windows (--ctx)"
        )
    if stride is None:
        return Windows(tokens, n_ctx, n_ctx, n_ctx - half - 1, len(tokens) // n_ctx, bos)
    return Windows(tokens, n_ctx, stride, stride, (len(tokens) - n_ctx) // stride + 1, bos)
