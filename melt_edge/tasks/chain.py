"""Chains of variable assignments in shuffled order: ``c=b+4;h=6;a=9-c;e=c-1;b=3;a%10=`` is 2.

The shuffled order hides from one reading, left to right, what a variable is worth when it is used.
A digit minus a variable turns every sign before it, so that the order of the steps counts: adding up
the numbers of the chain does not answer. Two assignments (here h and e) belong to no step.
"""

from __future__ import annotations

from itertools import pairwise
from random import Random

from melt_edge.tasks.problem import Problem

NAME = "chain"
LETTERS = "abcdefghijklmnop"
DISTRACTORS = 2


def draw(rng: Random, steps: int) -> Problem:
    """A variable that depends on ``steps`` assignments, one after the other; the first is a digit.

    The first digit is uniform and every step is one to one modulo 10, so all ten answers are equally likely.
    """
    names = rng.sample(LETTERS, steps + DISTRACTORS)
    value = rng.randrange(10)
    statements = [f"{names[0]}={value}"]
    for before, name in pairwise(names[:steps]):
        right_side, value = _step(rng, before, value)
        statements.append(f"{name}={right_side}")
    for at in range(steps, len(names)):
        statements.append(f"{names[at]}={_distractor(rng, names[:at])}")
    rng.shuffle(statements)
    asked = f"{names[steps - 1]}%10="
    key = ";".join([*sorted(statements), asked])  # another order of the same assignments is the same problem
    return Problem(NAME, steps, ";".join([*statements, asked]), str(value), key)


def _step(rng: Random, name: str, value: int) -> tuple[str, int]:
    """The right side of an assignment that uses a variable, and what it is worth modulo 10."""
    digit = rng.randint(1, 9)
    choices = (
        (f"{name}+{digit}", value + digit),
        (f"{name}-{digit}", value - digit),
        (f"{digit}-{name}", digit - value),
    )
    right_side, result = rng.choice(choices)
    return right_side, result % 10


def _distractor(rng: Random, names: list[str]) -> str:
    """The right side of an assignment that is not asked for: a digit, or a step from any variable so far."""
    if rng.random() < 0.25:
        return str(rng.randrange(10))
    return _step(rng, rng.choice(names), 0)[0]
