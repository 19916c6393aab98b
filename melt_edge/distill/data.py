"""Training data, read lazily: an index of where records begin, a seeded order, batches of padded rows.

What a batch holds depends on the seed and on a position of a few numbers alone, so that a run continues
where it was stopped.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol

import torch
from torch import Tensor

from melt_edge.distill.settings import Settings
from melt_edge.distill.text import Encoder, Row, pack, text_file
from melt_edge.errors import ConfigError, FormatError

TASK_PREFIX = "task:"
# A piece of a text file is about one row long; a token of English takes about four bytes.
_BYTES_PER_TOKEN = 4
# Records tried for one batch before the data counts as holding nothing to learn.
_MAX_FRUITLESS = 1000


@dataclass(frozen=True)
class Batch:
    """Rows padded at their ends. Shapes: tokens (B, n) int64; learned, present (B, n) bool.

    learned: the token is to be predicted; present: it is no padding.
    """

    tokens: Tensor
    learned: Tensor
    present: Tensor


@dataclass(frozen=True)
class _Line:
    """A place in a file for messages; the lines before it are counted only when it is printed."""

    path: Path
    offset: int

    def __str__(self) -> str:
        with self.path.open("rb") as file:
            number = file.read(self.offset).count(b"\n") + 1
        return f"{self.path}, line {number}"


class Source(Protocol):
    """Records by their place in an endless, seeded order."""

    def row(self, place: int) -> Row:
        """The row of one record. Raises: FormatError or ConfigError naming the record."""

    def fingerprint(self) -> list[Any]:
        """What tells these data from others, for a run that continues."""


class FileSource:
    """The records of JSONL and text files, shuffled anew in every pass over them."""

    def __init__(self, paths: Sequence[Path], encoder: Encoder, *, seed: int, piece_bytes: int) -> None:
        self.paths = list(paths)
        self.encoder = encoder
        self.seed = seed
        self._starts = [_index(path, piece_bytes) for path in self.paths]
        self.count = sum(len(starts) - 1 for starts in self._starts)
        if self.count == 0:
            raise ConfigError(f"{', '.join(map(str, paths))}: no records in there; expected JSON lines or text")
        self._order: tuple[int, array[int]] | None = None

    def row(self, place: int) -> Row:
        """The row at a place of the order; place // count passes are behind it."""
        record = self._shuffled(place // self.count)[place % self.count]
        file = 0
        while record >= len(self._starts[file]) - 1:
            record -= len(self._starts[file]) - 1
            file += 1
        return self._read(self.paths[file], self._starts[file], record)

    def fingerprint(self) -> list[Any]:
        """Names and sizes of the files."""
        return [[path.name, starts[-1]] for path, starts in zip(self.paths, self._starts, strict=True)]

    def _shuffled(self, epoch: int) -> array[int]:
        if self._order is None or self._order[0] != epoch:
            order = array("q", range(self.count))
            Random(f"order {self.seed} {epoch}").shuffle(order)
            self._order = epoch, order
        return self._order[1]

    def _read(self, path: Path, starts: array[int], record: int) -> Row:
        try:
            with path.open("rb") as file:
                file.seek(starts[record])
                raw = file.read(starts[record + 1] - starts[record])
        except OSError as err:
            raise ConfigError(f"{path}: cannot be read ({err.strerror or err})") from err
        line = _Line(path, starts[record])
        if text_file(path):  # a piece ends where a line does, so no character is cut
            return self.encoder.encode({"text": _decoded(raw, line)}, line, whole=False)
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError) as err:
            raise FormatError(f"{line}: not valid JSON ({err}); every line must be one object") from err
        return self.encoder.encode(value, line)


class TaskSource:
    """Generated training problems, a new one at every place."""

    def __init__(self, names: Sequence[str], encoder: Encoder, *, seed: int) -> None:
        from melt_edge.tasks import TASKS, training_problem

        unknown = [name for name in names if name != "all" and name not in TASKS]
        if unknown:
            raise ConfigError(f"task:{unknown[0]} is no task; expected task:all or task: with {', '.join(TASKS)}")
        self.names = None if "all" in names else list(names)
        self.encoder = encoder
        self.seed = seed
        self._draw = training_problem

    def row(self, place: int) -> Row:
        """The row of the problem drawn at this place."""
        problem = self._draw(Random(f"task {self.seed} {place}"), self.names)
        where = f"task:{problem.task}, problem {place}"
        return self.encoder.encode({"prompt": problem.question, "answer": problem.answer}, where)

    def fingerprint(self) -> list[Any]:
        """The tasks drawn from."""
        return ["tasks", self.names]


class Batches:
    """The rows of every optimizer step, one after the other; ``state`` is the position."""

    def __init__(self, settings: Settings, encoder: Encoder) -> None:
        self.settings = settings
        self.sources = open_sources(settings, encoder)
        self._place = 0  # records drawn when the current group began
        self._left: list[Row] = []  # what packing left over at that point
        self._group: list[list[Row]] = []
        self._taken = 0
        self._next: tuple[int, list[Row]] = (0, [])
        self._fill()  # what is wrong with the data is told before a model is loaded

    def next_rows(self) -> list[Row]:
        """The rows of the next step, batch_size of them."""
        if self._taken == len(self._group):
            self._place, self._left = self._next
            self._fill()
        self._taken += 1
        return self._group[self._taken - 1]

    def state(self) -> dict[str, Any]:
        """The position, as JSON can write it."""
        left = [row.tokens for row in self._left]
        return {"place": self._place, "left": left, "taken": self._taken, "data": self._fingerprint()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue at a position. Raises: ConfigError if the data are others than those it was taken from."""
        if state["data"] != self._fingerprint():
            raise ConfigError(
                f"the data are {self._fingerprint()}, but the run began with {state['data']}; "
                "give the same data to continue it"
            )
        self._place = state["place"]
        self._left = [Row(tokens, [True] * len(tokens), is_text=True) for tokens in state["left"]]
        self._group, self._taken = [], 0
        self._next = (self._place, self._left)
        if state["taken"]:
            self._fill()
            self._taken = state["taken"]

    def _fingerprint(self) -> list[Any]:
        return [source.fingerprint() for source in self.sources]

    def _fill(self) -> None:
        """Draw a group of batches: rows of like length together, the batches in a seeded order."""
        settings = self.settings
        wanted = settings.sort_batches * settings.batch_size
        place = self._place
        rows, left = pack(self._left, settings.sequence_length)
        fruitless = 0
        while len(rows) < wanted:
            drawn = self.sources[place % len(self.sources)].row(place // len(self.sources))
            place += 1
            packed, left = pack([*left, drawn], settings.sequence_length)
            useful = [row for row in packed if any(row.learned[1:])]
            rows += useful
            fruitless = 0 if useful or (drawn.is_text and drawn.tokens) else fruitless + 1
            if fruitless == _MAX_FRUITLESS:
                raise ConfigError(
                    f"the data hold nothing to learn in {fruitless} records in a row: no answer within "
                    f"sequence_length = {settings.sequence_length} tokens; raise it or use other data"
                )
        left = [*rows[wanted:], *left]  # more than wanted come from a text alone
        rows = sorted(rows[:wanted], key=lambda row: len(row.tokens)) if settings.sort_batches > 1 else rows[:wanted]
        size = settings.batch_size
        self._group = [rows[i : i + size] for i in range(0, wanted, size)]
        Random(f"group {settings.seed} {self._place}").shuffle(self._group)
        self._taken = 0
        self._next = place, left


def open_sources(settings: Settings, encoder: Encoder) -> list[Source]:
    """One source for all files and one for all tasks; places alternate between the two.

    Raises: ConfigError if there are no data, or a file that is missing or empty.
    """
    tasks = [name[len(TASK_PREFIX) :] for name in settings.data if name.startswith(TASK_PREFIX)]
    paths = [Path(name) for name in settings.data if not name.startswith(TASK_PREFIX)]
    sources: list[Source] = []
    if paths:
        piece_bytes = _BYTES_PER_TOKEN * settings.sequence_length
        sources.append(FileSource(paths, encoder, seed=settings.seed, piece_bytes=piece_bytes))
    if tasks:
        sources.append(TaskSource(tasks, encoder, seed=settings.seed))
    if not sources:
        raise ConfigError("no data to train on; give JSONL or text files with --data, or --data task:all")
    return sources


def collate(rows: Sequence[Row], *, length: int | None = None) -> Batch:
    """Rows as one batch, padded at their ends to the longest or to ``length``."""
    n = max(len(row.tokens) for row in rows) if length is None else length
    tokens = torch.zeros(len(rows), n, dtype=torch.int64)
    learned = torch.zeros(len(rows), n, dtype=torch.bool)
    present = torch.zeros(len(rows), n, dtype=torch.bool)
    for b, row in enumerate(rows):
        tokens[b, : len(row.tokens)] = torch.tensor(row.tokens)
        learned[b, : len(row.learned)] = torch.tensor(row.learned)
        present[b, : len(row.tokens)] = True
    return Batch(tokens, learned, present)


def _index(path: Path, piece_bytes: int) -> array[int]:
    """The offsets where records begin, and the end of the last one; empty lines of JSONL are left out."""
    starts: array[int] = array("q")
    is_text = text_file(path)
    try:
        with path.open("rb") as file:
            offset = 0
            for line in file:
                if is_text:
                    if not starts or offset - starts[-1] >= piece_bytes:
                        starts.append(offset)
                elif line.strip():
                    starts.append(offset)
                offset += len(line)
    except OSError as err:
        raise ConfigError(f"{path}: cannot be read ({err.strerror or err}); name a JSONL or text file") from err
    if not starts:
        raise ConfigError(f"{path}: is empty; expected JSON lines or text")
    starts.append(offset)
    return starts


def _decoded(raw: bytes, where: object) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as err:
        raise FormatError(f"{where}: not UTF-8 text ({err})") from err
