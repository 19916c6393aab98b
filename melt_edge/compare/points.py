"""What is compared: models, the grid of their points, and the bytes that each is expected to need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from melt_edge.config import LoopConfig
from melt_edge.errors import ConfigError
from melt_edge.runtime.header import ModelHeader, read_header
from melt_edge.runtime.memory import Estimate
from melt_edge.runtime.options import LoadOptions

# What is compared, in the order of tables and legends.
KINDS = {"dense": "dense", "ouro": "Ouro", "no-gate": "MELT, no gate", "melt": "MELT"}


@dataclass(frozen=True)
class Contender:
    """A model in one of its roles. name: the shape's or the file's; kind: one of KINDS."""

    name: str
    kind: str
    header: ModelHeader

    @property
    def config(self) -> LoopConfig:
        """What it was trained as."""
        return self.header.config


@dataclass(frozen=True)
class Point:
    """One measurement: a model with a number of loops, its context filled to n_ctx tokens.

    n_decode: the last of these tokens, evaluated one at a time. n_prefill: the most tokens that are computed before
    them, whose rows are repeated to fill the rest; None computes all.
    """

    contender: Contender
    loops: int
    n_ctx: int
    kv_type: str
    backend: str
    n_decode: int
    n_threads: int
    n_prefill: int | None = None

    def __str__(self) -> str:
        loops = "" if self.contender.kind == "dense" else f" T={self.loops}"
        return f"{KINDS[self.contender.kind]}{loops}, {self.n_ctx:,} tokens, {self.kv_type}"


@dataclass(frozen=True)
class Row:
    """What came of a point.

    status: "measured", "skipped" or "failed", the last two with a reason. weights_bytes, kv_bytes and
    compute_bytes are the library's own figures if bytes_from is "measured", and what was expected before
    loading if it is "computed". The library counts weights that it repacked for the CPU twice, because the
    mapped file stays. weights_type: the most frequent one. Resident sets (rss), proportional ones (pss,
    Linux) and footprints (macOS) are those of the process before loading, after it, and with the context
    filled; peak_rss is the highest. n_prefill: tokens that were computed before those decoded, at prefill_tps; fewer
    than the context if rows were repeated, and then ttft_ms is None. decode_overhead: the share of the decode time
    spent outside the library that computes, where the backend measures it. bandwidth: bytes per second that as many
    threads read from memory, the mean of right before and right after decoding. None: not measured, or this system
    does not say.
    """

    model: str
    kind: str
    loops: int
    n_ctx: int
    kv_type: str
    backend: str
    n_decode: int
    n_threads: int
    status: str
    reason: str | None = None
    weights_type: str | None = None
    bytes_from: str | None = None
    weights_bytes: int | None = None
    kv_bytes: int | None = None
    compute_bytes: int | None = None
    rss_before_bytes: int | None = None
    rss_loaded_bytes: int | None = None
    rss_filled_bytes: int | None = None
    pss_before_bytes: int | None = None
    pss_loaded_bytes: int | None = None
    pss_filled_bytes: int | None = None
    footprint_before_bytes: int | None = None
    footprint_loaded_bytes: int | None = None
    footprint_filled_bytes: int | None = None
    peak_rss_bytes: int | None = None
    n_prefill: int | None = None
    ttft_ms: float | None = None
    prefill_tps: float | None = None
    decode_tps: float | None = None
    decode_overhead: float | None = None
    bandwidth: float | None = None

    @property
    def total_bytes(self) -> int | None:
        """Weights, cache and buffers together."""
        parts = (self.weights_bytes, self.kv_bytes, self.compute_bytes)
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, and total_bytes."""
        return {**asdict(self), "total_bytes": self.total_bytes}


def contenders(path: Path, name: str, *, dense: bool = True) -> list[Contender]:
    """The roles of a model: a MELT is itself; an Ouro is itself and, with one loop, the dense model of its layers.

    Raises: FormatError, SpecError or ConfigError for a file that does not load.
    """
    header = read_header(path)
    if header.config.shares_kv:
        return [Contender(name, "melt" if header.config.has_gate else "no-gate", header)]
    ouro = Contender(name, "ouro", header)
    return [Contender(name, "dense", header), ouro] if dense else [ouro]


def grid(
    models: Sequence[Contender],
    *,
    loops: Sequence[int] | None,
    n_ctx: Sequence[int],
    kv_types: Sequence[str],
    backends: Sequence[str] | None,
    n_decode: int,
    n_threads: int,
    n_prefill: int | None = None,
) -> list[Point]:
    """Every combination, the shortest contexts first. loops: None takes each file's own number.

    backends: models of others are left out; None takes all. An ONNX folder's cache has the type it was exported
    with, whatever kv_types are.
    An Ouro with one loop is the dense model, which is measured once. Raises: ConfigError for a context
    without room for a prompt and n_decode tokens.
    """
    for length in n_ctx:
        if length <= n_decode:
            raise ConfigError(
                f"a context of {length} tokens has no room for a prompt and {n_decode} tokens after it; "
                "choose a longer --ctx or a smaller --n-decode"
            )
    has_dense = {model.name for model in models if model.kind == "dense"}
    points = []
    for length in sorted(set(n_ctx)):
        for number, kv_type in enumerate(kv_types):
            for model in models:
                backend, own_type = model.header.backend, model.header.kv_type
                if (backends is not None and backend not in backends) or (own_type and number > 0):
                    continue
                for count in _loops_of(model, loops, has_dense):
                    kept = own_type or kv_type
                    points.append(Point(model, count, length, kept, backend, n_decode, n_threads, n_prefill))
    return points


def _loops_of(model: Contender, loops: Sequence[int] | None, has_dense: set[str]) -> list[int]:
    if model.kind == "dense":
        return [1]
    counts = sorted(set(loops)) if loops is not None else [model.config.num_loops]
    if model.kind == "ouro" and model.name in has_dense:
        counts = [count for count in counts if count > 1]
    return counts


def load_options(point: Point) -> LoadOptions:
    """The options a point's model is loaded with."""
    return LoadOptions(n_ctx=point.n_ctx, loops=point.loops, kv_type=point.kv_type, n_threads=point.n_threads)


def computed(point: Point) -> Estimate:
    """The bytes a point is expected to need. Raises: ConfigError if its model cannot be loaded like that."""
    return point.contender.header.needed(load_options(point))
