"""Benchmark rows as tables for people, as Markdown and as CSV, and the ratios to an earlier run."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from melt_edge.bench.bandwidth import PASSES, READ_BYTES
from melt_edge.bench.rows import BenchRow
from melt_edge.compare.points import KINDS
from melt_edge.compare.table import digits, mib, span
from melt_edge.errors import ConfigError, FormatError

_COLUMNS = ("model", "cache", "test", "t/s", "MB\nread", "of\nlimit", "ms per\nloop", "attn", "gates")
_LEFT = ("model", "cache", "test")
_MAX_BASE_BYTES = 64 * 2**20
# What makes two rows of two runs the same measurement; the file's path and the machine may differ.
_SAME = ("model", "kind", "weights_type", "backend", "loops", "kv_type", "n_threads", "n_ubatch")


@dataclass(frozen=True)
class Ratio:
    """A row over the same one of an earlier run: tokens per second, and the deviation of their ratio."""

    row: BenchRow
    base: BenchRow
    ratio: float
    stddev: float

    def to_dict(self) -> dict[str, Any]:
        """The row's identity and the ratio."""
        names = (*_SAME, "n_prompt", "n_gen", "n_depth")
        return {
            **{name: getattr(self.row, name) for name in names},
            "test": self.row.test.name,
            "base_ts": self.base.avg_ts,
            "avg_ts": self.row.avg_ts,
            "ratio": self.ratio,
            "ratio_stddev": self.stddev,
        }


def tables(rows: Sequence[BenchRow]) -> list[Table]:
    """A table for each model file's name, backend, number of threads and chunk size, in the order measured."""
    groups: dict[tuple[Any, ...], list[BenchRow]] = {}
    for row in rows:
        groups.setdefault((row.model, row.weights_type, row.backend, row.n_threads), []).append(row)
    return [_table(group) for group in groups.values()]


def _table(rows: Sequence[BenchRow]) -> Table:
    first = rows[0]
    threads = "1 thread" if first.n_threads == 1 else f"{first.n_threads or 'all'} threads"
    title = Text(f"{first.model}, {first.weights_type or 'not loaded'}: {first.backend}, {threads}")
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 0))
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name in _LEFT else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in cells(row)), style="" if row.status == "measured" else "dim")
    return table


def cells(row: BenchRow) -> list[str]:
    """The columns of a row as text; - where there is nothing."""
    begin = [_model(row), row.kv_type or "-", row.test.name]
    if row.avg_ts is None or row.stddev_ts is None:
        return [*begin, row.status, *["-"] * 5]
    return [
        *begin,
        speed(row.avg_ts, row.stddev_ts),
        digits(row.read_bytes / 1e6) if row.read_bytes else "-",
        _percent(row.limit_share),
        digits(sum(row.loop_ms) / len(row.loop_ms)) if row.loop_ms else "-",
        _percent(row.attention_share),
        _percent(row.gates_share),
    ]


def speed(mean: float, deviation: float) -> str:
    """Tokens per second, mean and deviation."""
    places = 0 if mean >= 1000 else 1 if mean >= 100 else 2
    return f"{mean:,.{places}f} ± {deviation:,.{places}f}"


def _model(row: BenchRow) -> str:
    return f"{KINDS[row.kind]} T={row.loops or '?'}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}%"


def markdown(rows: Sequence[BenchRow]) -> str:
    """The rows as one Markdown table, as llama-bench prints them."""
    heads = ["weights", "size", "params", "backend", "threads", *(name.replace("\n", " ") for name in _COLUMNS[1:])]
    lines = [["model", *heads]]
    lines.append([":--", *("---:" for _ in heads)])
    for row in rows:
        kind, *rest = cells(row)
        size = f"{mib(row.model_size)} MiB" if row.model_size else "-"
        params = f"{row.model_n_params / 1e6:,.2f} M" if row.model_n_params else "-"
        about = [row.weights_type or "-", size, params, row.backend, str(row.n_threads or "-")]
        lines.append([f"{row.model} {kind}", *about, *rest])
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def csv_text(rows: Sequence[BenchRow]) -> str:
    """One line per row with every field of BenchRow.to_dict under its name; lists as JSON, empty for nothing."""
    names = [field.name for field in fields(BenchRow)]
    dicts = [row.to_dict() for row in rows]
    names += [name for name in (dicts[0] if dicts else {}) if name not in names]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for values in dicts:
        writer.writerow(
            {name: json.dumps(value) if isinstance(value, (list, tuple)) else value for name, value in values.items()}
        )
    return text.getvalue()


def notes(rows: Sequence[BenchRow]) -> list[str]:
    """How the columns were obtained, for those that are in the table."""
    said = []
    bandwidths = [row.bandwidth for row in rows if row.bandwidth]
    if bandwidths:
        gb_per_s = span([bandwidth / 1e9 for bandwidth in bandwidths], ".1f")
        said.append(
            f"limit: the bytes of a token at the memory's read speed with as many threads, {gb_per_s} GB/s; the median "
            f"of some tokens, each held against {PASSES} passes over {mib(READ_BYTES)} MiB right before and after it"
        )
    timed = [row for row in rows if row.parts_ms and row.avg_ts]
    if timed:
        times = [row.parts_ms * row.avg_ts / 1000 for row in timed if row.parts_ms and row.avg_ts]
        said.append(
            f"ms/loop, attn, gates: {timed[0].parts_tokens} tokens timed in pieces after each test, apart from it; "
            f"such a token took {span(times, '.0%')} of the time of the test's"
        )
    if any(row.depth_from == "repeated" for row in rows):
        said.append("depth: the rows of some tokens, repeated to fill the cache; speed does not depend on their values")
    return said


def read_base(path: Path) -> list[BenchRow]:
    """The rows of an earlier run's JSON. Raises: ConfigError if it cannot be read, FormatError if it is none."""
    try:
        if path.stat().st_size > _MAX_BASE_BYTES:
            raise FormatError(f"{path}: larger than {_MAX_BASE_BYTES} bytes, which no benchmark is")
        text = path.read_text(encoding="utf-8")
    except OSError as err:
        raise ConfigError(f"{path}: cannot be read ({err.strerror or err}); name a file of bench --json") from err
    except UnicodeDecodeError as err:
        raise FormatError(f"{path}: is no text; name a file of bench --json") from err
    try:
        found = json.loads(text)
        rows = [BenchRow.from_dict(row) for row in found["rows"]]
        for row in rows:
            assert row.avg_ts is None or math.isfinite(row.avg_ts)
    except (ValueError, KeyError, TypeError, AssertionError, ZeroDivisionError, RecursionError) as err:
        raise FormatError(f"{path}: is not what melt-edge bench --json writes; measure the base again") from err
    return rows


def ratios(rows: Sequence[BenchRow], base: Sequence[BenchRow]) -> list[Ratio]:
    """Each measured row over the same measurement of an earlier run, where there is one."""
    earlier = {_identity(row): row for row in base if row.avg_ts}
    found = []
    for row in rows:
        before = earlier.get(_identity(row))
        if before is None or not row.avg_ts or not before.avg_ts:
            continue
        ratio = row.avg_ts / before.avg_ts
        spread = math.hypot((row.stddev_ts or 0.0) / row.avg_ts, (before.stddev_ts or 0.0) / before.avg_ts)
        found.append(Ratio(row, before, ratio, ratio * spread))
    return found


def _identity(row: BenchRow) -> tuple[Any, ...]:
    return (*(getattr(row, name) for name in _SAME), row.test)


def ratio_table(found: Sequence[Ratio], base_name: str) -> Table:
    """The ratios to an earlier run."""
    title = Text(f"against {base_name}")
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 0))
    for name in ("model", "cache", "test", "backend", "base t/s", "t/s", "ratio"):
        table.add_column(name, justify="left" if name in (*_LEFT, "backend") else "right")
    for one in found:
        row = one.row
        speeds = (f"{one.base.avg_ts:,.2f}", f"{row.avg_ts:,.2f}", f"{one.ratio:.3f} ± {one.stddev:.3f}")
        begin = (_model(row), row.kv_type or "-", row.test.name, row.backend)
        table.add_row(*(Text(cell) for cell in (*begin, *speeds)))
    return table
