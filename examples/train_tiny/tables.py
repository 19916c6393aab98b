"""What was measured, as the Markdown table of the model cards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def accuracy_table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Right answers in percent by kind of problem, "all" last with its interval; a column for each measurement."""
    kinds = sorted(next(iter(columns.values())), key=lambda kind: (kind == "all", kind))
    lines = [f"| problems | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for kind in kinds:
        shares = [_share(column[kind], whole=kind == "all") for column in columns.values()]
        lines.append(f"| {kind} | {' | '.join(shares)} |")
    return "\n".join(lines) + "\n"


def _share(score: Mapping[str, Any], *, whole: bool) -> str:
    low, high = score["ci95"]
    interval = f" ({100 * low:.1f} to {100 * high:.1f})" if whole else ""
    return f"{100 * score['accuracy']:.1f}{interval}"
