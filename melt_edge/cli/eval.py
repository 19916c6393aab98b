"""`melt-edge eval`: how many problems that need several steps a model answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from melt_edge.cli.console import Stopwatch, err, out, print_json, safe, show_library_warnings, status
from melt_edge.cli.options import Debug, ExitThreshold, Json, Loops, Threads, is_onnx, model_path, option
from melt_edge.errors import ConfigError
from melt_edge.tasks import ALL_TASKS, MAX_STEPS, TASKS, test_problems

if TYPE_CHECKING:
    from melt_edge.tasks.evaluate import Scores
    from melt_edge.tasks.score import Score
    from melt_edge.tasks.solvers import FileSolver, ReferenceSolver


def evaluate(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", show_default=False, help="A GGUF file, an ONNX or checkpoint folder, or melt-tiny."
        ),
    ],
    task: Annotated[str, option("--task", metavar="NAME", help=f"{', '.join(TASKS)}, or {ALL_TASKS}.")],
    n: Annotated[
        int, option("--n", "-n", metavar="N", min=1, show=True, help="Problems, of all steps in turn.")
    ] = 1000,
    max_steps: Annotated[
        int, option("--max-steps", metavar="N", min=1, max=MAX_STEPS, show=True, help="Steps of the longest problems.")
    ] = MAX_STEPS,
    seed: Annotated[int, option("--seed", metavar="N", min=0, show=True, help="Chooses the problems.")] = 0,
    split: Annotated[
        str, option("--split", metavar="NAME", show=True, help="test, or validation to choose settings with.")
    ] = "test",
    loops: Loops = None,
    chunk: Annotated[
        int | None,
        option(
            "--chunk",
            "--chunk-size",
            metavar="N",
            min=1,
            panel="Model",
            help="Prompt tokens per chunk; 1: one token at a time. (default: the model's, as trained)",
        ),
    ] = None,
    threads: Threads = None,
    exit_threshold: ExitThreshold = None,
    max_tokens: Annotated[
        int, option("--max-tokens", metavar="N", min=1, show=True, help="Cut an answer after so many tokens.")
    ] = 16,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Count how many problems that need several dependent steps a model answers.

    Three tasks, each with up to 8 steps, generated and never part of training:

      chain      c=b+4;h=6;a=9-c;e=c-1;b=3;a%10=   answer 2, 3 steps
      nested     (9-((3+4)*7))%10=                 answer 0, 3 steps
      pointers   c>a;a>f;f>c;a>2=                  answer c, 2 steps from a

    The answer is one character: the steps happen in the loops, not in writing.
    A right answer ends with it. Greedy, by the model's own chat template; the
    same seed asks the same problems everywhere. The interval is Wilson's at 95 %.
    A checkpoint folder runs in the reference model, in float32.

    Examples:

      melt-edge eval ouro.gguf --task chain
      melt-edge eval ouro.gguf --task all --n 5000 --loops 2
      melt-edge eval melt-tiny --task pointers --max-steps 4 --chunk 1
      melt-edge eval melt.gguf --task nested --chunk 1 --json
      melt-edge eval my-checkpoint/ --task pointers --split validation
    """
    show_library_warnings()
    problems = test_problems(task, seed, n, split, max_steps)
    watch = Stopwatch()
    with _open(
        model, loops=loops, chunk=chunk, threads=threads, exit_threshold=exit_threshold, max_tokens=max_tokens
    ) as solver:
        from melt_edge.tasks.evaluate import evaluate as run

        with _progress(len(problems)) as progress:
            scores = run(solver, problems, progress)
        about = {"model": str(model), "task": task, "split": split, "seed": seed, "max_steps": max_steps}
        about |= {"loops": solver.loops, "chunk": solver.chunk}
    if as_json:
        print_json(_as_json(scores, about, watch.seconds))
    else:
        _show(scores, about, watch.seconds)


def _open(
    path: Path,
    *,
    loops: int | None,
    chunk: int | None,
    threads: int | None,
    exit_threshold: float | None,
    max_tokens: int,
) -> FileSolver | nullcontext[ReferenceSolver]:
    from melt_edge.tasks.solvers import FileSolver, ReferenceSolver

    with status(f"loading {path.name}"):
        if not path.is_dir() or is_onnx(path):
            return FileSolver(
                model_path(path),
                loops=loops,
                chunk=chunk,
                threads=threads,
                exit_threshold=exit_threshold,
                max_tokens=max_tokens,
            )
        if exit_threshold is not None:
            raise ConfigError("--exit-threshold ends the loops of an ONNX folder; export the checkpoint as one first")
        solver = ReferenceSolver.open(path, loops=loops, chunk=chunk, max_tokens=max_tokens)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return nullcontext(solver)


@contextmanager
def _progress(count: int) -> Iterator[Callable[[Score], None]]:
    """A callback that draws a bar with the share of right answers so far on a terminal, nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn())
    console = err()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("asking", total=count)

        def update(so_far: Score) -> None:
            bar.update(task, completed=so_far.count, description=f"{100 * so_far.share:5.1f} % right")

        yield update


def _as_json(scores: Scores, about: dict[str, Any], seconds: float) -> dict[str, Any]:
    from melt_edge.tasks.evaluate import as_dict

    return {**about, **as_dict(scores, tasks=about["task"] == ALL_TASKS), "seconds": round(seconds, 3)}


def _show(scores: Scores, about: dict[str, Any], seconds: float) -> None:
    from melt_edge.tasks.evaluate import by_steps, by_task, total

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("steps")
    for name in ("right", "of", "accuracy", "95 % interval"):
        table.add_column(name, justify="right")
    for steps, score in by_steps(scores).items():
        _add(table, str(steps), score)
    table.add_section()
    if about["task"] == ALL_TASKS:
        for name, score in by_task(scores).items():
            _add(table, name, score)
        table.add_section()
    _add(table, "all", total(scores))
    chunk = f", chunks of {about['chunk']}" if about["chunk"] else ""
    everything = total(scores)
    limit = "" if about["max_steps"] == MAX_STEPS else f" of at most {about['max_steps']} steps"
    problems = f"{everything.count} {about['split']} problems{limit} of seed {about['seed']}"
    title = f"{about['model']}: {about['task']}, {problems}"
    out().print(f"[bold]{escape(safe(title))}[/]", soft_wrap=True)
    out().print(f"{about['loops']} loops{chunk}; {_guess(about['task'])}; {seconds:.1f} s", soft_wrap=True)
    out().print(table)


def _guess(task: str) -> str:
    chance = max(each.chance for each in TASKS.values() if task in (each.name, ALL_TASKS))
    return f"a guess is right {100 * chance:.0f} % of the time at most"


def _add(table: Table, name: str, score: Score) -> None:
    low, high = score.interval
    interval = f"{100 * low:.1f} to {100 * high:.1f} %"
    table.add_row(name, str(score.right), str(score.count), f"{100 * score.share:.1f} %", interval)
