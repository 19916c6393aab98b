"""The benchmark scripts run, say what they ran on, and hold the numbers against the limits."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from melt_edge.bench.rows import BenchRow
from melt_edge.compare.shapes import shape_config

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
    subprocess.run(command, check=True, capture_output=True, timeout=900, cwd=tmp_path)
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


@pytest.mark.parametrize("script", ["decode_ratio.py", "looped.py", "onnx_speed.py"])
@pytest.mark.parametrize(("target", "option"), [("bench", "--json benchmarks/results"), ("bench-check", "--check")])
def test_make_runs_the_benchmarks(target: str, option: str, script: str) -> None:
    """The limits were checked by no target."""
    command = ["make", "--dry-run", "--assume-old=.venv/.setup-done", target]
    lines = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.splitlines()
    assert any(f"benchmarks/{script}" in line and option in line for line in lines), lines


# -- looped.py


def bench_row(kind: str, loops: int, **changes: Any) -> BenchRow:
    """A row as the benchmark measures it: 10 tokens/s of 10, the cache as it should be."""
    made = BenchRow(
        model="ouro-1.4b",
        kind=kind,
        backend="llama",
        n_prompt=0,
        n_gen=4,
        n_depth=1000,
        status="measured",
        loops=loops,
        kv_type="f16",
        n_threads=2,
        n_ubatch=500,
        samples_ns=(400_000_000,),
        kv_bytes=1000 * (loops if kind == "ouro" else 1),
        weights_bytes=100,
        compute_bytes=10,
        rss_bytes=5000 * (loops if kind == "ouro" else 1),
        layers_read_bytes=10**9,
        gates_read_bytes=0,
        head_read_bytes=0,
        cache_read_bytes=0,
        token_ns=(100_000_000,) * 3,
        token_bandwidths=(10e9,) * 3,
    )
    return replace(made, **changes)


def loops_rows() -> list[BenchRow]:
    """Rows that keep every promise about memory."""
    rows = [bench_row("melt", loops, n_prompt=500, n_gen=0, n_depth=500, rss_bytes=0) for loops in (1, 2, 4, 8)]
    rows += [bench_row(kind, loops) for kind in ("melt", "ouro") for loops in (1, 2, 4, 8)]
    return [*rows, bench_row("melt", 4, n_depth=3000), bench_row("ouro", 4, n_depth=3000, weights_bytes=90)]


@pytest.mark.slow
def test_every_section_runs_and_writes_its_lines(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT.parent / "looped.py"), "--tiny", "--json", str(tmp_path)]
    done = subprocess.run(
        [*command, "--cache-dir", str(tmp_path)], check=True, capture_output=True, text=True, timeout=900, cwd=tmp_path
    )
    for section, n_lines in (("loops", 5), ("decode", 2), ("depth", 7), ("kv_types", 2), ("prefill", 2)):
        found = json.loads((tmp_path / f"{section}.json").read_text())
        assert len(found["lines"]) == n_lines
        assert found["machine"]["cores"] >= 1
        assert all(row["status"] == "measured" for row in found["rows"])
        for line in found["lines"]:
            assert line["name"] in done.stdout
            assert line["floor"] in done.stdout


def test_memory_that_keeps_its_promises_passes_each_line(imported: Any) -> None:
    lines = imported("looped").loops_lines(loops_rows())
    assert [line.ok for line in lines] == [True, True, True, True, None]
    assert "1, 2, 4, 8" in lines[2].measured
    assert lines[4].measured == "3.69; resident sets 4.00"


@pytest.mark.parametrize(
    ("broken", "number"),
    [
        (("melt", 8, 1000, "kv_bytes", 1020), 0),
        (("melt", 8, 1000, "rss_bytes", 5060), 1),
        (("melt", 1, 1000, "rss_bytes", 4940), 1),
        (("ouro", 2, 1000, "kv_bytes", 2001), 2),
        (("ouro", 4, 1000, "kv_bytes", 3990), 3),
    ],
)
def test_memory_that_breaks_a_promise_misses_its_line(
    imported: Any, broken: tuple[str, int, int, str, int], number: int
) -> None:
    kind, loops, depth, field, value = broken
    rows = [
        replace(row, **{field: value}) if (row.kind, row.loops, row.n_depth) == (kind, loops, depth) else row
        for row in loops_rows()
    ]
    assert imported("looped").loops_lines(rows)[number].ok is False


def test_speed_is_held_against_the_bandwidth(imported: Any) -> None:
    script = imported("looped")
    slow = replace(bench_row("ouro", 4), token_ns=(112_000_000,) * 3)  # 8.9 of 10 tokens/s
    assert [line.ok for line in script.decode_lines([bench_row("melt", 4), slow])] == [True, False]
    disturbed = replace(slow, token_ns=(100_000_000, 300_000_000, 100_000_000))
    assert [line.ok for line in script.decode_lines([disturbed])] == [True]
    drifting = replace(slow, token_bandwidths=(8.9e9,) * 3)  # the memory was as slow
    assert [line.ok for line in script.decode_lines([drifting])] == [True]
    slower = replace(slow, token_ns=(126_000_000,) * 3)
    quantised = replace(slower, kv_type="q8_0")
    assert [line.ok for line in script.depth_lines([slow, slower, quantised])] == [True, False, None]


def test_processes_are_taken_together(imported: Any) -> None:
    script = imported("looped")
    unlucky = bench_row("melt", 4, token_ns=(200_000_000,) * 3)
    row = script.merged([unlucky, bench_row("melt", 4), bench_row("melt", 4)])
    assert len(row.samples_ns) == 3
    assert [line.ok for line in script.decode_lines([row])] == [True]
    assert [line.ok for line in script.decode_lines([script.merged([unlucky, unlucky, row])])] == [False]


def test_cache_types_are_compared_pair_by_pair(imported: Any) -> None:
    script = imported("looped")
    f16 = bench_row("melt", 4, n_gen=1, samples_ns=(100, 200, 300))
    faster = replace(f16, kv_type="q8_0", samples_ns=(90, 190, 500))
    assert [line.ok for line in script.kv_types_lines([f16, faster])] == [True]
    assert [line.ok for line in script.kv_types_lines([faster, f16])] == [False]


def test_prefill_is_held_against_the_products(imported: Any) -> None:
    script = imported("looped")
    configs = {arch: shape_config("ouro-1.4b", arch) for arch in ("melt", "ouro")}
    dense = bench_row("ouro", 1, n_prompt=512, n_gen=0, n_depth=0)
    ouro = bench_row("ouro", 4, n_prompt=512, n_gen=0, n_depth=0, samples_ns=(1_700_000_000,))
    melt = replace(ouro, kind="melt", samples_ns=(2_100_000_000,))
    lines = script.prefill_lines([dense, ouro, melt], configs)
    assert "1.1 x 4.00 = 4.40" in lines[0].floor or "1.1 x 3.99" in lines[0].floor
    assert "4.56" in lines[1].floor
    assert [line.ok for line in lines] == [True, False]


def test_the_committed_lines_are_those_of_the_committed_rows(imported: Any) -> None:
    """A floor or a number edited by hand."""
    script = imported("looped")
    configs = {arch: shape_config("ouro-1.4b", arch) for arch in ("melt", "ouro")}
    for section in script.SECTIONS:
        path = SCRIPT.parent / "results" / f"{section}.json"
        if not path.exists():
            continue  # not measured yet on this machine
        found = json.loads(path.read_text())
        rows = [BenchRow.from_dict(row) for row in found["rows"]]
        assert [vars(line) for line in script.lines_of(section, rows, configs)] == found["lines"]
        assert found["commit"]


def test_onnx_speed_writes_numbers(tmp_path: Path) -> None:
    """The script runs: both backends, and both sizes of the state."""
    out = tmp_path / "result.json"
    command = [sys.executable, str(SCRIPT.parent / "onnx_speed.py"), "--tiny", "--json", str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=900, cwd=tmp_path)
    result = json.loads(out.read_text())
    assert set(result["ratio"]) == {"decode", "prefill"}
    assert set(result["tokens_per_second"]["decode"]) == {"onnxruntime", "llama.cpp"}
    assert set(result["room_decode_ms"]) == {"512", "16384"}
    assert 0 < result["own_work"] < 1
    assert isinstance(result["missed"], list)
    assert result["packages"]["onnxruntime"]


def test_onnx_speed_tells_ratios_on_the_wrong_side(imported: Any) -> None:
    script: ModuleType = imported("onnx_speed")
    assert script.problems({"ratio": {"decode": 0.6, "prefill": 0.5}, "room_ratio": 1.1, "own_work": 0.05}) == []
    found = script.problems({"ratio": {"decode": 0.5, "prefill": 0.4}, "room_ratio": 1.2, "own_work": 0.06})
    assert [problem.split()[0] for problem in found] == ["decode", "prefill", "room", "6.0"]


def test_the_committed_onnx_speed_says_what_it_misses(imported: Any) -> None:
    """A limit or a number edited by hand."""
    results = json.loads((SCRIPT.parent / "results" / "onnx_speed.json").read_text())
    assert imported("onnx_speed").problems(results) == results["missed"]
    assert results["commit"]
