"""What is benchmarked and what comes of it: runs, tests and rows, in llama-bench's words."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from melt_edge.compare.points import KINDS, Contender
from melt_edge.runtime.options import LoadOptions


@dataclass(frozen=True)
class BenchTest:
    """One test: n_prompt tokens together (pp) or n_gen one by one (tg), after n_depth tokens in the cache."""

    n_prompt: int
    n_gen: int
    n_depth: int

    @property
    def name(self) -> str:
        """As llama-bench prints it: pp512, tg128 @ d2048."""
        test = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{test} @ d{self.n_depth}" if self.n_depth else test

    @property
    def n_tokens(self) -> int:
        """Tokens that are timed."""
        return self.n_prompt or self.n_gen


@dataclass(frozen=True)
class Run:
    """A model with the options it is loaded with, and the tests that one process does with it."""

    contender: Contender
    backend: str
    options: LoadOptions
    tests: tuple[BenchTest, ...]

    def __str__(self) -> str:
        options = self.options
        return f"{KINDS[self.contender.kind]} T={options.loops}, {options.kv_type}, {self.backend}"


@dataclass(frozen=True)
class BenchRow:
    """What came of one test of a run; None where it was not measured or means nothing.

    status: "measured", "skipped" or "failed", the last two with a reason. loops, n_ubatch, n_threads, kv_type: as used.
    depth_from: "evaluated", or "repeated" where the rows of some tokens were written again and again.

    samples_ns: nanoseconds of each repetition; avg_ts and stddev_ts: tokens per second, mean and standard deviation.
    kv_bytes, weights_bytes, compute_bytes: the library's own figures; rss_bytes: the process's after the test.

    Of tests that generate: layers_, gates_, head_ and cache_read_bytes, counted, per token; token_ns and
    token_bandwidths: nanoseconds of some of the tokens, and the bytes per second that as many threads read from memory
    right before and after each, their mean. A machine's memory speed may change within seconds, so each token is held
    against its own: limit_share is the median of theirs, bandwidth that of the bandwidths, limit_ts tokens per second
    at it. loop_ms, head_ms, attention_share and gates_share come from parts_tokens tokens that were timed in
    pieces, after the test and apart from it; parts_ms is what such a token took.
    """

    model: str
    kind: str
    backend: str
    n_prompt: int
    n_gen: int
    n_depth: int
    status: str
    loops: int | None
    kv_type: str | None
    n_threads: int | None
    n_ubatch: int | None
    reason: str | None = None
    model_size: int | None = None
    model_n_params: int | None = None
    weights_type: str | None = None
    depth_from: str | None = None
    samples_ns: tuple[int, ...] = ()
    kv_bytes: int | None = None
    weights_bytes: int | None = None
    compute_bytes: int | None = None
    rss_bytes: int | None = None
    layers_read_bytes: int | None = None
    gates_read_bytes: int | None = None
    head_read_bytes: int | None = None
    cache_read_bytes: int | None = None
    token_ns: tuple[int, ...] = ()
    token_bandwidths: tuple[float, ...] = ()
    loop_ms: tuple[float, ...] | None = None
    head_ms: float | None = None
    parts_ms: float | None = None
    parts_tokens: int | None = None
    attention_share: float | None = None
    gates_share: float | None = None

    @property
    def test(self) -> BenchTest:
        """The test's own numbers."""
        return BenchTest(self.n_prompt, self.n_gen, self.n_depth)

    @property
    def samples_ts(self) -> list[float]:
        """Tokens per second of each repetition."""
        return [self.test.n_tokens * 1e9 / ns for ns in self.samples_ns]

    @property
    def avg_ts(self) -> float | None:
        """The mean of the repetitions' tokens per second."""
        return statistics.fmean(self.samples_ts) if self.samples_ns else None

    @property
    def stddev_ts(self) -> float | None:
        """Their standard deviation; 0 for one repetition."""
        if not self.samples_ns:
            return None
        return statistics.stdev(self.samples_ts) if len(self.samples_ns) > 1 else 0.0

    @property
    def read_bytes(self) -> int | None:
        """Bytes read per token, all parts together."""
        parts = (self.layers_read_bytes, self.gates_read_bytes, self.head_read_bytes, self.cache_read_bytes)
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None

    @property
    def bandwidth(self) -> float | None:
        """The median of the bandwidths around tokens."""
        return statistics.median(self.token_bandwidths) if self.token_bandwidths else None

    @property
    def limit_ts(self) -> float | None:
        """Tokens per second if the bytes were read at that bandwidth and nothing else took time."""
        return self.bandwidth / self.read_bytes if self.bandwidth and self.read_bytes else None

    @property
    def limit_shares(self) -> list[float]:
        """Of each token held against the memory: the time that its bytes take to read over its own."""
        if not self.read_bytes:
            return []
        pairs = zip(self.token_ns, self.token_bandwidths, strict=True)
        return [self.read_bytes * 1e9 / (bandwidth * ns) for ns, bandwidth in pairs]

    @property
    def limit_share(self) -> float | None:
        """Their median."""
        return statistics.median(self.limit_shares) if self.limit_shares else None

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, and what follows from them."""
        derived = ("samples_ts", "avg_ts", "stddev_ts", "read_bytes", "bandwidth", "limit_ts", "limit_share")
        return {**asdict(self), "test": self.test.name, **{name: getattr(self, name) for name in derived}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BenchRow:
        """A row that was written by to_dict. Raises: TypeError for fields that are missing."""
        return cls(**with_tuples({field.name: values[field.name] for field in fields(cls) if field.name in values}))


def with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as BenchRow keeps them: JSON has lists where it has tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def make_tests(n_prompt: Sequence[int], n_gen: Sequence[int], n_depth: Sequence[int]) -> tuple[BenchTest, ...]:
    """Every pp and tg at every depth, the shallow ones first; 0 leaves a kind of test out, as in llama-bench."""
    found = []
    for depth in sorted(set(n_depth)):
        found += [BenchTest(count, 0, depth) for count in n_prompt if count]
        found += [BenchTest(0, count, depth) for count in n_gen if count]
    return tuple(found)
