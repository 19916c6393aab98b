"""Rows as a picture: memory against loops, memory against context, decode speed against context.

Needs matplotlib, the extra "plot". Colours are Okabe and Ito's, told apart by people who see fewer of them;
every line has its own marker as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from melt_edge.compare.points import KINDS, Row
from melt_edge.compare.table import span
from melt_edge.errors import BackendUnavailableError, ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOT_FORMATS = ("png", "svg")
# colour and marker, in the order they are drawn
_STYLES = {
    "ouro": ("#D55E00", "^"),
    "dense": ("#555555", "s"),
    "no-gate": ("#009E73", "D"),
    "melt": ("#0072B2", "o"),
}


def check_plot(path: Path) -> None:
    """Raises: ConfigError for a name that is neither .png nor .svg, BackendUnavailableError without matplotlib."""
    if path.suffix.lower().lstrip(".") not in PLOT_FORMATS:
        raise ConfigError(f"{path}: a plot is written as .png or .svg; choose a name that ends so")
    try:
        import matplotlib  # noqa: F401
    except ImportError as err:
        raise BackendUnavailableError(
            f"a plot needs matplotlib ({err}); install it with: pip install 'melt-edge[plot]'"
        ) from err


def write_plot(rows: Sequence[Row], path: Path, *, format: str) -> None:
    """Draw the rows into a file, three panels for each cache type. format: one of PLOT_FORMATS."""
    from matplotlib.figure import Figure  # without pyplot: no window, nothing left between calls

    kv_types = list(dict.fromkeys(row.kv_type for row in rows))
    figure = Figure(figsize=(13, 4.2 * len(kv_types) + 0.6), layout="constrained")
    models = list(dict.fromkeys(row.model for row in rows))
    for axes, kv_type in zip(figure.subplots(len(kv_types), 3, squeeze=False), kv_types, strict=True):
        _draw_panels(axes, [row for row in rows if row.kv_type == kv_type], models)
    threads = "1 thread" if rows[0].n_threads == 1 else f"{rows[0].n_threads} threads"
    figure.suptitle(", ".join([*models, threads, *_memory_speed(rows)]))
    _legend(figure, rows, models)
    figure.savefig(path, format=format, dpi=150)


def _memory_speed(rows: Sequence[Row]) -> list[str]:
    """What memory gave while the points were decoded: a machine that others share may not give the same to all."""
    found = [row.bandwidth / 1e9 for row in rows if row.bandwidth]
    return [f"memory at {span(found, '.0f')} GB/s while decoding"] if found else []


def _draw_panels(axes: Sequence[Axes], rows: Sequence[Row], models: Sequence[str]) -> None:
    by_loops, by_context, speed = axes
    kv_type, n_ctx, loops = rows[0].kv_type, max(row.n_ctx for row in rows), _usual_loops(rows)
    sized = [row for row in rows if row.total_bytes is not None]
    unit, scale = _unit(sized)

    def size(row: Row) -> float:
        return (row.total_bytes or 0) / scale

    at_ctx = [row for row in sized if row.n_ctx == n_ctx]
    # an Ouro with one loop is the dense model: its line begins there
    begin = [replace(row, kind="ouro") for row in at_ctx if row.kind == "dense"]
    _lines(by_loops, models, [*begin, *at_ctx], lambda row: row.loops, size)
    at_loops = [row for row in rows if row.kind == "dense" or row.loops == loops]
    _lines(by_context, models, [row for row in at_loops if row in sized], lambda row: row.n_ctx, size)
    timed = [row for row in at_loops if row.decode_tps]
    _lines(speed, models, timed, lambda row: row.n_ctx, lambda row: row.decode_tps or 0.0)

    with_loops = "1 loop" if loops == 1 else f"{loops} loops"
    _dress(by_loops, f"Memory at {n_ctx:,} tokens", "loops", f"weights + {kv_type} cache + buffers ({unit})")
    _dress(by_context, f"Memory with {with_loops}", "context (tokens)", f"weights + {kv_type} cache + buffers ({unit})")
    _dress(speed, f"Decode speed with {with_loops}", "context (tokens)", f"decode, {kv_type} cache (tokens/s)")
    by_loops.set_xticks(sorted({row.loops for row in rows}))
    by_loops.set_xlim(0, 1.08 * max(row.loops for row in rows))
    for axis in (by_context, speed):
        axis.set_xlim(0, 1.08 * n_ctx)
        axis.locator_params(axis="x", nbins=5)
        axis.xaxis.set_major_formatter("{x:,.0f}")


def _usual_loops(rows: Sequence[Row]) -> int:
    """4, as the published models were trained, where that was asked for; else the most."""
    looped = {row.loops for row in rows if row.kind != "dense"} or {1}
    return 4 if 4 in looped else max(looped)


def _unit(rows: Sequence[Row]) -> tuple[str, int]:
    largest = max((row.total_bytes or 0 for row in rows), default=0)
    return ("GiB", 2**30) if largest >= 2**30 else ("MiB", 2**20)


def _lines(
    axis: Axes, models: Sequence[str], rows: Sequence[Row], x: Callable[[Row], float], y: Callable[[Row], float]
) -> None:
    """A line for each kind and model; points that were computed are hollow."""
    for kind, (color, marker) in _STYLES.items():
        for model in models:
            line = sorted((row for row in rows if (row.kind, row.model) == (kind, model)), key=x)
            dashes = _dashes(models.index(model))
            axis.plot([x(row) for row in line], [y(row) for row in line], color=color, linestyle=dashes, linewidth=2)
            for row in line:
                fill = color if row.status == "measured" else "white"
                axis.plot(x(row), y(row), color=color, marker=marker, markersize=8, markerfacecolor=fill)


def _dress(axis: Axes, title: str, x_label: str, y_label: str) -> None:
    axis.set(title=title, xlabel=x_label, ylabel=y_label)
    # from zero, so that heights compare; without points there is nothing to end above
    top = axis.dataLim.y1
    axis.set_ylim(0.0, 1.08 * top if 0.0 < top < math.inf else 1.0)
    axis.grid(axis="y", color="#dddddd", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _dashes(number: int) -> tuple[float, Sequence[float]]:
    """The line style of the model of this number: gap and dash lengths."""
    return (0.0, ((), (5, 2), (1, 1.5), (6, 2, 1, 2))[number % 4])


def _legend(figure: Figure, rows: Sequence[Row], models: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    kinds = {row.kind for row in rows}
    handles = [
        Line2D([], [], color=_STYLES[kind][0], marker=_STYLES[kind][1], markersize=8, linewidth=2, label=label)
        for kind, label in {**KINDS, "dense": "dense (one loop)"}.items()
        if kind in kinds
    ]
    if len(models) > 1:
        handles += [
            Line2D([], [], color="black", linestyle=_dashes(number), label=model) for number, model in enumerate(models)
        ]
    if any(row.bytes_from == "computed" for row in rows):
        hollow = Line2D([], [], color="black", marker="o", markersize=8, linestyle="", label="computed, not measured")
        hollow.set_markerfacecolor("white")
        handles.append(hollow)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
