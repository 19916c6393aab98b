"""Measures points one after the other, each in a fresh process; nothing that happens to one stops the rest."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from melt_edge.compare.children import replies
from melt_edge.compare.points import Point, Row, computed, load_options
from melt_edge.errors import ConfigError
from melt_edge.runtime.machine import available_bytes
from melt_edge.runtime.memory import Estimate


def measure(points: Iterable[Point], *, limit_s: float) -> Iterator[Row]:
    """A row for each point, as it is done.

    limit_s: seconds after which a point is given up. A point that does not fit into memory, or that its
    model cannot do, is skipped. An exception in the caller (Ctrl-C) ends the running process.
    """
    for point in points:
        yield measure_point(point, limit_s=limit_s)


def measure_point(point: Point, *, limit_s: float) -> Row:
    """The row of one point."""
    try:
        needed = computed(point)
    except ConfigError as err:
        return _row(point, "skipped", reason=str(err))
    free = available_bytes()
    if free is not None and needed.total_bytes > free:
        reason = f"needs about {_mib(needed.total_bytes)} (computed), this machine can give {_mib(free)}"
        return _row(point, "skipped", needed, reason=reason)
    reply = _run_child(point, limit_s)
    if "error" in reply:
        return _row(point, "failed", needed, reason=reply["error"])
    return _row(point, "measured", **reply)


def _run_child(point: Point, limit_s: float) -> dict[str, Any]:
    asked = {
        "path": str(point.contender.header.path.resolve()),
        "options": asdict(load_options(point)),
        "backend": point.backend,
        "n_decode": point.n_decode,
        "n_prefill": point.n_prefill,
    }
    command = [sys.executable, "-m", "melt_edge.compare.child", json.dumps(asked)]
    *_, last = replies(command, limit_s=limit_s)
    return last


def _row(point: Point, status: str, needed: Estimate | None = None, **measured: Any) -> Row:
    if needed is not None:
        measured |= asdict(needed)
    has_bytes = "kv_bytes" in measured
    return Row(
        model=point.contender.name,
        kind=point.contender.kind,
        loops=point.loops,
        n_ctx=point.n_ctx,
        kv_type=point.kv_type,
        backend=point.backend,
        n_decode=point.n_decode,
        n_threads=point.n_threads,
        status=status,
        bytes_from=("measured" if status == "measured" else "computed") if has_bytes else None,
        **measured,
    )


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.0f} MiB"
