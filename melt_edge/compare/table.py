"""Rows as tables for people, and as a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from melt_edge.compare.paper import longest_pair
from melt_edge.compare.points import KINDS, Row

_COLUMNS = (
    "T",
    "cache\nMiB",
    "weights\nMiB",
    "buffers\nMiB",
    "resident\nMiB",
    "TTFT\ns",
    "prefill\ntok/s",
    "decode\ntok/s",
    "RAM\nGB/s",
)

# nine columns on a terminal of 80; the ten above stand one space apart
_PADDING = (0, 1, 0, 0)


def tables(rows: Sequence[Row]) -> list[Table]:
    """A table for each model, context, cache type and backend, in the order they were measured.

    Sizes that were computed because a point was not measured are dim and marked with ~.
    """
    groups: dict[tuple[str, int, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.model, row.n_ctx, row.kv_type, row.backend), []).append(row)
    return [_table(key, group) for key, group in groups.items()]


def _table(key: tuple[str, int, str, str], rows: Sequence[Row]) -> Table:
    model, n_ctx, kv_type, backend = key
    title = Text(f"{model}: {n_ctx:,} tokens, {kv_type} cache, {backend}")
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("")
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    for row in sorted(rows, key=lambda row: (list(KINDS).index(row.kind), row.loops)):
        table.add_row(*_cells(row), style="" if row.status == "measured" else "dim")
    return table


def _cells(row: Row) -> list[str]:
    mark = "~" if row.bytes_from == "computed" else ""
    sizes = [mark + mib(size) if size is not None else "-" for size in _sizes(row)]
    resident = row.rss_filled_bytes or row.footprint_filled_bytes
    if row.status != "measured":
        return [KINDS[row.kind], str(row.loops), *sizes, row.status, "-", "-", "-", "-"]
    ttft = digits(row.ttft_ms / 1000) if row.ttft_ms is not None else "-"
    speeds = [ttft, *(digits(speed or 0.0) for speed in (row.prefill_tps, row.decode_tps))]
    memory = f"{row.bandwidth / 1e9:.0f}" if row.bandwidth else "-"
    return [KINDS[row.kind], str(row.loops), *sizes, mib(resident) if resident else "-", *speeds, memory]


def _sizes(row: Row) -> tuple[int | None, int | None, int | None]:
    return row.kv_bytes, row.weights_bytes, row.compute_bytes


def ratio_lines(rows: Sequence[Row]) -> list[str]:
    """A sentence for each number of loops and cache type: Ouro's memory over MELT's, at the longest context."""
    lines = []
    for loops in sorted({row.loops for row in rows if row.kind == "ouro"}):
        for kv_type in dict.fromkeys(row.kv_type for row in rows):
            pair = longest_pair(rows, loops=loops, kv_type=kv_type)
            if pair is None:
                continue
            melt, ouro = pair
            names = [KINDS[row.kind] if melt.model == ouro.model else row.model for row in (ouro, melt)]
            lines.append(
                f"T={loops}, {melt.n_ctx:,} tokens, {kv_type}: the cache of {names[0]} is "
                f"{_times(ouro.kv_bytes, melt.kv_bytes)} that of {names[1]}; "
                f"weights, cache and buffers together, {_times(ouro.total_bytes, melt.total_bytes)}."
            )
    return lines


def paper_lines(found: dict[str, Any]) -> Table:
    """The paper's table 2 beside ours, as paper.paper_table gives it."""
    title = (
        f"The paper's table 2, in GB: {found['paper_n_ctx']:,} tokens, 16-bit weights and cache\n"
        f"here, measured: {found['measured_n_ctx']:,} tokens, {found['measured_weights']} weights, f16 cache"
    )
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=_PADDING)
    table.add_column("")
    paper_names = ("paper\ncache", "\nweights", "\ntotal")
    for name in (*paper_names, "here\ncache", "\nweights", "\ntotal", "\nresident", "~cache at\n32,000"):
        table.add_column(name, justify="right")
    keys = ("kv_bytes", "weights_bytes", "total_bytes")
    more = (*keys, "resident_bytes", "kv_at_32000_computed")
    for kind, paper in found["paper"].items():
        mine = found["measured"].get(kind, {})
        table.add_row(
            paper["name"],
            *(f"{paper[key] / 1e9:.2f}" for key in keys),
            *(f"{mine[key] / 1e9:.2f}" if mine.get(key) else "-" for key in more),
        )
    ratios = found["measured_ratio"]
    table.add_row(
        "Ouro/MELT",
        *(f"{found['paper_ratio'][key]:.2f}" for key in keys),
        *(f"{ratios[key]:.2f}" if key in ratios else "-" for key in more),
        style="bold",
    )
    return table


def csv_text(rows: Sequence[Row]) -> str:
    """One line per row with every field of Row under its name, and total_bytes; empty where there is no value."""
    text = io.StringIO()
    names = [*(field.name for field in fields(Row)), "total_bytes"]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.to_dict() for row in rows)
    return text.getvalue()


def mib(n_bytes: float) -> str:
    """A size in MiB."""
    return digits(n_bytes / 2**20)


def _times(more: int | None, less: int | None) -> str:
    return f"{more / less:.2f} times" if more and less else "unknown times"


def span(numbers: Sequence[float], form: str) -> str:
    """The lowest and the highest in this format, or one where they read alike: 36.6 to 63.0."""
    low, high = (format(number, form) for number in (min(numbers), max(numbers)))
    return low if low == high else f"{low} to {high}"


def digits(number: float) -> str:
    """A number with three digits or more."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
