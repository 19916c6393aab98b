"""Right answers out of so many, and how sure that makes their share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

# Standard normal quantile of a two-sided interval of 95 %.
Z95 = 1.959963984540054


def wilson_interval(right: int, count: int, z: float = Z95) -> tuple[float, float]:
    """The bounds of the share right / count, 0..1; it stays sensible at 0, at ``count`` and for few.

    Source: Wilson (1927). Raises: ValueError unless 0 <= right <= count and count >= 1.
    """
    if not 0 <= right <= count or count < 1:
        raise ValueError(f"{right} right answers out of {count}, expected 0 to count and a count of at least 1")
    middle = (right + z**2 / 2) / (count + z**2)
    half = z / (count + z**2) * math.sqrt(right * (count - right) / count + z**2 / 4)
    # The bounds of none and of all are exact, but their arithmetic is not.
    return 0.0 if right == 0 else middle - half, 1.0 if right == count else middle + half


@dataclass(frozen=True)
class Score:
    """Right answers out of ``count``. Scores add up: ``sum(scores, Score())``."""

    right: int = 0
    count: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(self.right + other.right, self.count + other.count)

    @property
    def share(self) -> float:
        """Right answers per question, 0..1."""
        return self.right / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % bounds of the share, 0..1."""
        return wilson_interval(self.right, self.count)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.share:.1f} % ({self.right}/{self.count}, 95 %: {100 * low:.1f} to {100 * high:.1f})"

    def to_dict(self) -> dict[str, Any]:
        """As ``melt-edge eval --json`` prints it: accuracy and ci95 in 0..1, n."""
        return {"accuracy": self.share, "n": self.count, "ci95": list(self.interval)}
