"""What was measured, as the Markdown tables of the model cards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def task_tables(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Accuracy on the tasks by number of steps and by task; a column for each model and number of loops."""
    first = next(iter(columns.values()))
    rows: list[tuple[str, list[Mapping[str, Any]]]] = []
    for steps in first["by_difficulty"]:
        rows.append(
            (f"{steps} step{'s' if steps != '1' else ''}", [c["by_difficulty"][steps] for c in columns.values()])
        )
    for task in first["by_task"]:
        rows.append((task, [column["by_task"][task] for column in columns.values()]))
    rows.append(("**all**", list(columns.values())))
    return _table("problems", list(columns), rows)


def sums_table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Accuracy on held-out sums by kind, "all" last."""
    kinds = sorted(next(iter(columns.values())), key=lambda kind: (kind == "all", kind))
    return _table("problems", list(columns), [(kind, [c[kind] for c in columns.values()]) for kind in kinds])


def _table(corner: str, names: Sequence[str], rows: Sequence[tuple[str, list[Mapping[str, Any]]]]) -> str:
    lines = [f"| {corner} | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for name, scores in rows:
        lines.append(f"| {name} | {' | '.join(_share(score, whole=name == rows[-1][0]) for score in scores)} |")
    return "\n".join(lines) + "\n"


def _share(score: Mapping[str, Any], *, whole: bool) -> str:
    low, high = score["ci95"]
    interval = f" ({100 * low:.1f} to {100 * high:.1f})" if whole else ""
    return f"{100 * score['accuracy']:.1f}{interval}"
