"""The paper's claims about MELT, measured on models small enough for a CPU: one command, a table, a plot.

    python examples/reproduce/reproduce.py OUT_FOLDER

Trains a teacher for every seed, distils a student of it for every row, and counts right answers on test problems,
decoding one token at a time. Stop it at any time; the same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE.parent / "train_tiny"), str(ROOT / "benchmarks")]

from experiments import EXPERIMENTS, MAX_STEPS, NUM_LOOPS, TASK, Experiment, student_settings  # noqa: E402
from make_models import halved  # noqa: E402
from report import write_report  # noqa: E402
from rows import Mixture, write_messages  # noqa: E402
from scoring import view  # noqa: E402
from train import Settings as TeacherSettings  # noqa: E402
from train import save_teacher, train  # noqa: E402

from melt_edge.checkpoint import Checkpoint  # noqa: E402
from melt_edge.distill.distributed import joined_world  # noqa: E402
from melt_edge.distill.models import load_student  # noqa: E402
from melt_edge.distill.run import distill  # noqa: E402
from melt_edge.distill.settings import Settings, preset  # noqa: E402
from melt_edge.files import write_text  # noqa: E402
from melt_edge.modeling import LoopLM  # noqa: E402
from melt_edge.tasks import test_problems  # noqa: E402
from melt_edge.tasks.evaluate import as_dict, evaluate, total  # noqa: E402
from melt_edge.tasks.solvers import ReferenceSolver, checkpoint_text  # noqa: E402
from provenance import provenance  # noqa: E402

MIXTURE = Mixture(sums_share=0.0, tasks=(TASK,), max_steps=MAX_STEPS)
# A plain Ouro: nothing of its training knows of a shared row, other than the shipped one's.
TEACHER = TeacherSettings(steps=1000, more_steps=0, mixture=MIXTURE, shared_kv_share=0.0)
# A student reads problems as a test asks them, one by one: a step of chunk size 1 takes as long as they are long.
QUESTIONS = replace(MIXTURE, max_turns=1)
# Of every student, besides the preset "tiny"; a run is kept whole or not at all.
STUDENT: dict[str, Any] = {
    "chunk_size": [1, 2, 4],
    "model_chunk_size": 4,
    "transition_steps": 120,
    "alignment_steps": 120,
    "save_every": 100_000,
}
TEST_SEED = 0


class Reproduction:
    """All runs, each done once: what is in ``runs.jsonl`` is not done again."""

    def __init__(self, out: Path, arguments: argparse.Namespace, console: Console) -> None:
        self.out, self.console = out, console
        steps = {} if arguments.student_steps is None else halved(arguments.student_steps)
        self.student = preset("tiny").changed({**STUDENT, **steps}, source="the students")
        self.problems = test_problems(TASK, TEST_SEED, arguments.n, max_steps=MAX_STEPS)
        self.seeds, self.ablation_seeds = arguments.seeds, arguments.ablation_seeds
        self.teacher = replace(TEACHER, steps=arguments.teacher_steps)
        self.only = arguments.only
        self.log = out / "runs.jsonl"
        out.mkdir(parents=True, exist_ok=True)
        self.keep_settings()
        self.runs = [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def settings(self) -> dict[str, Any]:
        """What all runs of a table have in common."""
        return {
            "task": TASK,
            "max_steps": MAX_STEPS,
            "problems": len(self.problems),
            "teacher": asdict(self.teacher),
            "student": self.student.to_dict(),
            "questions": asdict(QUESTIONS),
        }

    def keep_settings(self) -> None:
        """Write the settings beside the runs. Raises: SystemExit if the runs that are there were made by others."""
        path = self.out / "settings.json"
        wanted = json.loads(json.dumps(self.settings()))
        if path.exists() and json.loads(path.read_text(encoding="utf-8")) != wanted:
            raise SystemExit(f"error: {self.out} holds runs with other settings (settings.json); name another folder")
        write_text(path, json.dumps(wanted, indent=1) + "\n")

    def run(self) -> None:
        """Every run that is missing, seed by seed."""
        for seed in self.seeds:
            teacher = self.teacher_of(seed)
            data = self.out / f"data-{seed}.jsonl"
            if not data.exists():
                write_messages(data, seed, self.student.total_steps * self.student.batch_size, QUESTIONS)
            for experiment in EXPERIMENTS:
                wanted = experiment.main or seed in self.ablation_seeds
                if wanted and (not self.only or experiment.key in self.only) and not self.has(experiment.key, seed):
                    self.measure(experiment, seed, teacher)

    def teacher_of(self, seed: int) -> Path:
        """The teacher's checkpoint; trained if it is not there."""
        path = self.out / f"teacher-{seed}"
        if not path.exists():
            self.console.rule(f"teacher, seed {seed}")
            began = time.monotonic()
            model, tokenizer = train(replace(self.teacher, seed=seed), self.console)
            save_teacher(path, model, tokenizer)
            self.add({"row": "training the teacher", "seed": seed, "seconds": time.monotonic() - began})
        return path

    def has(self, key: str, seed: int) -> bool:
        """True if the run was done."""
        return any((run["row"], run["seed"]) == (key, seed) for run in self.runs)

    def measure(self, experiment: Experiment, seed: int, teacher: Path) -> None:
        """One run: train where the row asks for it, then count right answers."""
        began = time.monotonic()
        if experiment.changes is None:
            model: LoopLM = load_student(teacher)
            config = model.config.with_loops(experiment.loops or NUM_LOOPS)
            model = view(model, config.share_kv() if experiment.shared else config)
        else:
            self.console.rule(f"{experiment.name}, seed {seed}")
            model = self.distilled(experiment, seed, teacher)
        with Checkpoint.open(teacher) as checkpoint:
            tokenizer, frame, end_tokens = checkpoint_text(checkpoint)
        solver = ReferenceSolver(model, tokenizer, frame=frame, end_tokens=end_tokens, chunk=1, max_tokens=4)
        scores = evaluate(solver, self.problems)
        run = {"row": experiment.key, "seed": seed, **as_dict(scores, tasks=False)}
        self.add({**run, "seconds": time.monotonic() - began})
        self.console.print(f"{experiment.name}, seed {seed}: {total(scores)}")

    def distilled(self, experiment: Experiment, seed: int, teacher: Path) -> LoopLM:
        """The student of a row."""
        settings: Settings = student_settings(self.student, experiment.changes or {}, seed)
        settings = settings.changed({"data": [str(self.out / f"data-{seed}.jsonl")]}, source="the data")
        path = self.out / f"{experiment.key}-{seed}"
        every = max(1, settings.total_steps // 5)

        def report(step: Any) -> None:
            if step.step % every == 0 or step.step + 1 == settings.total_steps:
                self.console.print(
                    f"step {step.step:4d}  alpha {step.alpha:.2f}  divergence {step.kd:.4f}  "
                    f"alignment {step.alignment:.3f}  {step.tokens / step.seconds:.0f} tokens/s"
                )

        with joined_world("cpu") as world:
            distill(teacher, path, settings, world, resume=True, report=report)
        return load_student(path)

    def add(self, run: dict[str, Any]) -> None:
        """Keep a run's numbers."""
        self.runs.append(run)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")

    def about(self) -> dict[str, Any]:
        """What the numbers belong to."""
        return {
            **provenance(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "seconds": round(sum(run["seconds"] for run in self.runs)),
            **self.settings(),
        }


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for models, numbers, table and plot")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3], help="of the main rows (default: 1 2 3)")
    parser.add_argument("--ablation-seeds", type=int, nargs="*", default=[1], help="of the other rows (default: 1)")
    parser.add_argument("--only", nargs="*", metavar="ROW", help="these rows: " + ", ".join(e.key for e in EXPERIMENTS))
    parser.add_argument("-n", type=int, default=1000, help="test problems (default: 1000)")
    parser.add_argument("--teacher-steps", type=int, default=TEACHER.steps, help="default: %(default)s")
    parser.add_argument("--student-steps", type=int, help="both phases together (default: 240)")
    return parser.parse_args()


def main() -> None:
    """Run what is missing, then write table and plot of everything there is."""
    arguments = parse_arguments()
    torch.set_num_threads(1)  # models this small: a second thread waits longer than it helps
    work = Reproduction(arguments.out, arguments, Console())
    work.run()
    write_report(arguments.out, work.runs, work.about())
    work.console.print((arguments.out / "results.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
