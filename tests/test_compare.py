"""The comparison: what it measures of tiny models, what it skips, and the files it writes. No speed is asserted."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from melt_edge.bench.bandwidth import READ_BYTES
from melt_edge.cli import app
from melt_edge.compare import child
from melt_edge.compare import measure as measuring
from melt_edge.compare import random_model as random_models
from melt_edge.compare.measure import measure, measure_point
from melt_edge.compare.paper import paper_table
from melt_edge.compare.plot import check_plot, write_plot
from melt_edge.compare.points import Contender, Point, Row, computed, contenders, grid
from melt_edge.compare.process_memory import peak_rss_bytes, process_memory
from melt_edge.compare.random_model import random_model, write_random_gguf
from melt_edge.compare.shapes import SHAPES, shape_config
from melt_edge.compare.table import csv_text, paper_lines, ratio_lines, tables
from melt_edge.errors import BackendUnavailableError, ConfigError
from melt_edge.files import default_cache_dir
from melt_edge.runtime.gguf_check import check_gguf, config_from_gguf
from melt_edge.spec import tensor_specs

# One layer row in float16: two heads of 64, keys and values, two layers.
KV_BYTES_PER_TOKEN = 2 * 2 * 2 * 64 * 2
N_CTX = 256


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Contender]:
    """The dense, Ouro and MELT roles of the tiny shape."""
    folder = tmp_path_factory.mktemp("cache")
    files = [random_model("tiny", shape_config("tiny", arch), folder) for arch in ("ouro", "melt")]
    return [role for file in files for role in contenders(file, "tiny")]


def points_of(models: list[Contender], **changes: Any) -> list[Point]:
    options: dict[str, Any] = {"loops": [1, 2, 4], "n_ctx": [N_CTX], "kv_types": ["f16"], "backends": None}
    return grid(models, **{**options, "n_decode": 4, "n_threads": 1, **changes})


@pytest.fixture(scope="module")
def rows(models: list[Contender]) -> list[Row]:
    return list(measure(points_of(models), limit_s=120))


def a_row(kind: str, loops: int, **changes: Any) -> Row:
    """A row as if it had been measured."""
    per_loop = 1000 * loops if kind == "ouro" else 1000
    made = Row(
        model="ouro-1.4b",
        kind=kind,
        loops=loops,
        n_ctx=1024,
        kv_type="f16",
        backend="llama",
        n_decode=4,
        n_threads=1,
        status="measured",
        bytes_from="measured",
        weights_type="q4_0",
        weights_bytes=10**9,
        kv_bytes=1024 * per_loop,
        compute_bytes=10**6,
        rss_filled_bytes=2 * 10**9,
        ttft_ms=10.0,
        prefill_tps=100.0,
        decode_tps=10.0,
        bandwidth=12e9,
    )
    return replace(made, **changes)


# -- measured


def test_the_cache_of_a_melt_is_flat_and_of_an_ouro_grows_with_the_loops(rows: list[Row]) -> None:
    found = {(row.kind, row.loops): row.kv_bytes for row in rows}
    assert [row.reason for row in rows if row.status != "measured"] == []
    assert found == {
        ("dense", 1): N_CTX * KV_BYTES_PER_TOKEN,
        ("ouro", 2): 2 * N_CTX * KV_BYTES_PER_TOKEN,
        ("ouro", 4): 4 * N_CTX * KV_BYTES_PER_TOKEN,
        ("melt", 1): N_CTX * KV_BYTES_PER_TOKEN,
        ("melt", 2): N_CTX * KV_BYTES_PER_TOKEN,
        ("melt", 4): N_CTX * KV_BYTES_PER_TOKEN,
    }


def test_a_context_filled_with_repeated_rows_is_as_large(models: list[Contender], rows: list[Row]) -> None:
    """Its memory is the same; there is no time to a first token, because nobody computed the prompt."""
    points = [point for point in points_of(models, n_prefill=70) if point.loops == 4]
    for row in measure(points, limit_s=120):
        (whole,) = (other for other in rows if (other.kind, other.loops) == (row.kind, 4))
        assert (row.status, row.kv_bytes, row.n_prefill) == ("measured", whole.kv_bytes, 70)
        assert (whole.n_prefill, row.ttft_ms) == (N_CTX - 4, None)
        assert whole.ttft_ms
        assert row.prefill_tps
        assert row.decode_tps


def test_a_row_has_every_measurement(rows: list[Row]) -> None:
    for row in rows:
        assert row.bytes_from == "measured"
        assert row.weights_type == "q4_0"
        assert row.weights_bytes
        assert row.compute_bytes
        assert row.ttft_ms
        assert row.prefill_tps
        assert row.decode_tps
        assert 1e8 < (row.bandwidth or 0) < 1e13
        if sys.platform == "linux":
            assert row.rss_before_bytes
            assert row.rss_loaded_bytes
            assert row.rss_filled_bytes
            assert row.peak_rss_bytes
            assert row.peak_rss_bytes >= row.rss_filled_bytes


def test_what_is_computed_before_loading_is_what_the_library_takes(models: list[Contender], rows: list[Row]) -> None:
    for point, row in zip(points_of(models), rows, strict=True):
        assert computed(point).kv_bytes == row.kv_bytes
        assert computed(point).total_bytes >= (row.total_bytes or 0)


def test_this_process_has_a_memory() -> None:
    found = process_memory("now")
    assert set(found) == {"rss_now_bytes", "pss_now_bytes", "footprint_now_bytes"}
    if sys.platform in ("linux", "darwin"):
        assert (found["rss_now_bytes"] or 0) > 2**20
        assert (peak_rss_bytes() or 0) > 2**20


def test_memory_is_not_read_for_its_speed_where_little_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "available_bytes", lambda: None)
    assert (child.read_bandwidth(1) or 0) > 1e8
    monkeypatch.setattr(child, "available_bytes", lambda: READ_BYTES)
    assert child.read_bandwidth(1) is None


# -- not measured


def test_a_point_that_does_not_fit_is_skipped_with_its_computed_size(
    models: list[Contender], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "available_bytes", lambda: 1000)
    monkeypatch.setattr(measuring, "_run_child", lambda *_: pytest.fail("was started"))
    for row in measure(points_of(models), limit_s=1):
        assert (row.status, row.bytes_from) == ("skipped", "computed")
        assert row.kv_bytes == N_CTX * KV_BYTES_PER_TOKEN * (row.loops if row.kind == "ouro" else 1)
        assert "computed" in (row.reason or "")
        assert "0 MiB" in (row.reason or "")
        assert row.decode_tps is None


def test_a_point_that_the_model_cannot_do_is_skipped(models: list[Contender]) -> None:
    """As an Ouro of 48 layers with 16 loops, which needs more slots than llama.cpp has."""
    (point,) = points_of([models[0]])
    row = measure_point(replace(point, loops=65), limit_s=1)
    assert (row.status, row.bytes_from) == ("skipped", None)
    assert "loops is 65" in (row.reason or "")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended by SIGKILL"),
        ("import sys; sys.stderr.write('first\\nlast words\\n'); sys.exit(3)", "status 3 (last words)"),
        ("print('no json')", "status 0 (it said nothing)"),
        ("import time; time.sleep(60)", "took longer than 3 s"),
    ],
    ids=["killed", "died", "babble", "slow"],
)
def test_a_child_that_dies_is_a_row(
    models: list[Contender], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, said: str
) -> None:
    child = tmp_path / "child"
    child.write_text(f"#!{sys.executable}\n{code}\n")
    child.chmod(0o755)
    monkeypatch.setattr(measuring, "sys", SimpleNamespace(executable=str(child)))
    (point,) = points_of([models[0]])
    row = measure_point(point, limit_s=3)
    assert (row.status, row.bytes_from, row.kv_bytes) == ("failed", "computed", N_CTX * KV_BYTES_PER_TOKEN)
    assert said in (row.reason or "")


def test_a_typed_error_of_the_child_is_the_reason(models: list[Contender], tmp_path: Path) -> None:
    """The file is gone when the child opens it."""
    header = models[0].header
    source = replace(header.source, path=tmp_path / "gone.gguf")
    gone = replace(models[0], header=replace(header, source=source))
    (point,) = points_of([gone])
    row = measure_point(point, limit_s=60)
    assert row.status == "failed"
    assert "gone.gguf" in (row.reason or "")


# -- the grid


def test_the_grid_measures_nothing_twice(models: list[Contender]) -> None:
    points = points_of(models, n_ctx=[512, 256, 512])
    keys = [(p.contender.kind, p.loops, p.n_ctx) for p in points]
    assert len(keys) == len(set(keys)) == 12
    assert ("ouro", 1, 256) not in keys  # the dense model
    assert [p.n_ctx for p in points] == sorted(p.n_ctx for p in points)


def test_files_keep_their_own_loops(models: list[Contender]) -> None:
    points = points_of(models, loops=None)
    assert [(p.contender.kind, p.loops) for p in points] == [("dense", 1), ("ouro", 4), ("melt", 4)]


def test_a_context_needs_room_for_a_prompt(models: list[Contender]) -> None:
    with pytest.raises(ConfigError, match="no room for a prompt and 4 tokens"):
        points_of(models, n_ctx=[4])


# -- random weights


@pytest.mark.parametrize("type", ["q4_0", "q8_0", "f16"])
@pytest.mark.parametrize("arch", ["ouro", "melt"])
def test_random_weights_are_a_valid_file(tmp_path: Path, arch: str, type: str) -> None:
    config = shape_config("tiny", arch)
    write_random_gguf(tmp_path / "r.gguf", config, type=type)
    file = check_gguf(tmp_path / "r.gguf")
    assert replace(config_from_gguf(file), eos_token_id=None, bos_token_id=None, pad_token_id=None) == config
    assert {tensor.type.lower() for tensor in file.tensors if tensor.name == "output.weight"} == {type}


def test_random_weights_are_written_once(tmp_path: Path) -> None:
    config = shape_config("tiny", "melt")
    path = random_model("tiny", config, tmp_path / "new")
    first = path.stat().st_mtime_ns
    assert random_model("tiny", config, tmp_path / "new") == path
    assert path.stat().st_mtime_ns == first
    assert random_model("tiny", config, tmp_path / "new", type="q8_0") != path
    path.write_bytes(path.read_bytes()[:-1000])  # damaged: written again
    assert random_model("tiny", config, tmp_path / "new") == path
    check_gguf(path)


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_models.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(ConfigError, match=r"1 MiB free, .* MiB are needed; choose another --cache-dir"):
        random_model("tiny", shape_config("tiny", "ouro"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_folder_is_the_platforms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_cache_dir() == Path("/x/melt-edge")
    monkeypatch.delenv("XDG_CACHE_HOME")
    for platform, folder in (("linux", ".cache"), ("darwin", "Library/Caches")):
        monkeypatch.setattr(sys, "platform", platform)
        assert default_cache_dir() == Path.home() / folder / "melt-edge"


def test_the_named_shapes_have_the_published_sizes() -> None:
    def parameters(name: str, arch: str) -> float:
        shapes = [spec.shape for spec in tensor_specs(shape_config(name, arch)).values()]
        return sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes) / 1e9

    assert parameters("ouro-1.4b", "ouro") == pytest.approx(1.43, abs=0.01)
    assert parameters("ouro-1.4b", "melt") == pytest.approx(1.64, abs=0.01)
    assert parameters("ouro-2.6b", "ouro") == pytest.approx(2.67, abs=0.01)
    assert shape_config("ouro-1.4b", "ouro").kv_bytes_per_token(2) == 786_432
    assert shape_config("ouro-1.4b", "melt").kv_bytes_per_token(2) == 196_608
    with pytest.raises(ConfigError, match="expected one of " + ", ".join(SHAPES)):
        shape_config("ouro", "ouro")


# -- what is shown


def printed(*shown: Table) -> str:
    """The tables on a terminal of 80 columns."""
    text = io.StringIO()
    for table in shown:
        Console(file=text, width=80).print(table)
    return text.getvalue()


def test_the_papers_table_stands_beside_matching_rows() -> None:
    found = paper_table([a_row("ouro", 4), a_row("melt", 4)])
    assert found is not None
    assert found["paper_ratio"] == pytest.approx(
        {"kv_bytes": 4.0, "weights_bytes": 0.878, "total_bytes": 2.947}, abs=2e-3
    )
    assert found["measured_ratio"]["kv_bytes"] == 4.0
    assert found["measured"]["melt"]["kv_at_32000_computed"] == 32_000_000
    assert found["measured_weights"] == "q4_0"


def test_the_papers_table_fits_a_terminal() -> None:
    found = paper_table([a_row("ouro", 4), a_row("melt", 4)])
    assert found is not None
    lines = printed(paper_lines(found)).splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    (ratios,) = (line.split() for line in lines if "Ouro/MELT" in line)
    assert ratios == ["Ouro/MELT", "4.00", "0.88", "2.95", "4.00", "1.00", "1.00", "1.00", "4.00"]


@pytest.mark.parametrize(
    "change", [{"model": "tiny"}, {"loops": 2}, {"kv_type": "q8_0"}, {"status": "skipped"}], ids=lambda c: next(iter(c))
)
def test_the_papers_table_needs_matching_rows(change: dict[str, Any]) -> None:
    assert paper_table([replace(a_row("ouro", 4), **change), a_row("melt", 4)]) is None


def test_computed_sizes_are_marked() -> None:
    skipped = a_row("ouro", 4, status="skipped", bytes_from="computed", reason="too large", decode_tps=None)
    lines = printed(*tables([a_row("melt", 4), skipped])).splitlines()
    assert max(map(len, lines)) <= 80
    ouro, melt = (next(line for line in lines if name in line) for name in ("Ouro", "MELT"))
    assert "~3.91" in ouro
    assert "skipped" in ouro
    assert "~" not in melt


def test_the_table_fits_a_terminal() -> None:
    large = a_row("no-gate", 64, kv_bytes=10**11, weights_bytes=10**10, rss_filled_bytes=10**11, ttft_ms=1e6)
    lines = printed(*tables([large])).splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    assert any(line.split()[:4] == ["MELT,", "no", "gate", "64"] for line in lines), lines


def test_the_table_says_how_fast_the_memory_was() -> None:
    unknown = a_row("ouro", 4, bandwidth=None)
    melt, ouro = (printed(*tables([row])).splitlines()[-2] for row in (a_row("melt", 4, bandwidth=36.6e9), unknown))
    assert melt.split()[-2:] == ["10", "37"]
    assert ouro.split()[-2:] == ["10", "-"]


def test_ratio_lines() -> None:
    (line,) = ratio_lines([a_row("dense", 1), a_row("ouro", 4), a_row("melt", 4)])
    assert "the cache of Ouro is 4.00 times that of MELT" in line
    assert ratio_lines([a_row("ouro", 4)]) == []


def test_csv_has_a_line_for_each_row() -> None:
    rows = [a_row("melt", 4), a_row("ouro", 4, status="failed", reason='a "quoted", reason', decode_tps=None)]
    first, second = csv.DictReader(io.StringIO(csv_text(rows)))
    assert first["kv_bytes"] == "1024000"
    assert first["total_bytes"] == str(10**9 + 10**6 + 1024000)
    assert (second["reason"], second["decode_tps"]) == ('a "quoted", reason', "")


def plot_rows() -> list[Row]:
    """Two cache types, two contexts, a point that was not measured, and one of which nothing is known."""
    rows = [a_row("dense", 1)]
    rows += [a_row(kind, loops) for kind in ("ouro", "melt", "no-gate") for loops in (2, 4)]
    rows += [replace(row, n_ctx=4096, kv_bytes=4 * (row.kv_bytes or 0)) for row in rows]
    rows.append(a_row("ouro", 4, n_ctx=8192, status="skipped", bytes_from="computed", decode_tps=None))
    rows.append(a_row("ouro", 8, status="skipped", bytes_from=None, decode_tps=None, weights_bytes=None, kv_bytes=None))
    return rows + [replace(row, kv_type="q8_0") for row in rows]


@pytest.mark.parametrize(
    ("bandwidths", "said"),
    [((None,), ""), ((36.6e9, None), "memory at 37 GB/s"), ((63e9, 36.6e9), "memory at 37 to 63 GB/s")],
)
def test_a_plot_says_how_fast_the_memory_was(tmp_path: Path, bandwidths: tuple[float | None, ...], said: str) -> None:
    rows = [a_row("melt", 4, bandwidth=bandwidth) for bandwidth in bandwidths]
    write_plot(rows, tmp_path / "p.svg", format="svg")
    text = (tmp_path / "p.svg").read_text()
    assert said in text
    assert said or "memory at" not in text


@pytest.mark.parametrize("rows", [plot_rows(), [a_row("melt", 4)], [plot_rows()[-1]]], ids=["all", "one", "nothing"])
def test_plots_are_well_formed(tmp_path: Path, rows: list[Row]) -> None:
    write_plot(rows, tmp_path / "p.svg", format="svg")
    assert ElementTree.parse(tmp_path / "p.svg").getroot().tag.endswith("svg")
    write_plot(rows, tmp_path / "p.png", format="png")
    data = (tmp_path / "p.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    assert b"IEND" in data[-12:]


def test_a_plot_is_png_or_svg_and_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"\.png or \.svg"):
        check_plot(tmp_path / "p.pdf")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'melt-edge\[plot\]'"):
        check_plot(tmp_path / "p.png")


# -- the command


def compare(*args: object) -> Any:
    return CliRunner().invoke(app, ["compare", *map(str, args)])


SMALL = ("--loops", "1,2", "--ctx", "256", "--n-decode", "2", "--threads", "1")


def test_compare_writes_json_csv_and_a_plot(tmp_path: Path) -> None:
    files = ("--csv", tmp_path / "c.csv", "--plot", tmp_path / "c.svg", "--cache-dir", tmp_path)
    result = compare("--shape", "tiny", *SMALL, "--json", *files)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    kinds = [(row["kind"], row["loops"]) for row in found["rows"]]
    assert kinds == [("dense", 1), ("ouro", 2), ("melt", 1), ("melt", 2)]
    assert found["complete"] is True
    assert found["paper_table_2"] is None
    with (tmp_path / "c.csv").open() as file:
        assert [row["kv_bytes"] for row in csv.DictReader(file)] == [str(row["kv_bytes"]) for row in found["rows"]]
    ElementTree.parse(tmp_path / "c.svg")
    assert result.stderr.count("cache ") == 4


def test_compare_takes_files_as_they_are(
    make_gguf: Callable[..., Path], ouro_gguf: Path, melt_gguf: Path, tmp_path: Path
) -> None:
    args = ("--share-kv", "--cache-dir", tmp_path / "cache", "--ctx", "256", "--n-decode", "2", "--json")
    result = compare(ouro_gguf, melt_gguf, *args)
    assert result.exit_code == 0, result.output
    found = {(row["kind"], row["loops"]): row["kv_bytes"] for row in json.loads(result.stdout)["rows"]}
    flat = found["dense", 1]
    assert found == {("dense", 1): flat, ("ouro", 4): 4 * flat, ("no-gate", 4): flat, ("melt", 4): flat}
    assert list((tmp_path / "cache").iterdir()) == []


def test_compare_prints_a_table(tmp_path: Path) -> None:
    result = compare("--shape", "tiny", *SMALL, "--cache-dir", tmp_path)
    assert result.exit_code == 0, result.output
    assert "tiny: 256 tokens, f16 cache, llama" in result.stdout
    assert "T=2, 256 tokens, f16: the cache of Ouro is 2.00 times that of MELT" in result.stdout


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "melt_edge", "compare", "--shape", "tiny", "--cache-dir", str(tmp_path)]
    command += [
        "--ctx",
        "256,512,768,1k,2k,3k,4k,5k,6k,7k,8k",
        "--csv",
        str(tmp_path / "c.csv"),
        "--json",
        "--threads",
        "1",
    ]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=tempfile.gettempdir()) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        assert "cache" in process.stderr.readline()  # the first point is done
        process.send_signal(signal.SIGINT)
        found = json.loads(process.stdout.read())
    assert process.returncode == 130
    assert found["complete"] is False
    assert 1 <= len(found["rows"]) < 66
    assert len((tmp_path / "c.csv").read_text().splitlines()) == 1 + len(found["rows"])


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        ([], 2, "nothing to compare"),
        (["--shape", "tiny", "--loops", "1,x"], 2, "--loops is '1,x'"),
        (["--shape", "tiny", "--loops", "65"], 2, "from 1 to 64"),
        (["--shape", "tiny", "--ctx", "0"], 2, "--ctx is '0'"),
        (["--shape", "tiny", "--kv-type", "f17"], 2, "--kv-type is 'f17'"),
        (["--shape", "big"], 1, "expected one of ouro-1.4b, ouro-2.6b, tiny"),
        (["--shape", "tiny", "--type", "q2"], 1, "expected one of q4_0, q8_0, f16"),
        (["--shape", "tiny", "--backend", "llama,tpu"], 1, "backend is 'tpu', expected llama or onnx"),
        (["--shape", "tiny", "--plot", "x.pdf"], 1, ".png or .svg"),
        (["none.gguf"], 1, "no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line(tmp_path: Path, args: list[str], code: int, said: str) -> None:
    result = compare(*args, "--cache-dir", tmp_path)
    assert result.exit_code == code
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_output_files_are_not_overwritten_without_force(tmp_path: Path) -> None:
    table = tmp_path / "c.csv"
    table.write_text("precious")
    args = ("--shape", "tiny", *SMALL, "--cache-dir", tmp_path, "--csv", table)
    result = compare(*args)
    assert (result.exit_code, table.read_text()) == (1, "precious")
    assert "c.csv: exists already" in result.stderr
    assert compare(*args, "--force").exit_code == 0
    assert table.read_text().startswith("model,kind,loops")
