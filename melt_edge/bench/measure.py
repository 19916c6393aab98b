"""Does runs one after the other, each in a fresh process, and gives a row for every test as it is done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from melt_edge.bench.child import PARTS_TOKENS, command
from melt_edge.bench.cost import read_bytes
from melt_edge.bench.rows import BenchRow, BenchTest, Run, with_tuples
from melt_edge.compare.children import replies
from melt_edge.compare.points import Contender
from melt_edge.errors import ConfigError
from melt_edge.runtime.machine import available_bytes
from melt_edge.runtime.options import LoadOptions


def make_runs(
    models: Sequence[Contender],
    tests: Sequence[BenchTest],
    *,
    loops: Sequence[int] | None,
    kv_types: Sequence[str],
    backends: Sequence[str] | None,
    threads: Sequence[int | None],
    chunks: Sequence[int | None],
    flash_attn: bool | None = None,
) -> list[Run]:
    """Every combination. The context is as long as the deepest test.

    loops: None takes each model's own number. backends: only models that these open; None takes all. An ONNX folder
    is run with its own cache type alone.
    """
    runs = []
    for model in models:
        backend, own_type = model.header.backend, model.header.kv_type
        if backends is not None and backend not in backends:
            continue
        for count in loops or [model.config.num_loops]:
            for kv_type in [own_type] if own_type else kv_types:
                for n_threads in threads:
                    for chunk in chunks:
                        options = LoadOptions(
                            n_ctx=_context(tests),
                            chunk_size=chunk,
                            loops=count,
                            kv_type=kv_type,
                            n_threads=n_threads,
                            flash_attn=None if own_type else flash_attn,
                        )
                        runs.append(Run(model, backend, options, tuple(tests)))
    return runs


def measure(runs: Sequence[Run], *, repetitions: int, parts: bool, limit_s: float) -> Iterator[BenchRow]:
    """A row for each test of each run. limit_s: seconds after which a run is given up.

    Tests for which the memory does not suffice are skipped, as is a run that its model cannot do. An exception in
    the caller (Ctrl-C) ends the running process.
    """
    for run in runs:
        fitting, left_out = _fitting(run)
        if fitting:
            started = replace(run, tests=fitting, options=replace(run.options, n_ctx=_context(fitting)))
            yield from _measured(started, repetitions=repetitions, parts=parts, limit_s=limit_s)
        for test, reason in left_out:
            yield make_row(run, test, status="skipped", reason=reason)


def _context(tests: Sequence[BenchTest]) -> int:
    return max(test.n_depth + max(test.n_tokens, PARTS_TOKENS) for test in tests)


def _fitting(run: Run) -> tuple[tuple[BenchTest, ...], list[tuple[BenchTest, str]]]:
    """The tests that the memory suffices for, and the others with the reason."""
    fitting, left_out = [], []
    for test in run.tests:
        reason = _obstacle(run, test)
        if reason is None:
            fitting.append(test)
        else:
            left_out.append((test, reason))
    return tuple(fitting), left_out


def _obstacle(run: Run, test: BenchTest) -> str | None:
    """Why a test cannot be done, as far as can be told before; None if nothing is known."""
    try:
        needed = run.contender.header.needed(replace(run.options, n_ctx=_context([test]))).total_bytes
    except ConfigError as err:
        return str(err)
    free = available_bytes()
    if free is None or needed <= free:
        return None
    return f"needs about {needed / 2**20:,.0f} MiB (computed), this machine can give {free / 2**20:,.0f} MiB"


def _measured(run: Run, *, repetitions: int, parts: bool, limit_s: float) -> Iterator[BenchRow]:
    child = command(
        path=run.contender.header.path,
        options=run.options,
        tests=run.tests,
        backend=run.backend,
        repetitions=repetitions,
        parts=parts,
    )
    waiting = list(run.tests)
    with closing(replies(child, limit_s=limit_s)) as found:
        for reply in found:
            if "error" in reply:
                for test in waiting:
                    yield make_row(run, test, status="failed", reason=reply["error"])
                return
            yield make_row(run, waiting.pop(0), status="measured", **reply)


def make_row(run: Run, test: BenchTest, *, status: str, **found: Any) -> BenchRow:
    """A test's row. found: the measured fields of rows.BenchRow, sequences as lists."""
    options = run.options
    if status == "measured":
        found = with_tuples(found)
        if test.n_gen:
            found |= _read(run, test)
    known = {"loops": options.loops, "kv_type": options.kv_type, "n_threads": options.n_threads}
    return BenchRow(
        model=run.contender.name,
        kind=run.contender.kind,
        backend=run.backend,
        n_prompt=test.n_prompt,
        n_gen=test.n_gen,
        n_depth=test.n_depth,
        status=status,
        **{"n_ubatch": options.chunk_size, **known, **found},
    )


def _read(run: Run, test: BenchTest) -> dict[str, int]:
    """The bytes read per generated token, after as many others as on average during the test."""
    config = run.contender.config.with_loops(run.options.loops or run.contender.config.num_loops)
    n_past = test.n_depth + (test.n_gen + 1) / 2
    header = run.contender.header
    kv_type = run.options.kv_type or header.kv_type
    assert kv_type is not None
    parts = read_bytes(header.source, config, kv_type=kv_type, n_past=n_past)
    return {
        "layers_read_bytes": parts.layers,
        "gates_read_bytes": parts.gates,
        "head_read_bytes": parts.head,
        "cache_read_bytes": parts.cache,
    }
