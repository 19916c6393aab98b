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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from problems import held_out_problems, is_correct, training_problem
from rich.console import Console
from tables import accuracy_table
from train import Settings, save_teacher, train

from melt_edge.distill.distributed import joined_world
from melt_edge.distill.run import distill
from melt_edge.distill.settings import preset
from melt_edge.distill.trainer import Report
from melt_edge.export.gguf import export_gguf
from melt_edge.files import atomic_output
from melt_edge.tasks.score import Score
from melt_edge.tasks.solvers import FileSolver

TEACHER, STUDENT = "ouro-tiny", "melt-tiny"
FILE_TYPES = {TEACHER: "f32", STUDENT: "f16"}
# Held-out problems to measure on.
PROBLEMS = 5000


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
                save_teacher(self.out / TEACHER, *train(self.teacher, self.console))
        if STUDENT not in self.seconds:
            with self.timed(STUDENT):
                self.write_data()
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
        _write(self.times_path, json.dumps(self.seconds) + "\n")

    def write_data(self) -> None:
        """The conversations that the student learns from, as JSON lines: as many as it reads."""
        rng = Random(f"distill {self.student.seed}")
        count = self.student.total_steps * self.student.batch_size
        rows = (json.dumps({"messages": conversation(rng)}) for _ in range(count))
        _write(self.out / "problems.jsonl", "\n".join(rows) + "\n")

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
        """Accuracy of the files on held-out sums: the Ouro with fewer loops too, the MELT one token at a time."""
        problems = held_out_problems(seed=0, count=self.count)
        measured: dict[str, Any] = {}
        runs = [(TEACHER, loops) for loops in range(1, self.teacher.loops + 1)] + [(STUDENT, self.teacher.loops)]
        for name, loops in runs:
            # an Ouro's result does not depend on the chunk
            chunk = 1 if name == STUDENT else None
            file = self.out / f"{name}.gguf"
            by_kind = dict.fromkeys([*dict.fromkeys(problem.kind for problem in problems), "all"], Score())
            with FileSolver(file, loops=loops, chunk=chunk, threads=self.teacher.threads, max_tokens=64) as solver:
                for index, text in solver.answers([problem.question for problem in problems]):
                    one = Score(int(is_correct(problems[index], text)), 1)
                    by_kind[problems[index].kind] += one
                    by_kind["all"] += one
            measured[f"{name} T={loops}"] = {kind: found.to_dict() for kind, found in by_kind.items()}
            self.console.print(f"{name}, T = {loops}: {by_kind['all']}")
        about = {"seconds": self.seconds, "torch": torch.__version__}
        _write(self.out / "measured.json", json.dumps({**about, "accuracy": measured}, indent=1) + "\n")
        _write(self.out / "tables.md", accuracy_table(measured))


def conversation(rng: Random) -> list[dict[str, str]]:
    """One or two questions with their answers, as a line of the student's data."""
    turns = [training_problem(rng) for _ in range(rng.randint(1, 2))]
    return [
        {"role": role, "content": text}
        for problem in turns
        for role, text in (("user", problem.question), ("assistant", problem.answer))
    ]


def _write(path: Path, text: str) -> None:
    with atomic_output(path, force=True) as part:
        part.write_text(text, encoding="utf-8")


def main() -> None:
    """The command line; the defaults are those that made the shipped models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for checkpoints, GGUF files and numbers")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="of the teacher (default: %(default)s)")
    parser.add_argument("--student-steps", type=int, help="both phases together (default: the preset's)")
    parser.add_argument("--batch-size", type=int, default=Settings.batch_size)
    parser.add_argument("--problems", type=int, default=PROBLEMS, help="held-out problems (default: %(default)s)")
    arguments = parser.parse_args()
    teacher = replace(Settings(), steps=arguments.steps, batch_size=arguments.batch_size)
    changes = {}
    if arguments.student_steps is not None:
        transition = arguments.student_steps // 2
        changes = {"transition_steps": transition, "alignment_steps": arguments.student_steps - transition}
    torch.set_num_threads(teacher.threads)
    Maker(arguments.out, teacher, changes, arguments.problems).run()


if __name__ == "__main__":
    main()
