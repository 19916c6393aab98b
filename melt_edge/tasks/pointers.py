"""Following pointers through a shuffled table: ``c>a;a>f;f>c;a>2=`` asks what is 2 steps from a: c.

The letters form one ring, so every letter points to one and is pointed to by one, and nothing but the
walk tells the answer. The ring is at least twice as long as the walk: going backwards is no short cut.
"""

from __future__ import annotations

from itertools import pairwise
from random import Random

from melt_edge.tasks.problem import Problem

NAME = "pointers"
LETTERS = "abcdefghijklmnop"
MIN_RING = 10


def draw(rng: Random, steps: int) -> Problem:
    """A ring of 10 letters, two for each step beyond the fifth, and a walk of ``steps`` from one of them."""
    ring = rng.sample(LETTERS, max(MIN_RING, 2 * steps))
    entries = [f"{letter}>{following}" for letter, following in pairwise([*ring, ring[0]])]
    rng.shuffle(entries)
    asked = f"{ring[0]}>{steps}="
    key = ";".join([*sorted(entries), asked])  # another order of the same table is the same problem
    return Problem(NAME, steps, ";".join([*entries, asked]), ring[steps], key)
