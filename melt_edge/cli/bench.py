"""`melt-edge bench`: how fast a model prefills and decodes, and how near that is to what the memory allows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from melt_edge.cli.console import err, note, out, print_json, safe
from melt_edge.cli.lists import about, check_names, names, numbers
from melt_edge.cli.models import contenders_of
from melt_edge.cli.options import Debug, Json, option
from melt_edge.errors import ConfigError

if TYPE_CHECKING:
    from melt_edge.bench.rows import BenchRow, Run
    from melt_edge.bench.table import Ratio

_MODELS, _TESTS, _SETTINGS, _OUTPUT = "What is measured", "Tests", "Settings", "Output"
_FORMATS = ("table", "md", "csv", "json")
_FLASH = {"auto": None, "on": True, "1": True, "off": False, "0": False}


def bench(
    models: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="MODEL", show_default=False, help="Model files of an Ouro or MELT, or melt-tiny, ouro-tiny."
        ),
    ] = None,
    shape: Annotated[
        str | None,
        option("--shape", metavar="NAME", panel=_MODELS, help="Random weights of ouro-1.4b, ouro-2.6b or tiny."),
    ] = None,
    arch: Annotated[
        str, option("--arch", metavar="A,A", panel=_MODELS, show=True, help="Architectures of these weights.")
    ] = "melt,ouro",
    weights: Annotated[
        str,
        option("--type", metavar="TYPE", panel=_MODELS, show=True, help="Type of these weights: q4_0, q8_0 or f16."),
    ] = "q4_0",
    cache_dir: Annotated[
        Path | None,
        option("--cache-dir", metavar="DIR", panel=_MODELS, help="Keeps random weights. (default: the user's cache)"),
    ] = None,
    n_prompt: Annotated[
        str, option("--n-prompt", "-p", metavar="N,N", panel=_TESTS, show=True, help="pp: tokens evaluated together.")
    ] = "512",
    n_gen: Annotated[
        str, option("--n-gen", "-n", metavar="N,N", panel=_TESTS, show=True, help="tg: tokens, one after another.")
    ] = "128",
    n_depth: Annotated[
        str,
        option("--n-depth", "-d", metavar="N,N", panel=_TESTS, show=True, help="Tokens in the cache before a test."),
    ] = "0",
    repetitions: Annotated[
        int, option("--repetitions", "-r", metavar="N", min=1, max=1000, panel=_TESTS, show=True, help="Of each test.")
    ] = 5,
    no_parts: Annotated[
        bool, option("--no-parts", panel=_TESTS, help="Do not say where a token's time goes: saves 4 tokens per test.")
    ] = False,
    loops: Annotated[
        str | None,
        option("--loops", metavar="N,N", panel=_SETTINGS, help="Numbers of loops. (default: the file's own)"),
    ] = None,
    kv_type: Annotated[
        list[str] | None,
        option(
            "--kv-type",
            "-ctk",
            "-ctv",
            "--cache-type-k",
            "--cache-type-v",
            metavar="T,T",
            panel=_SETTINGS,
            help="Cache types, of keys and values alike: f32, f16, q8_0, q4_0. (default: f16)",
        ),
    ] = None,
    backend: Annotated[
        str | None,
        option("--backend", metavar="B,B", panel=_SETTINGS, help="Only models of these: llama, onnx. (default: all)"),
    ] = None,
    threads: Annotated[
        str | None,
        option("--threads", "-t", metavar="N,N", panel=_SETTINGS, help="Threads. (default: one per physical core)"),
    ] = None,
    chunk_size: Annotated[
        str | None,
        option(
            "--chunk-size",
            "--ubatch-size",
            "-ub",
            metavar="N,N",
            panel=_SETTINGS,
            help="Prompt tokens per chunk. (default: a MELT's own, 512 for Ouro)",
        ),
    ] = None,
    flash_attn: Annotated[
        str,
        option("--flash-attn", "-fa", metavar="on|off|auto", panel=_SETTINGS, show=True, help="Flash attention."),
    ] = "auto",
    time_limit: Annotated[
        float, option("--time-limit", metavar="S", min=1.0, panel=_SETTINGS, show=True, help="Seconds for one model.")
    ] = 3600.0,
    output: Annotated[
        str, option("--output", "-o", metavar="|".join(_FORMATS), panel=_OUTPUT, show=True, help="Format.")
    ] = "table",
    base: Annotated[
        Path | None,
        option("--compare", metavar="BASE.json", panel=_OUTPUT, help="Also the ratios to this earlier --json."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure prefill (pp) and decode (tg) speed, in llama-bench's words.

    Each model is loaded once per setting, in a process of its own, and does every
    test -r times: mean and standard deviation of the tokens per second.

    Decoding reads every weight of the stack once per loop, and so the cache. These
    bytes, over the memory's own read speed, measured in the same run, give the
    limit. Where a token's time goes is timed apart from the tests. A depth (-d) is
    filled by repeating the rows of 64 tokens, which takes no time to compute.

    Examples:

      melt-edge bench ouro-tiny
      melt-edge bench --shape ouro-1.4b -p 0 -n 16 -d 0,2048 -r 3
      melt-edge bench melt.gguf --loops 1,2,4 -ctk f16,q8_0 --json > base.json
      melt-edge bench melt.gguf --loops 1,2,4 -ctk f16,q8_0 --compare base.json
    """
    if not models and shape is None:
        raise typer.BadParameter("nothing to measure: give model files, or --shape ouro-1.4b for random weights")
    output = "json" if as_json else _one_of("--output", output, _FORMATS)
    types = _one_type(kv_type)
    backends = None if backend is None else names(backend)
    check_names(types, backends or [])
    flash = _FLASH[_one_of("--flash-attn", flash_attn, tuple(_FLASH))]

    from melt_edge.bench.measure import make_runs
    from melt_edge.bench.rows import make_tests
    from melt_edge.bench.table import ratios, read_base

    tests = make_tests(
        numbers("--n-prompt", n_prompt, 2**20, low=0),
        numbers("--n-gen", n_gen, 2**20, low=0),
        numbers("--n-depth", n_depth, 2**20, low=0),
    )
    if not tests:
        raise typer.BadParameter("nothing to measure: --n-prompt and --n-gen are both 0")
    earlier = read_base(base) if base is not None else None
    rows: list[BenchRow] = []
    with contenders_of(
        models or [], shape=shape, archs=names(arch), weights=weights, cache_dir=cache_dir, dense=False
    ) as found:
        runs = make_runs(
            found,
            tests,
            loops=numbers("--loops", loops, 64) if loops is not None else None,
            kv_types=types,
            backends=backends,
            threads=numbers("--threads", threads, 512) if threads is not None else [None],
            chunks=numbers("--chunk-size", chunk_size, 2**20) if chunk_size is not None else [None],
            flash_attn=flash,
        )
        if not runs:
            raise ConfigError(f"--backend is {backend}, but no model here runs on it; leave it out")
        try:
            _measure(runs, rows, repetitions=repetitions, parts=not no_parts, limit_s=time_limit)
        except KeyboardInterrupt:
            note(f"stopped: {len(rows)} of {len(runs) * len(tests)} tests are done")
            _report(rows, output, None if earlier is None else ratios(rows, earlier), base, complete=False)
            raise
    _report(rows, output, None if earlier is None else ratios(rows, earlier), base, complete=True)


def _measure(runs: list[Run], rows: list[BenchRow], **how: Any) -> None:
    """Append the row of each test as it is done, with a line on standard error."""
    from melt_edge.bench.measure import measure
    from melt_edge.cli.console import status

    for run in runs:
        with status(safe(f"{run}: {len(run.tests)} tests")):
            for row in measure([run], **how):
                rows.append(row)
                test = escape(safe(f"{run}, {row.test.name}"))
                err().print(f"  [cyan]{test:<44}[/] {escape(safe(_outcome(row)))}", soft_wrap=True)


def _outcome(row: BenchRow) -> str:
    if row.avg_ts is None:
        return f"{row.status}: {row.reason}"
    return f"{row.avg_ts:.2f} ± {row.stddev_ts:.2f} tok/s"


def _report(
    rows: list[BenchRow], output: str, compared: list[Ratio] | None, base: Path | None, *, complete: bool
) -> None:
    """Print what was measured in the format asked for."""
    from melt_edge.bench.table import csv_text, markdown, notes, ratio_table, tables

    console = out()
    if output == "json":
        more = {} if compared is None else {"compared": [ratio.to_dict() for ratio in compared]}
        print_json({**about(), "complete": complete, "rows": [row.to_dict() for row in rows], **more})
        return
    if output == "csv":
        console.out(csv_text(rows), end="")
    elif output == "md":
        console.out(markdown(rows), end="")
    else:
        for table in tables(rows):
            console.print(table)
        for line in notes(rows):
            console.print(line, style="dim", markup=False)
    if compared is not None and output == "table":
        console.print()
        if compared:
            console.print(ratio_table(compared, str(base)))
        else:
            note(f"{base}: has none of these tests of these models with these settings")


def _one_of(name: str, text: str, allowed: tuple[str, ...]) -> str:
    if text.lower() not in allowed:
        raise typer.BadParameter(f"{name} is {text!r}, expected one of {', '.join(allowed)}")
    return text.lower()


def _one_type(given: list[str] | None) -> list[str]:
    """The cache types of -ctk and -ctv, which are the same here."""
    lists = [names(text) for text in given or ["f16"]]
    if any(one != lists[0] for one in lists):
        raise typer.BadParameter("keys and values of one cache have the same type here: give -ctk and -ctv the same")
    return lists[0]
