"""The paper's claims, measured small: the command from its beginning to table and picture, in a few steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "examples" / "reproduce" / "reproduce.py"
ROWS = ("teacher-1", "untrained", "melt", "whole", "scalar")


@pytest.mark.slow
def test_a_table_of_a_few_steps(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path / "out"), "--teacher-steps", "3", "--student-steps", "2"]
    command += ["-n", "16", "--seeds", "1", "2"]
    done = subprocess.run([*command, "--only", *ROWS], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    runs = [json.loads(line) for line in (tmp_path / "out" / "runs.jsonl").read_text().splitlines()]
    runs = [run for run in runs if run["row"] != "training the teacher"]
    mains = [(row, 2) for row in ("teacher-1", "untrained", "melt")]
    assert [(run["row"], run["seed"]) for run in runs] == [*((row, 1) for row in ROWS), *mains]
    assert all(run["n"] == 16 and set(run["by_difficulty"]) == set("1234") for run in runs)
    table = (tmp_path / "out" / "results.md").read_text()
    assert "| MELT | 2 |" in table
    assert (tmp_path / "out" / "results.svg").read_text().startswith("<?xml")
    other = subprocess.run([*command, "-n", "8"], capture_output=True, text=True, timeout=600)
    assert other.returncode == 1
    assert "holds runs with other settings" in other.stderr
    again = subprocess.run([*command, "--only", *ROWS], capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stderr
    assert len((tmp_path / "out" / "runs.jsonl").read_text().splitlines()) == len(runs) + 2  # nothing is done twice
