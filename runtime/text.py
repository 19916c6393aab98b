"""Turns token bytes into text pieces that can be shown: whole characters, nothing of a stop string."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from melt_edge.errors import ConfigError


class TextSplitter:
    """Feeds bytes in, gets text out that no later byte can take back.

    The pieces joined are the decoded bytes (invalid ones as U+FFFD) up to the stop string that is
    complete first, whatever the pieces the bytes came in.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._pending = ""

    def feed(self, piece: bytes) -> str:
        """The text that is now certain; "" while a character or a possible stop string is incomplete."""
        return self._advance(self._decoder.decode(piece))

    def finish(self) -> str:
        """The rest, at the end of the generation; an incomplete character becomes U+FFFD."""
        text = self._advance(self._decoder.decode(b"", final=True))
        rest, self._pending = self._pending, ""
        return text + ("" if self.stopped else rest)

    def _advance(self, text: str) -> str:
        if self.stopped:
            return ""
        self._pending += text
        hits = [(at + len(word), at) for word in self._stop if (at := self._pending.find(word)) >= 0]
        if hits:
            # The earliest END decides, so that the result does not depend on how the bytes arrive.
            self.stopped = True
            certain, self._pending = self._pending[: min(hits)[1]], ""
            return certain
        held = self._held()
        certain, self._pending = self._pending[: len(self._pending) - held], self._pending[len(self._pending) - held :]
        return certain

    def _held(self) -> int:
        """Length of the longest end of the pending text that may become a stop string."""
        longest = max((len(word) - 1 for word in self._stop), default=0)
        for length in range(min(longest, len(self._pending)), 0, -1):
            end = self._pending[-length:]
            if any(word.startswith(end) for word in self._stop):
                return length
        return 0


def shown(value: object) -> str:
    """A value for a message, whatever a caller gave: at most 80 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write out numbers of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else text[:77] + "..."


def checked_path(path: str | os.PathLike[str], what: str) -> Path:
    """The path of a call. Raises: ConfigError for what cannot be one."""
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str) or "\0" in os.fspath(path):
        raise ConfigError(f"{what} is {shown(path)}, expected a path as text")
    return Path(path)


def checked_stop(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """The stop strings of a call as a tuple. Raises: ConfigError for an empty or non-text one."""
    if not isinstance(stop, str | Iterable | None):
        raise ConfigError(f"stop is {shown(stop)}, expected text or a list of texts")
    words = (stop,) if isinstance(stop, str) else tuple(stop or ())
    for word in words:
        if not isinstance(word, str) or not word:
            raise ConfigError(f"stop has {word!r}, expected text of at least one character")
    return words
