"""How many problems a solver answers, by task and number of steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from melt_edge.tasks.problem import Problem, is_correct
from melt_edge.tasks.score import Score
from melt_edge.tasks.solvers import Solver

# (task, steps) -> score
Scores = dict[tuple[str, int], Score]


def evaluate(solver: Solver, problems: Sequence[Problem], progress: Callable[[Score], None] | None = None) -> Scores:
    """The score of every (task, steps) among the problems.

    progress: told the score so far after every answer. Raises: what the solver raises.
    """
    scores: Scores = {(problem.task, problem.steps): Score() for problem in problems}
    so_far = Score()
    for index, text in solver.answers([problem.question for problem in problems]):
        problem = problems[index]
        one = Score(int(is_correct(problem, text)), 1)
        scores[problem.task, problem.steps] += one
        so_far += one
        if progress is not None:
            progress(so_far)
    assert so_far.count == len(problems)
    return scores


def total(scores: Scores) -> Score:
    """All of them together."""
    return sum(scores.values(), Score())


def as_dict(scores: Scores, *, tasks: bool) -> dict[str, Any]:
    """JSON-ready: the total and by_difficulty, and by_task if ``tasks``."""
    found = {**total(scores).to_dict(), "by_difficulty": {str(n): s.to_dict() for n, s in by_steps(scores).items()}}
    if tasks:
        found["by_task"] = {name: score.to_dict() for name, score in by_task(scores).items()}
    return found


def by_steps(scores: Scores) -> dict[int, Score]:
    """Over all tasks, fewest steps first."""
    steps = sorted({steps for _, steps in scores})
    return {n: sum((score for (_, steps), score in scores.items() if steps == n), Score()) for n in steps}


def by_task(scores: Scores) -> dict[str, Score]:
    """Over all numbers of steps, in the tasks' order."""
    names = list(dict.fromkeys(name for name, _ in scores))
    return {name: sum((score for (task, _), score in scores.items() if task == name), Score()) for name in names}
