"""Nested arithmetic modulo 10: ``(9-((3+4)*7))%10=`` is 0.

A bracket is opened on either side of its digit, so the steps lie on both sides of the innermost sum
and have to be taken from the inside out.
"""

from __future__ import annotations

from random import Random

from melt_edge.tasks.problem import Problem

NAME = "nested"
# One to one modulo 10, so that no product forgets what came before it.
FACTORS = (3, 7, 9)


def draw(rng: Random, steps: int) -> Problem:
    """An expression of ``steps`` operations, each inside the next one's bracket.

    The first digit is uniform and every operation is one to one modulo 10, so all ten answers are equally
    likely. Problems of one step are the table of the operations, a few hundred, and never held out.
    """
    value = rng.randrange(10)
    text = key = str(value)
    for _ in range(steps):
        operator = rng.choice("+-*")
        digit = rng.choice(FACTORS) if operator == "*" else rng.randint(1, 9)
        digit_first = rng.random() < 0.5
        text = f"({operator.join(_pair(text, digit, digit_first))})"
        operands = _pair(key, digit, digit_first)
        if operator != "-":
            operands.sort()  # 3+4 and 4+3 are the same problem
        key = f"({operator.join(operands)})"
        value = _result(operator, value, digit, digit_first)
    return Problem(NAME, steps, f"{text}%10=", str(value), key, elementary=steps == 1)


def _pair(inner: str, digit: int, digit_first: bool) -> list[str]:
    return [str(digit), inner] if digit_first else [inner, str(digit)]


def _result(operator: str, value: int, digit: int, digit_first: bool) -> int:
    if operator == "+":
        return (value + digit) % 10
    if operator == "*":
        return value * digit % 10
    return (digit - value if digit_first else value - digit) % 10
