"""Text problems whose answers need several dependent steps, answered with one character.

A looped model has to do the steps inside, so these tell what its loops are worth. Everything is drawn
from a ``random.Random``; a checksum of the problem decides whether it is for training, validation or
the test, so that no seed can mix them. Importing this loads neither torch nor llama.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from melt_edge.errors import ConfigError
from melt_edge.tasks import chain, nested, pointers
from melt_edge.tasks.problem import SPLITS, Problem, Task, is_correct

__all__ = ["ALL_TASKS", "SPLITS", "TASKS", "Problem", "Task", "is_correct", "test_problems", "training_problem"]

MAX_STEPS = 8
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(chain.NAME, "assignments to variables, in shuffled order", MAX_STEPS, 1 / 10, chain.draw),
        Task(nested.NAME, "nested arithmetic modulo 10", MAX_STEPS, 1 / 10, nested.draw),
        Task(pointers.NAME, "pointers followed through a table", MAX_STEPS, 1 / 9, pointers.draw),
    )
}
# The name that stands for every task.
ALL_TASKS = "all"
# Held-out problems are one in eight or fewer; after so many draws without a new one there are no more.
_MAX_DRAWS = 500


def training_problem(rng: Random, names: Sequence[str] | None = None, max_steps: int | None = None) -> Problem:
    """A random problem that no test or validation set holds.

    names: tasks to choose from, default all. max_steps: at most so many, each number equally likely.
    Raises: ConfigError for an unknown task or a number of steps that it does not have.
    """
    task = _task(rng.choice(list(TASKS) if names is None else list(names) or ["nothing"]))
    limit = task.max_steps if max_steps is None else max_steps
    if not 1 <= limit <= task.max_steps:
        raise ConfigError(f"max_steps is {limit}, task {task.name} has 1 to {task.max_steps}")
    steps = rng.randint(1, limit)
    while True:
        problem = task.problem(rng, steps)
        if problem.split == "training":
            return problem


def test_problems(
    name: str,
    seed: int,
    count: int,
    split: str = "test",  # noqa: PT028 no test
    max_steps: int = MAX_STEPS,  # noqa: PT028
) -> list[Problem]:
    """``count`` different held-out problems of a task, or of "all": every number of steps up to ``max_steps`` in turn.

    A number of steps that has no more problems (nested has none of one step) leaves its turn to the
    others. The first problems of a longer list are those of a shorter one.
    Raises: ConfigError for an unknown task or split, a count below 1, or steps that no task has.
    """
    tasks = list(TASKS.values()) if name == ALL_TASKS else [_task(name, also=[ALL_TASKS])]
    if split not in ("test", "validation"):
        raise ConfigError(f"split is {split!r}, expected test or validation")
    if count < 1:
        raise ConfigError(f"the number of problems is {count}, expected at least 1")
    if not 1 <= max_steps <= MAX_STEPS:
        raise ConfigError(f"max_steps is {max_steps}, expected 1 to {MAX_STEPS}")
    rng = Random(f"{split} {name} {seed}")
    turns = [(task, steps) for steps in range(1, max_steps + 1) for task in tasks if steps <= task.max_steps]
    problems: dict[str, Problem] = {}
    while turns:
        for turn in list(turns):
            problem = _new_problem(rng, *turn, split, problems)
            if problem is None:
                turns.remove(turn)
                continue
            problems[problem.question] = problem
            if len(problems) == count:
                return list(problems.values())
    raise ConfigError(f"task {name} has {len(problems)} different {split} problems, expected {count}: ask for fewer")


# pytest takes a function of this name for a test wherever it is imported.
test_problems.__test__ = False  # type: ignore[attr-defined]


def _new_problem(rng: Random, task: Task, steps: int, split: str, known: dict[str, Problem]) -> Problem | None:
    for _ in range(_MAX_DRAWS):
        problem = task.problem(rng, steps)
        if problem.split == split and problem.question not in known:
            return problem
    return None


def _task(name: str, also: Sequence[str] = ()) -> Task:
    if name not in TASKS:
        raise ConfigError(f"{name!r} is not a task, expected one of: {', '.join([*TASKS, *also])}")
    return TASKS[name]
