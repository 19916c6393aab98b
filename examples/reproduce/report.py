"""Runs as a table (Markdown), as numbers (JSON) and as a picture (SVG)."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import EXPERIMENTS, Experiment
from matplotlib.figure import Figure

from melt_edge.files import atomic_output, write_text

# Okabe and Ito's colours, told apart by people who see fewer of them.
TEACHER, UNTRAINED, MELT, ABLATION = "#D55E00", "#009E73", "#0072B2", "#999999"


def write_report(out: Path, runs: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Write results.json, results.md and results.svg."""
    write_text(out / "results.json", json.dumps({"about": about, "runs": list(runs)}, indent=1) + "\n")
    write_text(out / "results.md", markdown(runs, about))
    with atomic_output(out / "results.svg", force=True) as part:
        draw(runs, about).savefig(part, format="svg", metadata={"Date": None})


def shares(runs: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """The accuracies of a row, 0..1, one for each seed."""
    return [run["accuracy"] for run in runs if run["row"] == key]


def markdown(runs: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """The table: mean and spread over the seeds, the difference to MELT of the same seeds."""
    steps = range(1, about["max_steps"] + 1)
    lines = [
        f"Right answers of {about['problems']} test problems of the task {about['task']}, 1 to {about['max_steps']} "
        "steps, one token at a time, in percent:",
        "mean over the seeds, lowest to highest in brackets.",
        "",
        f"| | seeds | right | to MELT | {' | '.join(f'{n} steps' if n > 1 else '1 step' for n in steps)} | paper |",
        f"|---|---|---|---|{'---|' * len(steps)}---|",
    ]
    melt = {run["seed"]: run["accuracy"] for run in runs if run["row"] == "melt"}
    for experiment in EXPERIMENTS:
        found = [run for run in runs if run["row"] == experiment.key]
        if not found:
            continue
        values = [100 * run["accuracy"] for run in found]
        spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
        pairs = [100 * (run["accuracy"] - melt[run["seed"]]) for run in found if run["seed"] in melt]
        difference = f"{statistics.fmean(pairs):+.1f}" if pairs and experiment.key != "melt" else ""
        by_steps = [
            f"{100 * statistics.fmean(run['by_difficulty'][str(n)]['accuracy'] for run in found):.0f}" for n in steps
        ]
        lines.append(
            f"| {experiment.name} | {len(values)} | {statistics.fmean(values):.1f}{spread} | {difference} "
            f"| {' | '.join(by_steps)} | {experiment.paper} |"
        )
    machine = about["machine"]
    lines += [
        "",
        f"{about['seconds'] / 60:.0f} minutes in all on {about['threads']} thread of {machine['cpu']}, "
        f"torch {about['torch']}, commit {str(about['commit'])[:12]}.",
    ]
    return "\n".join(lines) + "\n"


def draw(runs: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> Figure:
    """A bar for each row, a dot for each seed."""
    rows = [experiment for experiment in EXPERIMENTS if shares(runs, experiment.key)]
    figure = Figure(figsize=(8.5, 0.38 * len(rows) + 1.3), layout="constrained")
    axes = figure.subplots()
    for place, experiment in enumerate(rows):
        values = [100 * share for share in shares(runs, experiment.key)]
        axes.barh(place, statistics.fmean(values), color=_colour(experiment), height=0.7)
        axes.plot(values, [place] * len(values), "k|", markersize=9)
        axes.text(102, place, f"{statistics.fmean(values):.1f}", va="center", ha="left", fontsize=9)
    axes.set_yticks(range(len(rows)), [experiment.name for experiment in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"right answers, %: {about['task']}, 1 to {about['max_steps']} steps, one token at a time")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _colour(experiment: Experiment) -> str:
    if experiment.key == "melt":
        return MELT
    if experiment.shared:
        return UNTRAINED
    return TEACHER if experiment.loops is not None else ABLATION
