"""Where the commands print: the two consoles, sizes and counts for people, text made safe for a terminal."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

# Everything below 0x20 but newline and tab, DEL, and the C1 controls: what could move a cursor or set a title.
_CONTROLS = {code: 0xFFFD for code in (*range(0x20), *range(0x7F, 0xA0)) if code not in (0x09, 0x0A)}


class _PipeConsole(Console):
    """A console that lets a closed pipe reach main(), which knows the exit code for it."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def out() -> Console:
    """The console of standard output, as it is now (tests replace it)."""
    return _PipeConsole(highlight=False)


def err() -> Console:
    """The console of standard error: progress, closing lines, errors."""
    return _PipeConsole(stderr=True, highlight=False)


def error_line(message: str) -> None:
    """Print ``error: message`` on standard error."""
    err().print(f"[bold red]error:[/] {escape(safe(message))}", soft_wrap=True)


def note(message: str) -> None:
    """Print a remark on standard error."""
    err().print(f"[yellow]note:[/] {escape(safe(message))}", soft_wrap=True)


def row(key: str, value: str, *, console: Console | None = None, style: str = "") -> None:
    """Print one aligned ``key  value`` line, never wrapped, so that it can be searched."""
    text = escape(safe(value).replace("\n", " "))
    (console or out()).print(f"  [cyan]{key:<14}[/] " + (f"[{style}]{text}[/]" if style else text), soft_wrap=True)


def safe(text: str) -> str:
    """The text with control characters replaced: file contents and model output do not steer the terminal."""
    return text.translate(_CONTROLS)


def write_text(text: str) -> None:
    """Write a piece of a model's answer to standard output at once, cleaned only where a terminal reads it."""
    sys.stdout.write(safe(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object on standard output; numbers JSON has no name for become "inf", "-inf" or "nan"."""
    text = json.dumps(_without_nonfinite(value), indent=2, ensure_ascii=False, default=str, allow_nan=False)
    sys.stdout.write(text + "\n")


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nonfinite(item) for item in value]
    return value


def human_bytes(count: float) -> str:
    """A size for people: 640 B, 1.21 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"


def human_count(count: float) -> str:
    """A number for people: 960, 65.5 K, 1.43 B."""
    for unit in ("", " K", " M", " B"):
        if count < 1000 or unit == " B":
            break
        count /= 1000
    return f"{count:.0f}{unit}" if unit == "" else f"{count:.3g}{unit}"


Progressor = Callable[[int, int, str], None]


@contextmanager
def progress_bar() -> Iterator[Progressor]:
    """A callback (done bytes, total bytes, what) that draws a bar on a terminal and nothing elsewhere."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = err()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("starting", total=None)

        def update(done_bytes: int, total_bytes: int, what: str) -> None:
            progress.update(task, completed=done_bytes, total=total_bytes, description=f"{escape(what[:20]):<20}")

        yield update


@contextmanager
def status(message: str) -> Iterator[None]:
    """A spinner on a terminal while something takes its time."""
    console = err()
    if not console.is_terminal:
        yield
        return
    with console.status(escape(message)):
        yield


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._start


class _WarningLines(logging.Handler):
    """The library's own warnings as ``note:`` lines; llama.cpp's are about its defaults, not about the user's."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        if record.name.startswith("melt_edge.llama") and record.levelno < logging.ERROR:
            return
        note(record.getMessage())


def show_library_warnings() -> None:
    """Send the library's warnings to standard error, once per process."""
    logger = logging.getLogger("melt_edge")
    if not any(isinstance(handler, _WarningLines) for handler in logger.handlers):
        logger.addHandler(_WarningLines(level=logging.WARNING))
        logger.propagate = False
