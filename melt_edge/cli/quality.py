"""`melt-edge perplexity` and `melt-edge kl`: what quantisation, loops, chunks and cache types cost in quality."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from melt_edge.cli.console import Stopwatch, err, print_json, row, show_library_warnings
from melt_edge.cli.options import Debug, Json, KvType, Loops, ModelPath, Threads, check_kv_type, option
from melt_edge.cli.quality_inputs import (
    check_same_vocabulary,
    opened,
    read_bytes,
    settings,
    settings_json,
    settings_line,
    window_size,
    windows_of,
)

if TYPE_CHECKING:
    from melt_edge.quality.divergence import Divergence
    from melt_edge.quality.perplexity import Perplexity
    from melt_edge.quality.windows import Windows

_BASE, _MODEL, _WINDOWS = "Base", "Model", "Windows"

Text = Annotated[
    str, typer.Argument(metavar="TEXT", show_default=False, help="A UTF-8 text file; - reads standard input.")
]
Base = Annotated[
    Path, typer.Argument(metavar="BASE", show_default=False, help="The file to compare with; may be MODEL itself.")
]
Chunk = Annotated[
    int | None,
    option(
        "--chunk",
        "--chunk-size",
        metavar="N",
        min=1,
        panel=_MODEL,
        help="Prompt tokens per chunk; a MELT's result depends on it. (default: the file's, as trained)",
    ),
]
ShareKv = Annotated[
    bool, option("--share-kv", panel=_MODEL, help="Run an Ouro with one cache row for all loops (a temporary copy).")
]
Ctx = Annotated[
    int | None,
    option(
        "--ctx",
        "--n-ctx",
        "-c",
        metavar="N",
        min=4,
        panel=_WINDOWS,
        help="Tokens per window. (default: 512, or all a short model knows)",
    ),
]
Stride = Annotated[
    int | None,
    option(
        "--stride",
        metavar="N",
        min=1,
        panel=_WINDOWS,
        help="Move windows by N tokens and score the last N of each. (default: side by side, their second half)",
    ),
]
ParseSpecial = Annotated[
    bool,
    option("--parse-special", panel=_WINDOWS, help="Read <|...|> in TEXT as control tokens: for chat transcripts."),
]
BaseLoops = Annotated[
    int | None,
    option("--base-loops", metavar="N", min=1, max=64, panel=_BASE, help="--loops of BASE."),
]
BaseChunk = Annotated[
    int | None,
    option("--base-chunk", metavar="N", min=1, panel=_BASE, help="--chunk of BASE."),
]
BaseKvType = Annotated[
    str,
    option(
        "--base-kv-type",
        metavar="TYPE",
        panel=_BASE,
        show=True,
        callback=check_kv_type,
        help="--kv-type of BASE.",
    ),
]
BaseShareKv = Annotated[bool, option("--base-share-kv", panel=_BASE, help="--share-kv of BASE.")]


def perplexity(
    model: ModelPath,
    text: Text,
    ctx: Ctx = None,
    stride: Stride = None,
    parse_special: ParseSpecial = False,
    loops: Loops = None,
    chunk: Chunk = None,
    kv_type: KvType = "f16",
    share_kv: ShareKv = False,
    threads: Threads = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure how well a model predicts a text: its perplexity, lower is better.

    The text is cut into windows, each read from an empty cache, and the tokens
    of the second half of each are scored, as llama-perplexity does. Compare
    values only on the same text, window and vocabulary; bits per byte also
    between vocabularies. A model that only knows chats is best measured on
    them, with --parse-special. Errors are standard errors, as if tokens were
    independent.

    Examples:

      melt-edge perplexity ouro.gguf wiki.txt
      melt-edge perplexity ouro.gguf wiki.txt --loops 2
      melt-edge perplexity ouro.gguf wiki.txt --share-kv --chunk 1
      melt-edge perplexity ouro.gguf chats.txt --parse-special --ctx 1024
      head -n 2000 wiki.txt | melt-edge perplexity melt.gguf - --json
    """
    from melt_edge.quality.perplexity import measure_perplexity

    show_library_warnings()
    data = read_bytes(text)
    side = settings(model, loops=loops, chunk_size=chunk, kv_type=kv_type, share_kv=share_kv)
    n_ctx = window_size(ctx, side)
    watch = Stopwatch()
    with opened(side, n_ctx=n_ctx, n_threads=threads) as loaded:
        windows = windows_of(data, loaded, n_ctx=n_ctx, stride=stride, parse_special=parse_special, source=text)
        with _progress(windows.count, "perplexity") as progress:
            found = measure_perplexity(
                loaded.logits,
                windows,
                token_bytes=lambda token: len(loaded.token_bytes(token)),
                progress=progress,
            )
        if as_json:
            measured = {
                "perplexity": found.value,
                "perplexity_error": found.error,
                "bits_per_byte": found.bits_per_byte,
            }
            print_json(measured | _windows_json(windows, watch) | {"model": settings_json(side, loaded)})
        else:
            _show_perplexity(found, windows, settings_line(side, loaded))


def kl(
    model: ModelPath,
    base: Base,
    text: Text,
    ctx: Ctx = None,
    stride: Stride = None,
    parse_special: ParseSpecial = False,
    loops: Loops = None,
    chunk: Chunk = None,
    kv_type: KvType = "f16",
    share_kv: ShareKv = False,
    base_loops: BaseLoops = None,
    base_chunk: BaseChunk = None,
    base_kv_type: BaseKvType = "f16",
    base_share_kv: BaseShareKv = False,
    threads: Threads = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure how far a model's predictions are from a base's, on your text.

    For every scored token the KL divergence of MODEL from BASE, in nats: 0
    where both predict the same. It tells small changes apart that perplexity
    cannot. Use it between two files of one vocabulary (a quantised one and its
    original), or between settings of one file: give the file twice and change
    an option of MODEL. A cache that the loops share is read by later chunks
    only: --chunk 1 shows what it changes in generated text, a chunk as long as
    the window shows nothing. Windows and errors as in melt-edge perplexity.

    Examples:

      melt-edge kl ouro-q4_0.gguf ouro-f16.gguf wiki.txt
      melt-edge kl ouro.gguf ouro.gguf wiki.txt --kv-type q4_0
      melt-edge kl ouro.gguf ouro.gguf wiki.txt --share-kv --chunk 1
      melt-edge kl melt.gguf melt.gguf wiki.txt --chunk 512 --base-chunk 1
    """
    from melt_edge.quality.divergence import measure_divergence

    show_library_warnings()
    data = read_bytes(text)
    side = settings(model, loops=loops, chunk_size=chunk, kv_type=kv_type, share_kv=share_kv)
    other = settings(base, loops=base_loops, chunk_size=base_chunk, kv_type=base_kv_type, share_kv=base_share_kv)
    check_same_vocabulary(side.file, other.file)
    n_ctx = window_size(ctx, side, other)
    watch = Stopwatch()
    with (
        opened(other, n_ctx=n_ctx, n_threads=threads) as base_model,
        opened(side, n_ctx=n_ctx, n_threads=threads) as loaded,
    ):
        windows = windows_of(data, base_model, n_ctx=n_ctx, stride=stride, parse_special=parse_special, source=text)
        with _progress(windows.count, "mean KL") as progress:
            found = measure_divergence(loaded.logits, base_model.logits, windows, progress=progress)
        if as_json:
            sides = {"model": settings_json(side, loaded), "base": settings_json(other, base_model)}
            print_json(_divergence_json(found) | _windows_json(windows, watch) | sides)
        else:
            _show_divergence(found, windows)
            row("model", settings_line(side, loaded))
            row("base", settings_line(other, base_model))


@contextmanager
def _progress(total: int, name: str) -> Iterator[Callable[[int, float], None]]:
    """A callback (windows done, value so far) that draws a bar on a terminal and nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn())
    console = err()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(name, total=total)

        def update(done: int, value: float) -> None:
            progress.update(task, completed=done, description=f"{name} {value:.4g}")

        yield update


def _windows_json(windows: Windows, watch: Stopwatch) -> dict[str, Any]:
    return {
        "tokens": len(windows.tokens),
        "tokens_scored": windows.total_scored,
        "windows": windows.count,
        "n_ctx": windows.n_ctx,
        "stride": windows.step,
        "seconds": round(watch.seconds, 3),
    }


def _divergence_json(found: Divergence) -> dict[str, Any]:
    values = {key: value for key, value in asdict(found).items() if key != "n_scored"}
    kl_keys = ("mean", "mean_error", "median", "p90", "p99", "p99_9", "maximum")
    return {"kl": {key: values.pop(key) for key in kl_keys}} | values


def _show_perplexity(found: Perplexity, windows: Windows, model: str) -> None:
    row("perplexity", f"{found.value:.4f} +/- {found.error:.4f}", style="bold")
    row("bits per byte", f"{found.bits_per_byte:.4f}")
    _show_windows(windows)
    row("model", model)


def _show_divergence(found: Divergence, windows: Windows) -> None:
    low, high = found.same_top_interval
    row("KL divergence", f"{found.mean:.4g} +/- {found.mean_error:.2g} nats per token", style="bold")
    row(
        "",
        f"median {found.median:.3g}, 90 % {found.p90:.3g}, 99 % {found.p99:.3g}, "
        f"99.9 % {found.p99_9:.3g}, max {found.maximum:.3g}",
    )
    row("same top token", f"{found.same_top:.2%} (95 % interval {low:.2%} to {high:.2%})")
    row("right token", f"its probability changes by {found.rms_delta_p:.2%} (root mean square)")
    row(
        "perplexity",
        f"{found.ppl:.4f} +/- {found.ppl_error:.4f}, base {found.base_ppl:.4f} +/- {found.base_ppl_error:.4f}, "
        f"ratio {found.ppl_ratio:.4f} +/- {found.ppl_ratio_error:.4f}",
    )
    _show_windows(windows)


def _show_windows(windows: Windows) -> None:
    row(
        "scored",
        f"{windows.total_scored} of {len(windows.tokens)} tokens, in {windows.count} windows of {windows.n_ctx}",
    )
