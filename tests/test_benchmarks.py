"""The benchmark scripts run, say what they ran on, and hold the numbers against the limits."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "decode_ratio.py"


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of benchmarks/ as a script beside it would."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module


def test_decode_ratio_writes_numbers_with_their_machine_and_commit(tmp_path: Path) -> None:
    """The machine and the commit were written into the results by hand."""
    out = tmp_path / "result.json"
    command = [sys.executable, str(SCRIPT), "--tiny", "--json", str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=300, cwd=tmp_path)
    result = json.loads(out.read_text())
    assert result["tiny"] is True
    assert set(result["ratio"]) == {"dense", "ouro", "melt"}
    assert result["ratio"]["dense"] == 1.0
    assert result["kv_bytes"]["ouro"] == 4 * result["kv_bytes"]["melt"]
    assert result["machine"]["cores"] >= 1
    assert result["machine"]["os"]
    assert "CPU" in result["machine"]["llama_cpp"]
    assert result["packages"]["numpy"]
    assert str(tmp_path) not in out.read_text()


def test_a_ratio_above_its_limit_is_told(imported: Any) -> None:
    script: ModuleType = imported("decode_ratio")
    assert script.above_limit(script.LIMITS) == []
    assert script.above_limit({"ouro": 3.81, "melt": 4.0}) == [
        "ouro takes 3.81 times as long as one pass, the limit is 3.8"
    ]
    assert script.median_ratio([2.0, 8.0, 9.0], [1.0, 2.0, 3.0]) == 3.0


def test_the_committed_ratios_are_below_their_limits(imported: Any) -> None:
    results = json.loads((SCRIPT.parent / "results" / "decode_ratio.json").read_text())
    assert imported("decode_ratio").above_limit(results["ratio"]) == []


def test_commit_says_when_the_tree_differs_from_it(imported: Any, tmp_path: Path) -> None:
    def git(*args: str) -> str:
        names = ["-c", "user.name=n", "-c", "user.email=n@example.org"]
        command = ["git", "-C", str(tmp_path), *names, *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    commit = imported("provenance").commit
    assert commit(tmp_path) is None
    git("init", "-q")
    assert commit(tmp_path) is None  # no commit yet
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    for path in (tmp_path / "code.py", results / "x.json"):
        path.write_text("1")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    head = git("rev-parse", "HEAD")
    (results / "x.json").write_text("2")
    assert commit(tmp_path) == head
    (tmp_path / "code.py").write_text("2")
    assert commit(tmp_path) == f"{head}-dirty"


@pytest.mark.parametrize(("target", "option"), [("bench", "--json benchmarks/results/"), ("bench-check", "--check")])
def test_make_runs_the_benchmarks(target: str, option: str) -> None:
    """The limits were checked by no target."""
    command = ["make", "--dry-run", "--assume-old=.venv/.setup-done", target]
    lines = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.splitlines()
    assert any("benchmarks/decode_ratio.py" in line and option in line for line in lines), lines


def test_onnx_speed_writes_numbers(tmp_path: Path) -> None:
    """The script runs: both backends, and both sizes of the state."""
    out = tmp_path / "result.json"
    command = [sys.executable, str(SCRIPT.parent / "onnx_speed.py"), "--tiny", "--json", str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=300, cwd=tmp_path)
    result = json.loads(out.read_text())
    assert set(result["ratio"]) == {"decode", "prefill"}
    assert set(result["tokens_per_second"]["decode"]) == {"onnxruntime", "llama.cpp"}
    assert set(result["room_decode_ms"]) == {"512", "16384"}
    assert result["packages"]["onnxruntime"]


def test_onnx_speed_tells_ratios_on_the_wrong_side(imported: Any) -> None:
    script: ModuleType = imported("onnx_speed")
    assert script.problems({"ratio": {"decode": 0.6, "prefill": 0.5}, "room_ratio": 1.1}) == []
    found = script.problems({"ratio": {"decode": 0.5, "prefill": 0.4}, "room_ratio": 1.2})
    assert [problem.split()[0] for problem in found] == ["decode", "prefill", "room"]


def test_the_committed_onnx_speed_is_within_its_limits(imported: Any) -> None:
    results = json.loads((SCRIPT.parent / "results" / "onnx_speed.json").read_text())
    assert imported("onnx_speed").problems(results) == []
