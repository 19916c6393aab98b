"""Make the two models that melt-edge ships, end to end: one command.

    python examples/train_tiny/make_models.py OUT_FOLDER

Trains ouro-tiny, distils melt-tiny from it with the preset "tiny", writes both as GGUF files and measures
them on problems that neither was trained on. The same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from problems import Problem, held_out_problems, is_correct
from rich.console import Console
from rows import write_messages
from tables import sums_table, task_tables
from train import Settings, save_teacher, train

from melt_edge.distill.distributed import joined_world
from melt_edge.distill.run import distill
from melt_edge.distill.settings import preset
from melt_edge.distill.trainer import Report
from melt_edge.export.gguf import export_gguf
from melt_edge.files import write_text
from melt_edge.tasks import ALL_TASKS, test_problems
from melt_edge.tasks.evaluate import as_dict, evaluate, total
from melt_edge.tasks.score import Score
from melt_edge.tasks.solvers import FileSolver

TEACHER, STUDENT = "ouro-tiny", "melt-tiny"
FILE_TYPES = {TEACHER: "f32", STUDENT: "f16"}
# Test problems of the tasks, held-out sums.
TASK_PROBLEMS, SUMS = 5000, 5000


class Maker:
    """The steps in order, each left out if its result is there."""

    def __init__(self, out: Path, teacher: Settings, student_changes: dict[str, Any], count: int) -> None:
        self.out, self.teacher, self.count = out, teacher, count
        self.student = preset("tiny").changed(
            {"data": [str(out / "problems.jsonl")], **student_changes}, source="the student"
        )
        self.console = Console()
        self.times_path = out / "seconds.json"
        self.seconds: dict[str, float] = json.loads(self.times_path.read_text()) if self.times_path.exists() else {}

    def run(self) -> None:
        """Everything that is missing."""
        self.out.mkdir(parents=True, exist_ok=True)
        if TEACHER not in self.seconds:
            with self.timed(TEACHER):
                train(self.teacher, self.console, partial(save_teacher, self.out / TEACHER))
        if STUDENT not in self.seconds:
            with self.timed(STUDENT):
                # as many as the student reads
                count = self.student.total_steps * self.student.batch_size
                write_messages(self.out / "problems.jsonl", self.student.seed, count, self.teacher.more_mixture)
                self.distil()
        for name in (TEACHER, STUDENT):
            export_gguf(self.out / name, self.out / f"{name}.gguf", type=FILE_TYPES[name], force=True)
        self.measure()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Keep how long a step took, which also says that it is done."""
        self.console.rule(name)
        began = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - began, 1)
        write_text(self.times_path, json.dumps(self.seconds) + "\n")

    def distil(self) -> None:
        """The student; a run that was stopped goes on."""
        total_steps = self.student.total_steps
        every = max(1, total_steps // 20)

        def report(step: Report) -> None:
            if step.step % every == 0 or step.step + 1 == total_steps:
                gates = " ".join(f"{z:.3f}" for z in step.gate_means)
                self.console.print(
                    f"step {step.step:5d}  alpha {step.alpha:.2f}  chunk {step.chunk_size}  divergence {step.kd:.4f}  "
                    f"alignment {step.alignment:.3f}  z {gates}  {step.tokens / step.seconds:.0f} tokens/s"
                )

        with joined_world("cpu") as world:
            distill(self.out / TEACHER, self.out / STUDENT, self.student, world, resume=True, report=report)
        shutil.rmtree(self.out / f"{STUDENT}.train")

    def measure(self) -> None:
        """Accuracy of the files on test problems of the steps that were trained and on held-out sums."""
        tasks: dict[str, Any] = {}
        sums: dict[str, Any] = {}
        problems = test_problems(ALL_TASKS, 0, self.count, max_steps=self.teacher.mixture.max_steps)
        asked = held_out_problems(seed=0, count=min(SUMS, self.count))
        runs = [(TEACHER, loops) for loops in range(1, self.teacher.loops + 1)] + [(STUDENT, self.teacher.loops)]
        for name, loops in runs:
            run = f"{name} T={loops}"
            # a MELT one token at a time, as it generates; an Ouro's result does not depend on it
            options: dict[str, Any] = {"loops": loops, "chunk": 1 if name == STUDENT else None}
            with FileSolver(self.out / f"{name}.gguf", threads=self.teacher.threads, **options) as solver:
                scores = evaluate(solver, problems)
            self.console.print(f"{run}, tasks: {total(scores)}")
            tasks[run] = as_dict(scores, tasks=True)
            with FileSolver(
                self.out / f"{name}.gguf", threads=self.teacher.threads, max_tokens=64, **options
            ) as solver:
                by_kind = sums_score(solver, asked)
            self.console.print(f"{run}, sums: {by_kind['all']}")
            sums[run] = {kind: found.to_dict() for kind, found in by_kind.items()}
        about = {"seconds": self.seconds, "torch": torch.__version__}
        write_text(self.out / "measured.json", json.dumps({**about, "tasks": tasks, "sums": sums}, indent=1) + "\n")
        write_text(self.out / "tables.md", f"{task_tables(tasks)}\n{sums_table(sums)}")


def halved(steps: int) -> dict[str, int]:
    """A student's settings for so many steps, half of them in each phase."""
    return {"transition_steps": steps // 2, "alignment_steps": steps - steps // 2}


def sums_score(solver: FileSolver, problems: Sequence[Problem]) -> dict[str, Score]:
    """The score of each kind of sums, "all" last."""
    by_kind = dict.fromkeys([*dict.fromkeys(problem.kind for problem in problems), "all"], Score())
    for index, text in solver.answers([problem.question for problem in problems]):
        one = Score(int(is_correct(problems[index], text)), 1)
        by_kind[problems[index].kind] += one
        by_kind["all"] += one
    return by_kind


def main() -> None:
    """The command line; the defaults are those that made the shipped models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for checkpoints, GGUF files and numbers")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="first stage (default: %(default)s)")
    parser.add_argument("--more-steps", type=int, default=Settings.more_steps, help="second (default: %(default)s)")
    parser.add_argument("--student-steps", type=int, help="both phases together (default: the preset's)")
    parser.add_argument("--batch-tokens", type=int, default=Settings.batch_tokens)
    parser.add_argument("--problems", type=int, default=TASK_PROBLEMS, help="test problems (default: %(default)s)")
    arguments = parser.parse_args()
    teacher = replace(
        Settings(), steps=arguments.steps, more_steps=arguments.more_steps, batch_tokens=arguments.batch_tokens
    )
    changes = {} if arguments.student_steps is None else halved(arguments.student_steps)
    torch.set_num_threads(teacher.threads)
    Maker(arguments.out, teacher, changes, arguments.problems).run()


if __name__ == "__main__":
    main()
