"""What the loops cost in memory, decoding and prefill at the 1.6 B shape, each line beside its floor, in one run.

    make bench          measures all, and writes benchmarks/results/SECTION.json with the machine and the commit
    make bench-check    measures all, and fails when a line misses its floor

Random Q4_0 weights of Ouro-1.4B's and MELT-1.6B's shape are written once into the user's cache folder (1.8 GB).
Everything is measured by melt_edge.bench with two threads; each setting in a process of its own, an empty cache in
five, but for the two cache types, whose tokens are timed in turn. Contexts are filled by repeating rows, not by
computing them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from melt_edge.bench.child import elapsed_ns
from melt_edge.bench.cost import prefill_products
from melt_edge.bench.fill import evaluate, fill
from melt_edge.bench.measure import make_row, make_runs, measure
from melt_edge.bench.rows import BenchRow, BenchTest, Run, make_tests
from melt_edge.compare.paper import PAPER_GB
from melt_edge.compare.points import KINDS, Contender, contenders
from melt_edge.compare.random_model import random_model
from melt_edge.compare.shapes import shape_config
from melt_edge.config import LoopConfig
from melt_edge.files import default_cache_dir
from melt_edge.runtime.llama import LlamaBackend
from melt_edge.runtime.machine import available_bytes
from provenance import provenance

N_THREADS, N_LOOPS = 2, 4
LOOP_COUNTS = (1, 2, 4, 8)
FLAT_DEPTH, DEPTHS, LONGEST = 4096, (2048, 8192, 16384), (32768, 24576, 16384, 8192)
N_PROMPT = 512
MAX_SPREAD = 0.01  # of MELT's memory over the numbers of loops
MIN_EMPTY, MIN_DEEP = 0.90, 0.80  # of what the memory's bandwidth allows
MIN_Q8_0 = 1.0  # times the speed with an f16 cache
MAX_PREFILL = 1.1  # times the dense model's time times the ratio of their products


@dataclass(frozen=True)
class Line:
    """One promise. floor: in words; measured: in words; ok: None where a number is only reported."""

    name: str
    floor: str
    measured: str
    ok: bool | None


# -- measuring: rows of melt_edge.bench


def loops_section(melt: Contender, ouro: Contender, *, tiny: bool) -> list[BenchRow]:
    """Both models at each number of loops with the same tokens, and at 4 loops with the most that fit. MELT computes a
    whole chunk first, since its resident set is looked at: what only repeated rows leave untouched would be missing.
    """
    depth, n_prompt = (128, 64) if tiny else (FLAT_DEPTH, N_PROMPT)
    decode = BenchTest(0, 4, depth)
    rows = bench([melt], [BenchTest(n_prompt, 0, depth - n_prompt), decode], loops=LOOP_COUNTS)
    rows += bench([ouro], [decode], loops=LOOP_COUNTS)
    longest = next((n for n in LONGEST if _fits(melt, n) and _fits(ouro, n)), LONGEST[-1])
    return rows + bench([melt, ouro], [BenchTest(0, 4, 256 if tiny else longest - 4)], loops=[N_LOOPS])


def decode_section(melt: Contender, ouro: Contender, *, tiny: bool) -> list[BenchRow]:
    """Both models with an empty cache, in turn and each in five processes: it is luck in which pages weights lie."""
    test = BenchTest(0, 4 if tiny else 16, 0)
    turns = [bench([melt, ouro], [test], loops=[N_LOOPS], parts=i == 0) for i in range(5)]
    return [merged(rows) for rows in zip(*turns, strict=True)]


def merged(rows: Sequence[BenchRow]) -> BenchRow:
    """The first row, with its memory and parts, and the tokens of all."""
    samples, tokens, bandwidths = (
        tuple(x for row in rows for x in getattr(row, field))
        for field in ("samples_ns", "token_ns", "token_bandwidths")
    )
    return replace(rows[0], samples_ns=samples, token_ns=tokens, token_bandwidths=bandwidths)


def depth_section(melt: Contender, ouro: Contender, *, tiny: bool) -> list[BenchRow]:
    """MELT with a full cache of each type, and Ouro, whose cache is four times as large but read as often, once."""
    depths = (64, 96, 128) if tiny else DEPTHS
    tests = make_tests([], [4 if tiny else 6], depths)
    rows = bench([melt], tests, loops=[N_LOOPS], kv_types=("f16", "q8_0"), repetitions=5, parts=True)
    return rows + bench([ouro], tests[:1], loops=[N_LOOPS], repetitions=3, parts=True)


def kv_types_section(melt: Contender, ouro: Contender, *, tiny: bool) -> list[BenchRow]:
    """MELT's tokens with an f16 and with a q8_0 cache in turn, in this process: nothing else changes between them.

    Both are opened anew for each half of the pairs, since it is luck in which pages a model's weights lie.
    """
    depths, n_pairs = ((64, 96), 4) if tiny else (DEPTHS, 16)
    rows = []
    for depth in depths:
        test = BenchTest(0, n_pairs // 2 + 1, depth)
        runs = runs_of([melt], [test], loops=[N_LOOPS], kv_types=("f16", "q8_0"))
        n_ubatch, first = tokens_in_turn(melt, runs, depth, n_pairs // 2)
        _, second = tokens_in_turn(melt, runs[::-1], depth, n_pairs // 2)
        for run, samples in zip(runs, map(list.__add__, first, second[::-1]), strict=True):
            row = make_row(run, replace(test, n_gen=1), status="measured", n_ubatch=n_ubatch, samples_ns=samples)
            print(f"  {run}, {row.test.name}: {row.avg_ts:.2f} tok/s", flush=True)
            rows.append(row)
    return rows


def tokens_in_turn(model: Contender, runs: Sequence[Run], depth: int, n_tokens: int) -> tuple[int, list[list[int]]]:
    """The chunk size, and nanoseconds of each run's tokens after so many others, one of each run after the other."""
    samples: list[list[int]] = [[] for _ in runs]
    with ExitStack() as stack:
        opened = [stack.enter_context(closing(LlamaBackend(model.header.path, run.options))) for run in runs]
        for backend in opened:
            fill(backend, [1] * depth)
            evaluate(backend, [1])  # the first token after another depth builds the graph anew
        for _ in range(n_tokens):
            for backend, found in zip(opened, samples, strict=True):
                found.append(elapsed_ns(backend, [1]))
        return opened[0].info.chunk_size, samples


def prefill_section(melt: Contender, ouro: Contender, *, tiny: bool) -> list[BenchRow]:
    """A prompt from an empty cache: one pass over Ouro's layers, which is the dense model, and both with 4 loops."""
    tests = [BenchTest(64 if tiny else N_PROMPT, 0, 0)]
    rows = bench([ouro], tests, loops=[1], repetitions=3)
    return rows + bench([ouro, melt], tests, loops=[N_LOOPS], repetitions=2)


def bench(
    models: Sequence[Contender],
    tests: Sequence[BenchTest],
    *,
    loops: Sequence[int],
    kv_types: Sequence[str] = ("f16",),
    repetitions: int = 1,
    parts: bool = False,
) -> list[BenchRow]:
    """The rows of these settings, each said as it is done. Raises: SystemExit for one that could not be measured."""
    runs = runs_of(models, tests, loops=loops, kv_types=kv_types)
    rows = []
    for row in measure(runs, repetitions=repetitions, parts=parts, limit_s=1800):
        what = f"{KINDS[row.kind]} T={row.loops}, {row.kv_type}, {row.test.name}"
        if row.avg_ts is None:
            raise SystemExit(f"error: {what}: {row.status}: {row.reason}")
        print(f"  {what}: {row.avg_ts:.2f} tok/s", flush=True)
        rows.append(row)
    return rows


def runs_of(
    models: Sequence[Contender], tests: Sequence[BenchTest], *, loops: Sequence[int], kv_types: Sequence[str]
) -> list[Run]:
    """Every combination, on llama.cpp with the model's own chunks."""
    return make_runs(
        models, tests, loops=loops, kv_types=kv_types, backends=["llama"], threads=[N_THREADS], chunks=[None]
    )


def _fits(model: Contender, n_ctx: int) -> bool:
    """True if weights, mapped and repacked, and an f16 cache leave a gigabyte of this machine's memory."""
    free = available_bytes()
    kv = model.config.with_loops(N_LOOPS).kv_bytes_per_token(2) * n_ctx
    return free is None or kv + 2 * model.header.file_bytes + 2**30 <= free


# -- lines


def loops_lines(rows: Sequence[BenchRow]) -> list[Line]:
    """Memory: flat for MELT, times T for Ouro, and the paper's two ratios."""
    rows = [row for row in rows if row.n_gen]
    flat = [row for row in rows if row.n_depth == min(row.n_depth for row in rows)]
    melt = {row.loops: row for row in flat if row.kind == "melt"}
    ouro = {row.loops: row for row in flat if row.kind == "ouro"}
    counts = ", ".join(map(str, sorted(melt)))
    depth = f"{flat[0].n_depth:,} tokens"
    multiples = {loops: row.kv_bytes / ouro[1].kv_bytes for loops, row in ouro.items()}
    deep_ouro = max((row for row in rows if row.kind == "ouro"), key=lambda row: row.n_depth)
    deep_melt = next(row for row in rows if (row.kind, row.n_depth) == ("melt", deep_ouro.n_depth))
    ratio = ouro[N_LOOPS].kv_bytes / melt[N_LOOPS].kv_bytes
    paper = PAPER_GB["ouro"][3] / PAPER_GB["melt"][3]
    total = total_bytes(deep_ouro) / total_bytes(deep_melt)
    resident = deep_ouro.rss_bytes / deep_melt.rss_bytes
    return [
        spread_line(f"MELT's cache at {counts} loops, {depth}", [row.kv_bytes for row in melt.values()]),
        spread_line(f"MELT's resident set at {counts} loops, {depth}", [row.rss_bytes for row in melt.values()]),
        Line(
            f"Ouro's cache at {counts} loops, {depth}",
            "exactly T times that of one loop",
            ", ".join(f"{multiples[loops]:g}" for loops in sorted(multiples)),
            all(multiple == loops for loops, multiple in multiples.items()),
        ),
        Line(f"Ouro's cache over MELT's, T=4, {depth}", "exactly 4.00 (paper: 4.00)", f"{ratio:.2f}", ratio == 4),
        Line(
            f"weights, cache and buffers, Ouro over MELT, T=4, {deep_melt.n_depth + deep_melt.n_gen:,} tokens",
            f"reported (paper, 16-bit weights, 32,000 tokens: {paper:.2f})",
            f"{total:.2f}; resident sets {resident:.2f}",
            None,
        ),
    ]


def spread_line(name: str, sizes: Sequence[int]) -> Line:
    """Sizes that should be the same."""
    spread = max(sizes) / min(sizes) - 1
    return Line(name, f"within {MAX_SPREAD:.0%}", f"{spread:.2%}", spread <= MAX_SPREAD)


def total_bytes(row: BenchRow) -> int:
    """Weights, cache and buffers together."""
    return row.weights_bytes + row.kv_bytes + row.compute_bytes


def decode_lines(rows: Sequence[BenchRow]) -> list[Line]:
    """Decoding with an empty cache against the memory's bandwidth."""
    return [limit_line(row, f"{KINDS[row.kind]} T=4, decode with an empty cache", MIN_EMPTY) for row in rows]


def depth_lines(rows: Sequence[BenchRow]) -> list[Line]:
    """Decoding with a full cache against the memory's bandwidth."""
    lines = []
    for row in rows:
        name = f"{KINDS[row.kind]} T=4, decode after {row.n_depth:,} tokens, {row.kv_type}"
        lines.append(limit_line(row, name, MIN_DEEP if row.kv_type == "f16" else None))
    return lines


def kv_types_lines(rows: Sequence[BenchRow]) -> list[Line]:
    """q8_0 against f16: the median of their tokens' ratios, which were timed in turn."""
    lines = []
    for f16, q8_0 in zip(rows[::2], rows[1::2], strict=True):
        ratio = statistics.median(a / b for a, b in zip(f16.samples_ns, q8_0.samples_ns, strict=True))
        name = f"{KINDS[f16.kind]} T=4, decode after {f16.n_depth:,} tokens, q8_0 over f16"
        measured = f"{ratio:.2f}, the median of {len(f16.samples_ns)} pairs"
        lines.append(Line(name, f"at least {MIN_Q8_0:.2f} times as fast", measured, ratio >= MIN_Q8_0))
    return lines


def limit_line(row: BenchRow, name: str, floor: float | None) -> Line:
    """The median of tokens, each over what the bandwidth right before and after it allows."""
    shares = sorted(row.limit_shares)
    low, high = shares[len(shares) // 4], shares[-1 - len(shares) // 4]
    measured = (
        f"{row.limit_share:.0%}, half of {len(shares)} tokens between {low:.0%} and {high:.0%}; "
        f"{row.avg_ts:.2f} tok/s, the memory {row.bandwidth / 1e9:.1f} GB/s"
    )
    if floor is None:
        return Line(name, "reported", measured, None)
    return Line(name, f"at least {floor:.0%} of the bandwidth's limit", measured, row.limit_share >= floor)


def prefill_lines(rows: Sequence[BenchRow], configs: dict[str, LoopConfig]) -> list[Line]:
    """The dense model's prefill rate over each looped one's, against the ratio of their products."""
    dense, *looped = rows
    base = prefill_products(configs["ouro"].with_loops(1), dense.n_prompt)
    lines = []
    for row in looped:
        work = prefill_products(configs[row.kind].with_loops(row.loops), row.n_prompt) / base
        slower = dense.avg_ts / row.avg_ts
        lines.append(
            Line(
                f"{KINDS[row.kind]} T=4, prefill of {row.n_prompt} tokens against one pass",
                f"at most {MAX_PREFILL} x {work:.2f} = {MAX_PREFILL * work:.2f} times as long",
                f"{slower:.2f}: {row.avg_ts:.1f} of {dense.avg_ts:.1f} tok/s",
                slower <= MAX_PREFILL * work,
            )
        )
    return lines


# Loops last: for half a minute after a process gave many GB back (17 were tried) the system and a virtual machine's
# host are at work on them, and a token of the next process has 91 instead of 94 % of the memory's speed (Zen 3, 12 and
# 6 processes).
SECTIONS: dict[str, Callable[..., list[BenchRow]]] = {
    "decode": decode_section,
    "depth": depth_section,
    "kv_types": kv_types_section,
    "prefill": prefill_section,
    "loops": loops_section,
}


def lines_of(section: str, rows: Sequence[BenchRow], configs: dict[str, LoopConfig]) -> list[Line]:
    """The lines that a section's rows give."""
    if section == "prefill":
        return prefill_lines(rows, configs)
    makers = {"loops": loops_lines, "decode": decode_lines, "depth": depth_lines, "kv_types": kv_types_lines}
    return makers[section](rows)


def show(lines: Sequence[Line]) -> None:
    """Print each line with its floor."""
    for line in lines:
        verdict = {True: "ok    ", False: "MISSED", None: "      "}[line.ok]
        print(f"{verdict} {line.name}\n         floor     {line.floor}\n         measured  {line.measured}")


def main() -> None:
    """Measure, print, write and check what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"some of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--json", type=Path, metavar="DIR", help="write DIR/SECTION.json with machine and commit")
    parser.add_argument("--check", action="store_true", help="fail when a line misses its floor")
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir(), help="keeps the random weights")
    parser.add_argument("--tiny", action="store_true", help="a shape of seconds that only tries the script")
    args = parser.parse_args()
    wanted = args.sections or list(SECTIONS)
    for section in wanted:
        if section not in SECTIONS:
            parser.error(f"section {section!r} is none of {', '.join(SECTIONS)}")
    shape = "tiny" if args.tiny else "ouro-1.4b"
    configs = {arch: shape_config(shape, arch) for arch in ("melt", "ouro")}
    print(f"random weights of {shape} in {args.cache_dir}", flush=True)
    files = {arch: random_model(shape, config, args.cache_dir) for arch, config in configs.items()}
    models = {arch: contenders(path, shape, dense=False)[0] for arch, path in files.items()}

    lines = []
    for section in wanted:
        print(f"{section}:", flush=True)
        rows = SECTIONS[section](models["melt"], models["ouro"], tiny=args.tiny)
        found = lines_of(section, rows, configs)
        lines += found
        if args.json:
            about = {"unix_time": int(time.time()), "n_threads": N_THREADS, "tiny": args.tiny, **provenance()}
            write(args.json / f"{section}.json", about, found, rows)
    print()
    show(lines)
    missed = [line.name for line in lines if line.ok is False]
    if args.check and missed:
        raise SystemExit(f"error: {len(missed)} of {len(lines)} lines miss their floor: {'; '.join(missed)}")


def write(path: Path, about: dict[str, Any], lines: Sequence[Line], rows: Sequence[BenchRow]) -> None:
    """A section's lines and rows, with what they belong to."""
    result = {**about, "lines": [vars(line) for line in lines], "rows": [row.to_dict() for row in rows]}
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
