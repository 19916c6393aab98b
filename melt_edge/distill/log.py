"""The run's log: one JSON object a step, in a file that never holds half a line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from melt_edge.files import write_text


class StepLog:
    """Appends to log.jsonl. A run that continues first drops the steps that it will do again."""

    def __init__(self, path: Path, *, first_step: int) -> None:
        self.path = path
        kept = [line for line in _lines(path) if line["step"] < first_step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one step, in one write."""
        line = json.dumps(record, allow_nan=False) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(descriptor, line.encode("utf-8"))
        finally:
            os.close(descriptor)


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # the machine went down while it was written
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines
