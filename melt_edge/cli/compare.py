"""`melt-edge compare`: MELT, Ouro and a dense model side by side, each point measured in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from melt_edge.cli.console import err, human_bytes, note, out, print_json, safe
from melt_edge.cli.lists import about, check_names, names, numbers
from melt_edge.cli.models import contenders_of
from melt_edge.cli.options import Debug, Force, Json, Threads, check_new_file, option
from melt_edge.errors import ConfigError

if TYPE_CHECKING:
    from melt_edge.compare.points import Point, Row

_DEFAULT_LOOPS = [1, 2, 4]
_MODELS, _GRID, _OUTPUT = "What is compared", "Points", "Output"


def compare(
    models: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="MODEL", show_default=False, help="GGUF files or ONNX folders of an Ouro or MELT, or melt-tiny."
        ),
    ] = None,
    shape: Annotated[
        str | None,
        option("--shape", metavar="NAME", panel=_MODELS, help="Random weights of ouro-1.4b, ouro-2.6b or tiny."),
    ] = None,
    weights: Annotated[
        str,
        option("--type", metavar="TYPE", panel=_MODELS, show=True, help="Type of these weights: q4_0, q8_0 or f16."),
    ] = "q4_0",
    share_kv: Annotated[
        bool, option("--share-kv", panel=_MODELS, help="Each Ouro file also with one cache row for all loops.")
    ] = False,
    cache_dir: Annotated[
        Path | None,
        option("--cache-dir", metavar="DIR", panel=_MODELS, help="Keeps random weights. (default: the user's cache)"),
    ] = None,
    loops: Annotated[
        str | None,
        option(
            "--loops", metavar="N,N", panel=_GRID, help="Numbers of loops. (default: a file's own; 1,2,4 for --shape)"
        ),
    ] = None,
    ctx: Annotated[
        str, option("--ctx", metavar="N,N", panel=_GRID, show=True, help="Contexts to fill, in tokens; 4k is 4096.")
    ] = "1k",
    kv_type: Annotated[
        str, option("--kv-type", metavar="T,T", panel=_GRID, show=True, help="Cache types: f32, f16, q8_0, q4_0.")
    ] = "f16",
    backend: Annotated[
        str | None,
        option("--backend", metavar="B,B", panel=_GRID, help="Only models of these: llama, onnx. (default: all)"),
    ] = None,
    threads: Threads = None,
    n_decode: Annotated[
        int,
        option("--n-decode", metavar="N", min=1, panel=_GRID, show=True, help="Tokens decoded at a context's end."),
    ] = 32,
    n_prefill: Annotated[
        int | None,
        option(
            "--n-prefill",
            metavar="N",
            min=1,
            panel=_GRID,
            help="Compute so many tokens and repeat their rows: fills long contexts at once. (default: compute all)",
        ),
    ] = None,
    time_limit: Annotated[
        float, option("--time-limit", metavar="S", min=1.0, panel=_GRID, show=True, help="Seconds for one point.")
    ] = 3600.0,
    csv_file: Annotated[
        Path | None, option("--csv", metavar="FILE", panel=_OUTPUT, help="Write a line per point.")
    ] = None,
    plot_file: Annotated[
        Path | None,
        option("--plot", metavar="FILE", panel=_OUTPUT, help="Draw a .png or .svg; needs the extra 'plot'."),
    ] = None,
    as_json: Json = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Measure memory and speed of MELT, Ouro and a dense model, side by side.

    Each point is a fresh process that loads the model, fills the context to its
    stated length with random tokens and decodes the last of them. Bytes are the
    library's own figures, resident sets the system's. A point that does not fit
    into memory is skipped, and its computed size is shown with a ~.

    --shape writes random weights of a published model's size once (1.6 B in
    Q4_0: 0.9 GB for each of the two), so no real weights are needed. The dense
    model is Ouro with one loop. Ctrl-C keeps what has been measured.

    Examples:

      melt-edge compare --shape ouro-1.4b --loops 1,2,4 --ctx 1k,4k
      melt-edge compare --shape ouro-1.4b --ctx 4k,16k --n-prefill 512
      melt-edge compare --shape tiny --plot tiny.png --csv tiny.csv
      melt-edge compare ouro.gguf melt.gguf --kv-type f16,q8_0
      melt-edge compare ouro.gguf --share-kv --json
    """
    if not models and shape is None:
        raise typer.BadParameter("nothing to compare: give model files, or --shape ouro-1.4b for random weights")
    counts = _DEFAULT_LOOPS if shape is not None else None
    if loops is not None:
        counts = numbers("--loops", loops, 64)
    lengths, kv_types = numbers("--ctx", ctx, 2**20), names(kv_type)
    backends = None if backend is None else names(backend)
    check_names(kv_types, backends or [])
    _check_outputs(csv_file, plot_file, force=force)

    from melt_edge.compare.points import grid
    from melt_edge.runtime.machine import usable_cores

    with contenders_of(models or [], shape=shape, weights=weights, cache_dir=cache_dir, share_kv=share_kv) as found:
        points = grid(
            found,
            loops=counts,
            n_ctx=lengths,
            kv_types=kv_types,
            backends=backends,
            n_decode=n_decode,
            n_threads=threads or usable_cores(),
            n_prefill=n_prefill,
        )
        if not points:
            raise ConfigError(f"--backend is {backend}, but no model here runs on it; leave it out")
        rows: list[Row] = []
        try:
            _measure(points, rows, time_limit)
        except KeyboardInterrupt:
            note(f"stopped: {len(rows)} of {len(points)} points are done")
            _report(rows, as_json, csv_file, plot_file, complete=False)
            raise
        _report(rows, as_json, csv_file, plot_file, complete=True)


def _measure(points: list[Point], rows: list[Row], limit_s: float) -> None:
    """Append the row of each point as it is done, with a line on standard error."""
    from melt_edge.compare.measure import measure_point

    console = err()
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=len(points))
        for point in points:
            progress.update(task, description=escape(safe(str(point))))
            row = measure_point(point, limit_s=limit_s)
            rows.append(row)
            progress.advance(task)
            progress.console.print(
                f"  [cyan]{escape(safe(str(point))):<44}[/] {escape(safe(_outcome(row)))}", soft_wrap=True
            )


def _outcome(row: Row) -> str:
    from melt_edge.compare.table import digits

    if row.status != "measured":
        return f"{row.status}: {row.reason}"
    return f"cache {human_bytes(row.kv_bytes or 0)}, {digits(row.decode_tps or 0.0)} tok/s"


def _report(rows: list[Row], as_json: bool, csv_file: Path | None, plot_file: Path | None, *, complete: bool) -> None:
    """Print and write what was measured; the files appear complete or not at all."""
    from melt_edge.compare.paper import paper_table
    from melt_edge.compare.plot import write_plot
    from melt_edge.compare.table import csv_text
    from melt_edge.files import atomic_output, write_text

    paper = paper_table(rows)
    if as_json:
        print_json({**about(), "complete": complete, "rows": [row.to_dict() for row in rows], "paper_table_2": paper})
    else:
        _show(rows, paper)
    if csv_file is not None:
        write_text(csv_file, csv_text(rows))
    if plot_file is not None and rows:
        with atomic_output(plot_file, force=True) as temporary:
            write_plot(rows, temporary, format=plot_file.suffix.lower().lstrip("."))


def _show(rows: list[Row], paper: dict[str, Any] | None) -> None:
    from melt_edge.compare.table import paper_lines, ratio_lines, tables

    console = out()
    for table in tables(rows):
        console.print(table)
    if any(row.bytes_from == "computed" for row in rows):
        console.print("~ computed, not measured")
    if any(row.bandwidth for row in rows):
        console.print("RAM: the memory's read speed around decoding; compare speeds where it is alike")
    console.print()
    for line in ratio_lines(rows):
        console.print(line, soft_wrap=True)
    if paper is not None:
        console.print()
        console.print(paper_lines(paper))


def _check_outputs(csv_file: Path | None, plot_file: Path | None, *, force: bool) -> None:
    """What could not be written at the end is told before anything is measured."""
    from melt_edge.compare.plot import check_plot

    if plot_file is not None:
        check_plot(plot_file)
    for path in (csv_file, plot_file):
        if path is not None and not (force and path.is_file()):
            check_new_file(path)
