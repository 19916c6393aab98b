"""Questions about a task's problem, with what each loop is to say: one reading teaches many answers.

A table of pointers has many walks and a chain of assignments many variables; each question is a problem
of its own, and only those of the training split are asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from melt_edge.tasks import TASKS, Problem


@dataclass(frozen=True)
class Asked:
    """A question, its answer, and the stations on the way there.

    stations: a character for each step, the answer is the last: what a loop finds that takes one step.
    """

    question: str
    answer: str
    stations: str


def questions(rng: Random, problem: Problem, max_steps: int) -> Iterator[Asked]:
    """The problem's own question in full, then short ones about the same text, each asked once.

    A repeated question could be answered by looking back. A nested problem has nothing more to ask, so
    others follow it, without an end.
    """
    if problem.task == "nested":
        yield Asked(problem.question, problem.answer, problem.answer)
        while True:
            other = TASKS[problem.task].problem(rng, rng.randint(1, max_steps))
            if other.split == "training":
                yield Asked(other.question, other.answer, other.answer)
    *parts, own = problem.question.split(";")
    stations = (_walks if problem.task == "pointers" else _variables)(parts, max_steps)
    yield Asked(problem.question, problem.answer, stations[own])
    order = rng.sample(list(stations), len(stations))
    if problem.task == "chain":
        # the deepest first: its answer does not give away the others
        order.sort(key=lambda asked: len(stations[asked]), reverse=rng.random() < 0.6)
    for asked in order:
        key = ";".join([*sorted(parts), asked])  # as the task's own
        if asked != own and Problem(problem.task, 1, asked, "", key).split == "training":
            yield Asked(asked, stations[asked][-1], stations[asked])


def _walks(entries: list[str], max_steps: int) -> dict[str, str]:
    """Question -> the letters on the way."""
    table = dict(entry.split(">") for entry in entries)
    stations = {}
    for start in table:
        way, end = "", start
        for steps in range(1, 1 + min(max_steps, len(table) // 2)):
            end = table[end]
            way += end
            stations[f"{start}>{steps}="] = way
    return stations


def _variables(statements: list[str], max_steps: int) -> dict[str, str]:
    """Question -> the variables on the way, then the value."""
    right_sides = dict(statement.split("=") for statement in statements)
    stations = {}
    for name in right_sides:
        value, way = _value(name, right_sides)
        stations[f"{name}%10="] = way + str(value % 10)
    return stations


def _value(name: str, right_sides: dict[str, str]) -> tuple[int, str]:
    """What a variable is worth, and the variables it comes from. It is a digit, or a digit and a variable."""
    text = right_sides[name]
    if len(text) == 1:
        return int(text), ""
    left, sign, right = text
    other = right if left.isdigit() else left
    value, way = _value(other, right_sides)
    a, b = (int(left), value) if left.isdigit() else (value, int(right))
    return (a + b if sign == "+" else a - b), other + way


def bracket_values(expression: str) -> list[tuple[int, str, int]]:
    """(index behind a closing bracket, value modulo 10, steps to get it) of an expression of one-digit numbers."""
    found: list[tuple[int, str, int]] = []
    stack: list[tuple[int, int] | str] = []
    for at, sign in enumerate(expression):
        if sign.isdigit():
            stack.append((int(sign), 0))
        elif sign == ")":
            (b, steps_b), operator, (a, steps_a) = stack.pop(), stack.pop(), stack.pop()  # type: ignore[misc]
            stack.pop()
            value = {"+": a + b, "-": a - b, "*": a * b}[operator] % 10  # type: ignore[operator, index]
            steps = 1 + max(steps_a, steps_b)  # type: ignore[type-var]
            stack.append((value, steps))
            found.append((at + 1, str(value), steps))
        elif sign in "(+-*":
            stack.append(sign)
        else:
            break  # the rest is %10=
    return found
