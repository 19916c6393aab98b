"""What a task and a problem are, which split a problem belongs to, and when an answer is right."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from melt_edge.errors import ConfigError

SPLITS = ("test", "validation", "training")
# Of 16 classes of checksums, two are test problems and one is for validation.
_CLASSES = 16
_SPLIT_OF_CLASS = {0: "test", 1: "test", 2: "validation"}
# A number or a word; "-4" and "0.4" are not the answer "4".
_WORD = re.compile(r"(?<!\w)-?\w+(?:\.\d+)?")


@dataclass(frozen=True)
class Problem:
    """A question whose answer needs ``steps`` steps, each of which needs the one before.

    answer: the exact text, one character, the same for every right way to get it. key: what makes two
    problems the same one, however they are written; it alone decides the split. elementary: one of so few
    that every one is trained on, as a table is learned; to hold some out would ask for guesses.
    """

    task: str
    steps: int
    question: str
    answer: str
    key: str
    elementary: bool = False

    @property
    def split(self) -> str:
        """One of ``SPLITS``: the same on every machine, for every seed."""
        if self.elementary:
            return "training"
        checksum = zlib.crc32(f"{self.task} {self.key}".encode())
        return _SPLIT_OF_CLASS.get(checksum % _CLASSES, "training")


@dataclass(frozen=True)
class Task:
    """A kind of problem.

    chance: the largest share of right answers, 0..1, of a guess that uses the format alone.
    draw: makes a problem of that many steps, of any split.
    """

    name: str
    summary: str
    max_steps: int
    chance: float
    draw: Callable[[Random, int], Problem]

    def problem(self, rng: Random, steps: int) -> Problem:
        """A random problem of exactly that many steps, of any split. Raises: ConfigError for other steps."""
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= self.max_steps:
            raise ConfigError(f"steps is {steps!r}, task {self.name} has 1 to {self.max_steps}")
        return self.draw(rng, steps)


def is_correct(problem: Problem, text: str) -> bool:
    """True if the last word of the text is the answer: "7", "7." and "a=3+4=7" all answer "7"."""
    words: list[str] = _WORD.findall(text)
    return bool(words) and words[-1] == problem.answer
