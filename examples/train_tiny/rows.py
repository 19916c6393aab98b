"""Training rows: sums as short conversations, tasks as conversations or as lists of questions with answers.

A one-character answer to a question of fifty tokens teaches little for what it costs. So most rows ask
many questions about one problem.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from random import Random

import torch
from bpe import PAD, prompt_text
from followups import Asked, bracket_values, questions
from problems import training_problem as training_sum
from tokenizers import Tokenizer
from torch import Tensor

from melt_edge.files import atomic_output
from melt_edge.tasks import MAX_STEPS, pointers
from melt_edge.tasks import training_problem as training_task

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
MAX_TURNS = 6
MAX_LIST = 16
# No further question once the ones so far have so many characters: a token is about one in a task.
ENOUGH = 110
# Batches whose rows are sorted by length together.
GROUP = 16

# What a loop says at a place: one character for each loop, the last for all further ones.
NOTHING = "\0"
# What the chat template writes before and after a question.
FRAME = tuple(prompt_text(NOTHING).split(NOTHING))


@dataclass(frozen=True)
class Part:
    """A piece of a row. answer: it is to be learned; stations: what each loop is to say behind it, if guided."""

    text: str
    answer: bool = False
    stations: str = ""


Parts = list[Part]


@dataclass(frozen=True)
class Mixture:
    """What the rows hold.

    sums_share: of the rows, which are shorter than others. walk_share: of the rest, walks in small tables.
    list_share: of a task's rows. tasks: all of them for None. max_turns: of a conversation about one problem.
    """

    sums_share: float = 0.35
    walk_share: float = 0.05
    list_share: float = 0.5
    tasks: tuple[str, ...] | None = None
    max_steps: int = MAX_STEPS
    max_turns: int = MAX_TURNS


def sums(rng: Random) -> list[tuple[str, str]]:
    """(prompt, answer) pairs of one conversation: mostly one question, sometimes two in a row."""
    turns = 2 if rng.random() < 0.2 else 1
    pairs = [(prompt_text(p.question), p.answer) for p in (training_sum(rng) for _ in range(turns))]
    if rng.random() < 0.05:
        pairs[0] = (SYSTEM + pairs[0][0], pairs[0][1])
    return pairs


def row(rng: Random, mixture: Mixture) -> Parts:
    """A random row."""
    if rng.random() < mixture.sums_share:
        return _conversation(sums(rng))
    if rng.random() < mixture.walk_share:
        return _walk(rng, mixture.max_steps)
    problem = training_task(rng, mixture.tasks, mixture.max_steps)
    asked = questions(rng, problem, mixture.max_steps)
    if rng.random() < mixture.list_share:
        return _list(_some(asked, rng.randint(4, MAX_LIST), 0))
    return _chat(_turns(rng, asked, mixture.max_turns))


def messages(rng: Random, mixture: Mixture) -> list[dict[str, str]]:
    """A conversation, as a line of the distillation's data."""
    if rng.random() < mixture.sums_share:
        pairs = [(p.question, p.answer) for p in (training_sum(rng) for _ in range(rng.randint(1, 2)))]
    else:
        problem = training_task(rng, mixture.tasks, mixture.max_steps)
        asked = questions(rng, problem, mixture.max_steps)
        pairs = [(a.question, a.answer) for a in _turns(rng, asked, mixture.max_turns)]
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]


def write_messages(path: Path, seed: int, count: int, mixture: Mixture) -> None:
    """Write the conversations that a student learns from, as JSON lines, over those that are there."""
    rng = Random(f"distill {seed}")
    with atomic_output(path, force=True) as part, part.open("w", encoding="utf-8") as file:
        for _ in range(count):
            file.write(json.dumps({"messages": messages(rng, mixture)}) + "\n")


def _turns(rng: Random, asked: Iterator[Asked], most: int) -> list[Asked]:
    """The turns of a conversation about one problem: often a single one, as the problems are asked in a test."""
    return _some(asked, 1 if most == 1 or rng.random() < 0.3 else rng.randint(2, most), 10)


def _some(asked: Iterator[Asked], count: int, overhead: int) -> list[Asked]:
    """The first questions, until they are so many or long enough."""
    taken: list[Asked] = []
    length = 0
    for one in islice(asked, count):
        taken.append(one)
        length += len(one.question) + overhead
        if length > ENOUGH:
            break
    return taken


def _conversation(pairs: list[tuple[str, str]]) -> Parts:
    parts: Parts = []
    for i, (prompt, answer) in enumerate(pairs):
        parts += [Part(("\n" if i else "") + prompt), Part(answer + "<|im_end|>", answer=True)]
    return parts


def _chat(asked: list[Asked]) -> Parts:
    """Tasks as conversations."""
    before, after = FRAME
    parts: Parts = []
    for i, one in enumerate(asked):
        parts += [Part(("\n" if i else "") + before), *_pieces(one), Part(after, stations=one.stations)]
        parts += [Part(one.answer + "<|im_end|>", answer=True)]
    return parts


def _list(asked: list[Asked]) -> Parts:
    """Questions, each with its answer right behind it: nine tokens a question fewer than a conversation."""
    parts: Parts = []
    for i, one in enumerate(asked):
        parts += [Part(";" if i else "<|im_start|>user\n"), *_pieces(one), Part(one.answer, answer=True)]
    return parts


def _pieces(one: Asked) -> Parts:
    """A question, cut behind its closing brackets: each is guided by the value of what it closes."""
    parts: Parts = []
    start = 0
    for at, value, steps in bracket_values(one.question) if one.question.startswith("(") else ():
        parts.append(Part(one.question[start:at], stations=NOTHING * (steps - 1) + value))
        start = at
    return [*parts, Part(one.question[start:], stations=one.stations)]


def _walk(rng: Random, max_steps: int) -> Parts:
    """A table smaller than the tasks', and the way around it, ``c>a;f>c;a>f;c>a>f>c``, or questions."""
    ring = rng.sample(pointers.LETTERS, rng.randint(3, pointers.MIN_RING - 1))
    entries = [f"{letter}>{following};" for letter, following in pairwise([*ring, ring[0]])]
    rng.shuffle(entries)
    table = "".join(entries)
    if rng.random() < 0.5:
        parts: Parts = [Part(f"<|im_start|>user\n{table}{ring[0]}")]
        for letter in [*ring[1:], ring[0]]:
            parts += [Part(">"), Part(letter, answer=True)]
        return parts
    walks = [(at, steps) for at in range(len(ring)) for steps in range(1, 1 + min(max_steps, len(ring) - 1))]
    asked = []
    for at, steps in rng.sample(walks, min(len(walks), MAX_LIST - 4)):
        way = "".join(ring[(at + step) % len(ring)] for step in range(1, steps + 1))
        asked.append(Asked(f"{'' if asked else table}{ring[at]}>{steps}=", way[-1], way))
    return _list(asked)


@dataclass(frozen=True)
class Row:
    """Tokens; for each whether it belongs to an answer, and what the loops are to say behind it (ids, -1 for none)."""

    tokens: list[int]
    is_answer: list[bool]
    stations: dict[int, list[int]]


def encode(parts: Parts, tokenizer: Tokenizer) -> Row:
    """A row's tokens."""
    tokens: list[int] = []
    is_answer: list[bool] = []
    stations: dict[int, list[int]] = {}
    for part in parts:
        ids = tokenizer.encode(part.text).ids
        tokens += ids
        is_answer += [part.answer] * len(ids)
        if part.stations:
            # a character of a task is one token
            said = [-1 if c == NOTHING else tokenizer.token_to_id(c) for c in part.stations]
            stations[len(tokens) - 1] = said
    return Row(tokens, is_answer, stations)


@dataclass(frozen=True)
class Batch:
    """Shapes: tokens (B, n) int64, is_answer (B, n) bool; guide (T, B, n - 1) int64, -1 where nothing is to be said."""

    tokens: Tensor
    is_answer: Tensor
    guide: Tensor


def batches(rng: Random, tokenizer: Tokenizer, batch_tokens: int, mixture: Mixture, loops: int) -> Iterator[Batch]:
    """One group of batches of rows of like length, each of about ``batch_tokens`` tokens, padding included."""
    rows = []
    left = GROUP * batch_tokens
    while left > 0:
        rows.append(encode(row(rng, mixture), tokenizer))
        left -= len(rows[-1].tokens)
    rows.sort(key=lambda r: len(r.tokens))
    cut = []
    while rows:
        count = max(1, batch_tokens // len(rows[-1].tokens))
        cut.append(rows[-count:])
        del rows[-count:]
    rng.shuffle(cut)
    for part in cut:
        yield pad(part, loops)


def pad(rows: list[Row], loops: int) -> Batch:
    """Rows padded at their ends to the longest."""
    longest = max(len(row.tokens) for row in rows)
    tokens = torch.full((len(rows), longest), PAD)
    is_answer = torch.zeros(len(rows), longest, dtype=torch.bool)
    for b, row in enumerate(rows):
        tokens[b, : len(row.tokens)] = torch.tensor(row.tokens)
        is_answer[b, : len(row.tokens)] = torch.tensor(row.is_answer)
    guide = torch.where(is_answer, tokens, -1)[:, 1:].repeat(loops, 1, 1)
    for b, row in enumerate(rows):
        for at, said in row.stations.items():
            if at < longest - 1:
                guide[:, b, at] = torch.tensor([said[min(t, len(said) - 1)] for t in range(loops)])
    return Batch(tokens, is_answer, guide)
