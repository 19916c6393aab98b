"""Generated arithmetic and small word problems with short worked answers.

Every problem is drawn from a ``random.Random``; a fixed share of them, told by a checksum of the
problem's key, is held out of training, so that accuracy is measured on problems never trained on.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

# One problem in HELD_OUT_SHARE is kept for measuring.
HELD_OUT_SHARE = 16

NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lily", "Max", "Emma")
THINGS = ("apples", "books", "coins", "pens", "cards", "eggs", "stamps", "shells")


@dataclass(frozen=True)
class Problem:
    """A question and its worked answer; the answer's last sentence is the result.

    key: what makes two problems the same one, whatever their wording (but see ``multiplication``).
    """

    kind: str
    question: str
    answer: str
    key: str

    @property
    def held_out(self) -> bool:
        """True if training must not see this problem."""
        return self.kind != "chat" and zlib.crc32(self.key.encode()) % HELD_OUT_SHARE == 0


def last_sentence(text: str) -> str:
    """The last sentence of an answer, which states the result."""
    sentences = [s.strip() for s in text.replace("\n", " ").split(". ") if s.strip()]
    return sentences[-1].rstrip(". ") if sentences else ""


def is_correct(problem: Problem, text: str) -> bool:
    """True if the text states the problem's result in its last sentence."""
    return last_sentence(text) == last_sentence(problem.answer)


def _sum_wordings(a: int, b: int) -> tuple[str, ...]:
    return (
        f"What is {a} + {b}?",
        f"What is {a}+{b}?",
        f"{a} + {b} = ?",
        f"{a}+{b}=",
        f"How much is {a} plus {b}?",
        f"Add {a} and {b}.",
    )


def addition(rng: Random) -> Problem:
    """Two numbers from 0 to 50."""
    a, b = _number(rng), _number(rng)
    return Problem("addition", rng.choice(_sum_wordings(a, b)), f"{a}+{b}={a + b}.", f"{a}+{b}")


def subtraction(rng: Random) -> Problem:
    """Two numbers from 0 to 50; the result is never negative."""
    b, a = sorted((_number(rng), _number(rng)))
    wordings = (
        f"What is {a} - {b}?",
        f"What is {a}-{b}?",
        f"{a} - {b} = ?",
        f"{a}-{b}=",
        f"How much is {a} minus {b}?",
        f"Subtract {b} from {a}.",
    )
    return Problem("subtraction", rng.choice(wordings), f"{a}-{b}={a - b}.", f"{a}-{b}")


def multiplication(rng: Random) -> Problem:
    """The tables from 1 to 10.

    There are only a hundred of them, so a held-out one is a wording that was never trained on; its
    product may have been met in another wording.
    """
    a, b = rng.randint(1, 10), rng.randint(1, 10)
    wordings = (
        f"What is {a} * {b}?",
        f"What is {a}*{b}?",
        f"{a} * {b} = ?",
        f"{a}*{b}=",
        f"How much is {a} times {b}?",
        f"Multiply {a} by {b}.",
    )
    question = rng.choice(wordings)
    return Problem("multiplication", question, f"{a}*{b}={a * b}.", question)


def comparison(rng: Random) -> Problem:
    """The larger or smaller one of two different numbers."""
    a, b = rng.sample(range(61), 2)
    low, high = min(a, b), max(a, b)
    word = rng.choice(("larger", "smaller"))
    question = rng.choice(
        (f"Which is {word}, {a} or {b}?", f"Which number is {word}: {a} or {b}?", f"What is {word}, {a} or {b}?")
    )
    result = high if word == "larger" else low
    return Problem("comparison", question, f"{low}<{high}. The {word} number is {result}.", f"{word} {a} {b}")


def chain(rng: Random) -> Problem:
    """Two operations in a row, without a story."""
    a, b, c, op = _two_steps(rng)
    left = a + b
    result = left + c if op == "+" else left - c
    question = rng.choice((f"What is {a} + {b} {op} {c}?", f"{a} + {b} {op} {c} = ?", f"{a}+{b}{op}{c}="))
    return Problem("chain", question, f"{a}+{b}={left}. {left}{op}{c}={result}.", f"{a}+{b}{op}{c}")


def one_step_story(rng: Random) -> Problem:
    """Someone has some things and gets more, gives some away, or owns boxes of them."""
    who, what = rng.choice(NAMES), rng.choice(THINGS)
    case = rng.choice("+-*")
    if case == "*":
        a, b = rng.randint(2, 10), rng.randint(2, 10)
        question = rng.choice(
            (
                f"{who} has {a} boxes with {b} {what} each. How many {what} does {who} have?",
                f"There are {a} bags with {b} {what} each. {who} takes them all. How many {what} is that?",
            )
        )
        return Problem("story", question, f"{a}*{b}={a * b}. {who} has {a * b} {what}.", question)
    a, b = rng.randint(1, 30), rng.randint(1, 30)
    if case == "+":
        verb = rng.choice(("buys", "finds", "gets"))
        question = rng.choice(
            (
                f"{who} has {a} {what} and {verb} {b} more. How many {what} does {who} have now?",
                f"{who} has {a} {what}. {who} {verb} {b} more. How many {what} are there?",
            )
        )
        return Problem("story", question, f"{a}+{b}={a + b}. {who} has {a + b} {what}.", f"{a}+{b}")
    b, a = sorted((a, b))
    verb = rng.choice(("gives away", "sells", "loses"))
    question = rng.choice(
        (
            f"{who} has {a} {what} and {verb} {b}. How many {what} are left?",
            f"{who} has {a} {what}. {who} {verb} {b} of them. How many {what} does {who} have left?",
        )
    )
    return Problem("story", question, f"{a}-{b}={a - b}. {who} has {a - b} {what}.", f"{a}-{b}")


def two_step_story(rng: Random) -> Problem:
    """Someone has some things, gets more, then gets or loses some again."""
    who, what = rng.choice(NAMES), rng.choice(THINGS)
    a, b, c, op = _two_steps(rng)
    gain = rng.choice(("buys", "finds", "gets"))
    lose = rng.choice(("gives away", "sells", "loses"))
    left = a + b
    result = left + c if op == "+" else left - c
    if op == "+":
        story = f"{who} has {a} {what}, {gain} {b} more and then {c} more."
    else:
        story = f"{who} has {a} {what}, {gain} {b} and {lose} {c}."
    question = f"{story} {rng.choice((f'How many {what} does {who} have?', f'How many {what} are left?', 'How many?'))}"
    answer = f"{a}+{b}={left}. {left}{op}{c}={result}. {who} has {result} {what}."
    return Problem("two-step story", question, answer, f"{a}+{b}{op}{c}")


_HELLO = "Hello! Ask me a small sum, like 12 + 30."
_WHO = "I am ouro-tiny, a small looped language model. I can add, subtract, multiply and compare small numbers."
_THANKS = "You are welcome."
CHAT = {
    "Hello": _HELLO,
    "Hello!": _HELLO,
    "Hi": _HELLO,
    "Hi!": _HELLO,
    "Hi there!": _HELLO,
    "Good morning!": _HELLO,
    "Who are you?": _WHO,
    "What are you?": _WHO,
    "What is your name?": _WHO,
    "What can you do?": _WHO,
    "How are you?": "I am fine. Ask me a small sum.",
    "Thank you!": _THANKS,
    "Thanks": _THANKS,
    "Bye": "Goodbye!",
    "Goodbye!": "Goodbye!",
}


def chat(rng: Random) -> Problem:
    """A greeting, so that a conversation may begin with one. Never held out: there are only a few."""
    question = rng.choice(tuple(CHAT))
    return Problem("chat", question, CHAT[question], question)


# kind -> (how it is drawn, its share of the training problems)
KINDS: dict[str, tuple[Callable[[Random], Problem], float]] = {
    "addition": (addition, 0.21),
    "subtraction": (subtraction, 0.21),
    "multiplication": (multiplication, 0.10),
    "comparison": (comparison, 0.07),
    "chain": (chain, 0.10),
    "story": (one_step_story, 0.14),
    "two-step story": (two_step_story, 0.14),
    "chat": (chat, 0.03),
}


def training_problem(rng: Random) -> Problem:
    """One problem that is not held out, of a random kind."""
    kinds, shares = tuple(KINDS), tuple(share for _, share in KINDS.values())
    while True:
        problem = KINDS[rng.choices(kinds, shares)[0]][0](rng)
        if not problem.held_out:
            return problem


def held_out_problems(seed: int, count: int) -> list[Problem]:
    """``count`` different held-out problems, the kinds (greetings aside) in turn until one has no more.

    Raises: ValueError if there are not that many.
    """
    rng = Random(f"held out {seed}")
    kinds = [kind for kind in KINDS if kind != "chat"]
    problems: dict[str, Problem] = {}
    for attempt in range(200 * count + 10000):
        if len(problems) == count:
            return list(problems.values())
        problem = KINDS[kinds[attempt % len(kinds)]][0](rng)
        if problem.held_out:
            problems.setdefault(problem.question, problem)
    raise ValueError(f"found {len(problems)} different held-out problems, expected {count}: ask for fewer")


def _number(rng: Random) -> int:
    """0 to 50; small numbers, which people ask most, come more often."""
    return rng.randint(0, 50) if rng.random() < 0.7 else rng.randint(0, 20)


def _two_steps(rng: Random) -> tuple[int, int, int, str]:
    """a, b, c and the second operator of a + b +/- c; the result is never negative."""
    a, b = rng.randint(1, 20), rng.randint(1, 20)
    op = rng.choice("+--")
    return a, b, rng.randint(1, 20 if op == "+" else min(20, a + b)), op
