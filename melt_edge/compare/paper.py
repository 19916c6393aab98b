"""The MELT paper's memory table beside rows measured here. Source: arXiv 2605.07721, table 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from melt_edge.compare.points import Row

PAPER_CTX = 32_000
# 16-bit weights and cache, in 10^9 bytes, as printed there: cache, weights, both together.
PAPER_GB = {
    "melt": ("MELT-1.6B", 6.29, 3.27, 9.49),
    "ouro": ("Ouro-1.4B", 25.17, 2.87, 27.97),
    "qwen3": ("Qwen3-1.7B", 3.67, 3.44, 7.07),
}


def longest_pair(rows: Sequence[Row], *, loops: int, kv_type: str) -> tuple[Row, Row] | None:
    """The rows of MELT and Ouro at the longest context where both were measured, of the same model if there are."""
    measured = [row for row in rows if row.status == "measured" and row.loops == loops and row.kv_type == kv_type]
    pairs = [
        (melt, ouro)
        for melt in measured
        for ouro in measured
        if melt.kind in ("melt", "no-gate")
        and ouro.kind == "ouro"
        and (melt.n_ctx, melt.backend) == (ouro.n_ctx, ouro.backend)
    ]
    return max(pairs, key=lambda pair: (pair[0].n_ctx, pair[0].model == pair[1].model), default=None)


def paper_table(rows: Sequence[Row]) -> dict[str, Any] | None:
    """The paper's table 2 beside what was measured at 4 loops with an f16 cache; None without such rows.

    Units: bytes; ratios are Ouro's over MELT's. Our total is weights, cache and buffers; resident_bytes is the
    whole process's; kv_at_32000_computed is the measured cache per token times the paper's context.
    """
    pair = longest_pair([row for row in rows if row.model == "ouro-1.4b"], loops=4, kv_type="f16")
    if pair is None:
        return None
    ours = {row.kind: _ours(row) for row in pair}
    paper = {
        kind: {"name": name, "kv_bytes": cache * 1e9, "weights_bytes": weight * 1e9, "total_bytes": total * 1e9}
        for kind, (name, cache, weight, total) in PAPER_GB.items()
    }
    return {
        "source": "arXiv 2605.07721, table 2",
        "paper_n_ctx": PAPER_CTX,
        "paper_weights": "16-bit",
        "paper": paper,
        "paper_ratio": _ratio(paper),
        "measured_n_ctx": pair[0].n_ctx,
        "measured_weights": pair[0].weights_type,
        "measured": ours,
        "measured_ratio": _ratio(ours),
    }


def _ours(row: Row) -> dict[str, Any]:
    assert row.kv_bytes is not None
    return {
        "kv_bytes": row.kv_bytes,
        "weights_bytes": row.weights_bytes,
        "total_bytes": row.total_bytes,
        "resident_bytes": row.rss_filled_bytes or row.footprint_filled_bytes,
        "kv_at_32000_computed": row.kv_bytes / row.n_ctx * PAPER_CTX,
    }


def _ratio(table: dict[str, dict[str, Any]]) -> dict[str, float]:
    melt, ouro = table["melt"], table["ouro"]
    return {key: ouro[key] / melt[key] for key in melt if melt[key] and isinstance(melt[key], (int, float))}
