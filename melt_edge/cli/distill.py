"""`melt-edge distill`: from an Ouro checkpoint to a MELT checkpoint, in two phases of training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from melt_edge.cli.console import Stopwatch, err, human_count, out, row, safe
from melt_edge.cli.options import Debug, option
from melt_edge.errors import BackendUnavailableError, ConfigError

if TYPE_CHECKING:
    from melt_edge.distill.settings import Settings
    from melt_edge.distill.trainer import Report

# Lines where no terminal draws a bar: the first step, each tenth of the run, the last.
_LINES = 10


def distill(
    teacher: Annotated[
        Path,
        typer.Argument(metavar="TEACHER", show_default=False, help="Checkpoint folder of an Ouro."),
    ],
    output: Annotated[
        Path,
        option("--output", "-o", metavar="OUT", help="The checkpoint folder to write. The run lies in OUT.train."),
    ],
    data: Annotated[
        list[str] | None,
        option("--data", metavar="FILE", help="JSONL or text to train on, or task:NAME; may be repeated."),
    ] = None,
    preset_name: Annotated[
        str, option("--preset", metavar="NAME", show=True, help="Settings to begin with: paper or tiny.")
    ] = "paper",
    config: Annotated[
        Path | None, option("--config", metavar="FILE", help="JSON object with settings that differ from the preset.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        option("--set", metavar="KEY=VALUE", help="One setting, as in the config file; may be repeated."),
    ] = None,
    resume: Annotated[
        bool, option("--resume", help="Continue the run in OUT.train, or begin if there is none.")
    ] = False,
    device: Annotated[
        str, option("--device", metavar="NAME", show=True, help="auto, cpu, cuda or mps; torchrun for several GPUs.")
    ] = "auto",
    threads: Annotated[
        int | None, option("--threads", "-t", metavar="N", min=1, help="CPU threads. (default: torch's)")
    ] = None,
    force: Annotated[bool, option("--force", "-f", help="Overwrite OUT and OUT.train if they exist.")] = False,
    debug: Debug = False,
) -> None:
    """Train a MELT from an Ouro: one cache row for all loops.

    Phase 1 moves the attention from the teacher's rows to the shared ones,
    phase 2 learns the teacher's logits and attention outputs. Data are JSON
    lines with "text", "prompt" and "answer", or "messages"; or text files.
    Stop it at any time and continue with --resume.

    Examples:

      melt-edge distill ouro-tiny -o melt-tiny --preset tiny
      melt-edge distill Ouro-1.4B -o MELT-1.6B --data maths.jsonl
      melt-edge distill ouro -o melt --data a.jsonl --set beta=0.2
    """
    settings = _settings(preset_name, config, data, changes)
    world_of, run = _library()
    watch = Stopwatch()
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    with world_of(device) as world:
        with _progress(settings, shown=world.is_main) as report:
            result = run(teacher, output, settings, world, resume=resume, force=force, report=report)
        if not world.is_main:
            return
    done = result.steps - result.first_step
    out().print(f"[bold green]wrote[/] [bold]{escape(safe(str(output)))}[/] in {watch.seconds:.1f} s", soft_wrap=True)
    row("steps", f"{done} now, {result.steps} in all")
    row("log", str(result.folder / "log.jsonl"))
    if settings.gate in ("elementwise", "none"):
        name = escape(safe(str(output)))
        out().print(f"Next: melt-edge export gguf {name} {name}.gguf --type q8_0", soft_wrap=True)


def _settings(preset_name: str, config: Path | None, data: list[str] | None, changes: list[str] | None) -> Settings:
    """The preset, changed by the file, changed by the options."""
    from melt_edge.distill.settings import preset, read_settings

    settings = preset(preset_name)
    if config is not None:
        settings = read_settings(config, settings)
    if data:
        settings = settings.changed({"data": data}, source="--data")
    return settings.changed(dict(_pair(change) for change in changes or ()), source="--set")


def _pair(change: str) -> tuple[str, Any]:
    key, found, text = change.partition("=")
    if not found:
        raise ConfigError(f"--set {change}: expected KEY=VALUE, for example --set beta=0.2")
    try:
        return key, json.loads(text)
    except ValueError:
        return key, text  # a bare word, as in gate=scalar


def _library() -> tuple[Callable[..., Any], Callable[..., Any]]:
    try:
        import torch  # noqa: F401
    except ImportError as failure:
        raise BackendUnavailableError("training needs torch; install melt-edge[export]") from failure
    from melt_edge.distill.distributed import joined_world
    from melt_edge.distill.run import distill as run

    return joined_world, run


@contextmanager
def _progress(settings: Settings, *, shown: bool) -> Iterator[Callable[[Report], None]]:
    """A callback for every step: a bar on a terminal, a line now and then elsewhere."""
    console = err()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    total = settings.total_steps
    every = max(1, total // _LINES)
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as progress:
        task = progress.add_task("starting", total=total)

        def report(step: Report) -> None:
            progress.update(task, completed=step.step + 1, description=f"{step.phase:<10} loss {step.loss:.4g}")
            if step.step % every == 0 or step.step + 1 == total:
                progress.console.print(_line(step), soft_wrap=True)

        yield report


def _line(step: Report) -> str:
    speed = human_count(step.tokens / step.seconds)
    gates = " ".join(f"{z:.3f}" for z in step.gate_means)
    return (
        f"step {step.step:5d}  {step.phase:<10}  alpha {step.alpha:.2f}  divergence {step.kd:.4f}  "
        f"alignment {step.alignment:.4g}  norm {step.grad_norm:.3g}  {speed} tokens/s"
        + (f"  z {gates}" if gates else "")
    )
