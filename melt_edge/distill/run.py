"""A whole distillation: from a teacher's folder to a student's, to be stopped and continued at any step."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from melt_edge.distill.data import Batches
from melt_edge.distill.distributed import World, collect_weights
from melt_edge.distill.log import StepLog
from melt_edge.distill.models import make_student, make_teacher, open_teacher, save_student
from melt_edge.distill.settings import Settings
from melt_edge.distill.state import check_settings, has_state, load_state, remove_leftovers
from melt_edge.distill.text import Encoder
from melt_edge.distill.trainer import Report, Trainer
from melt_edge.errors import ConfigError


@dataclass(frozen=True)
class Result:
    """What a distillation did: the student's folder, the run's folder, the first step done now, all steps."""

    output: Path
    folder: Path
    first_step: int
    steps: int


def _silent(report: Report) -> None:
    """Tell nobody."""


def distill(
    teacher_path: Path,
    output: Path,
    settings: Settings,
    world: World,
    *,
    resume: bool = False,
    force: bool = False,
    report: Callable[[Report], None] = _silent,
) -> Result:
    """Train a student and write its checkpoint folder; the run's own state and log lie in OUTPUT.train.

    resume: continue the run found there, or begin if there is none. force: overwrite both.
    Raises: ConfigError, FormatError, SpecError for a wrong teacher, setting or file; TrainingError for a
    loss that is no finite number.
    """
    folder = output.with_name(f"{output.name}.train")
    checkpoint = open_teacher(teacher_path)
    encoder = Encoder(checkpoint, prompt_loss=settings.prompt_loss)
    batches = Batches(settings, encoder)
    _check_folders(output, folder, resume=resume, force=force)
    world.wait()  # before the first process makes the folder that the others look for
    trainer = Trainer(
        make_teacher(checkpoint),
        make_student(checkpoint, settings),
        batches,
        settings,
        world,
        teacher_id=checkpoint.sha256(),
    )
    if world.is_main:
        if force and not resume:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        remove_leftovers(folder)
    world.wait()
    state = load_state(folder)
    if state is not None:
        check_settings(state, settings.to_dict(), trainer.teacher_id, source=str(folder))
        trainer.restore(state)
    first_step = trainer.step
    log = StepLog(folder / "log.jsonl", first_step=first_step) if world.is_main else None

    def told(step: Report) -> None:
        if log is not None:
            log.write(step.to_dict())
            report(step)

    trainer.run(folder, told)
    weights = collect_weights(trainer.student, world)
    if world.is_main:
        save_student(output, trainer.student, weights, checkpoint, force=force or resume)
    world.wait()
    return Result(output, folder, first_step, settings.total_steps)


def _check_folders(output: Path, folder: Path, *, resume: bool, force: bool) -> None:
    """Refuse before the training what would be refused after it."""
    if not output.parent.is_dir():
        raise ConfigError(f"{output}: its folder does not exist; create {output.parent} first")
    if output.is_file():
        raise ConfigError(f"{output}: is a file, expected the name of a folder; choose another path")
    if force:
        return
    if output.exists() and not (resume and has_state(folder)):
        raise ConfigError(f"{output}: exists already; choose another path or overwrite it with --force")
    if not resume and folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder}: holds a run already; continue it with --resume or overwrite it with --force")
