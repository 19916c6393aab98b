"""The benchmark: what it counts, measures, skips, prints and compares. No speed is asserted."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from melt_edge.bench import child
from melt_edge.bench import measure as measuring
from melt_edge.bench.cost import prefill_products, read_bytes
from melt_edge.bench.measure import make_runs, measure
from melt_edge.bench.rows import BenchRow, BenchTest, Run, make_tests
from melt_edge.bench.table import cells, csv_text, markdown, notes, ratios, read_base, tables
from melt_edge.cli import app
from melt_edge.compare.points import contenders
from melt_edge.compare.random_model import random_model
from melt_edge.compare.shapes import shape_config
from melt_edge.config import LoopConfig
from melt_edge.errors import ConfigError, FormatError
from melt_edge.modeling import LoopLM
from melt_edge.runtime.gguf_check import check_gguf
from melt_edge.runtime.llama import LlamaBackend
from melt_edge.runtime.loading import BACKENDS
from melt_edge.runtime.options import LoadOptions
from tiny import tiny_config

MakeGGUF = Callable[..., Path]
TESTS = make_tests([16], [2], [0, 100])


def runs_of(path: Path, tests: tuple[BenchTest, ...] = TESTS, **changes: Any) -> list[Run]:
    options: dict[str, Any] = {"loops": None, "kv_types": ["f16"], "backends": ["llama"], "threads": [1]}
    return make_runs(contenders(path, "tiny", dense=False), tests, **{**options, "chunks": [None], **changes})


def done(runs: list[Run], **changes: Any) -> list[BenchRow]:
    return list(measure(runs, **{"repetitions": 2, "parts": True, "limit_s": 120, **changes}))


@pytest.fixture(scope="module")
def rows(make_gguf: MakeGGUF) -> list[BenchRow]:
    """A MELT at two numbers of loops."""
    return done(runs_of(make_gguf(tiny_config("melt")), loops=[1, 4]))


def a_row(**changes: Any) -> BenchRow:
    """A row as if it had been measured: 4 tokens in 2 s and in 1 s, some of them held against 5 GB at 20 GB/s."""
    made = BenchRow(
        model="a",
        kind="melt",
        backend="llama",
        n_prompt=0,
        n_gen=4,
        n_depth=0,
        status="measured",
        loops=4,
        kv_type="f16",
        n_threads=2,
        n_ubatch=8,
        weights_type="q4_0",
        samples_ns=(2 * 10**9, 10**9),
        layers_read_bytes=4 * 10**9,
        gates_read_bytes=0,
        head_read_bytes=10**9,
        cache_read_bytes=0,
        token_ns=(5 * 10**8, 25 * 10**7, 10**9),
        token_bandwidths=(20e9, 25e9, 20e9),
    )
    return replace(made, **changes)


# -- counted


@pytest.mark.parametrize("num_loops", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_gate_init", ["zeros", "input"])
def test_the_bytes_of_a_token_are_those_of_the_tensors(
    make_gguf: MakeGGUF, kv_gate_init: str, tied: bool, num_loops: int
) -> None:
    config = tiny_config("melt", kv_gate_init=kv_gate_init, tied=tied, num_loops=num_loops)
    file = check_gguf(make_gguf(config))
    d, ff, q, kv = config.hidden_size, config.intermediate_size, 4 * 32, 2 * 32
    found = read_bytes(file, config, kv_type="q8_0", n_past=10)
    layer = 4 * (d * (2 * q + 2 * kv) + 3 * d * ff + 4 * d)  # float32
    x_product, h_product = 4 * (d * d + d), 4 * d * d
    x_loops = num_loops - (kv_gate_init == "input")
    assert found.layers == num_loops * (2 * layer + 4 * d)
    assert found.gates == 2 * (x_loops * x_product + (num_loops - 1) * h_product)
    assert found.head == 4 * config.vocab_size * d
    assert found.cache == num_loops * 10 * 2 * 2 * (kv // 32 * 34)
    assert found.total == found.layers + found.gates + found.head + found.cache


def test_melt_and_ouro_read_the_same_cache(make_gguf: MakeGGUF) -> None:
    """One row in every loop, or a row of each loop."""
    found = [
        read_bytes(check_gguf(make_gguf(config)), config, kv_type="f16", n_past=100)
        for config in (tiny_config("melt"), tiny_config("ouro"))
    ]
    assert found[0].cache == found[1].cache
    assert (found[0].layers, found[1].gates) == (found[1].layers, 0)


@pytest.mark.parametrize(
    "config",
    [tiny_config("ouro"), tiny_config("ouro", num_loops=1), tiny_config("melt"), tiny_config(kv_gate_init="input")],
    ids=["ouro", "dense", "melt", "input"],
)
def test_the_products_of_a_prompt_are_those_of_the_reference(config: LoopConfig) -> None:
    n = 24
    model = LoopLM(config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.forward_chunk(torch.zeros((1, n), dtype=torch.int64), model.new_cache())
    # the counter knows no attention on a CPU, and the head is not in a chunk; the reference asks the exit gate, and
    # multiplies the zeros that the gate's latent starts with
    surplus = config.num_loops * n * config.hidden_size
    if config.has_gate and config.kv_gate_init == "zeros":
        surplus += config.num_hidden_layers * n * config.hidden_size**2
    attention = config.num_hidden_layers * config.num_loops * 4 * 32 * n * (n + 1)
    head = config.vocab_size * config.hidden_size
    assert prefill_products(config, n) == counter.get_total_flops() // 2 - surplus + attention + head


# -- measured


def test_every_test_of_every_run_is_a_row(rows: list[BenchRow]) -> None:
    assert [(row.loops, row.test.name) for row in rows] == [
        (loops, name) for loops in (1, 4) for name in ("pp16", "tg2", "pp16 @ d100", "tg2 @ d100")
    ]
    for row in rows:
        assert (row.status, row.reason) == ("measured", None)
        assert (row.kind, row.kv_type, row.n_threads, row.n_ubatch, row.weights_type) == ("melt", "f16", 1, 8, "f32")
        assert len(row.samples_ns) == 2
        assert row.avg_ts
        assert row.stddev_ts is not None
        assert row.depth_from == ("repeated" if row.n_depth else None)
        assert row.kv_bytes == 256 * 2 * 2 * 2 * 32 * 2
        assert row.rss_bytes
        assert row.model_n_params


def test_only_generated_tokens_are_held_against_the_memory(rows: list[BenchRow]) -> None:
    for row in rows:
        if row.n_prompt:
            assert (row.read_bytes, row.limit_ts, row.limit_share, row.loop_ms) == (None, None, None, None)
            continue
        assert row.bandwidth
        assert row.cache_read_bytes == pytest.approx(row.loops * 512 * (row.n_depth + 1.5), abs=1)
        assert len(row.token_ns) == len(row.token_bandwidths) == 4  # all of them
        assert sum(row.token_ns) == sum(row.samples_ns)
        assert row.limit_share
        assert row.loop_ms is not None
        assert row.parts_ms is not None
        assert row.head_ms is not None
        assert len(row.loop_ms) == row.loops
        assert sum(row.loop_ms) + row.head_ms == pytest.approx(row.parts_ms, abs=0.01)
        assert row.attention_share is not None
        assert row.gates_share is not None
        assert 0 < row.attention_share < 1
        assert 0 < row.gates_share < 1


def test_parts_are_timed_only_if_asked(make_gguf: MakeGGUF) -> None:
    (row,) = done(runs_of(make_gguf(tiny_config("melt")), make_tests([], [2], [0])), parts=False)
    assert (row.loop_ms, row.attention_share) == (None, None)
    assert row.limit_share


def test_a_backend_that_can_only_evaluate_is_measured_too(make_gguf: MakeGGUF, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its depth is computed, for every repetition."""
    evaluated: list[int] = []

    class Plain:
        def __init__(self, path: Path, options: LoadOptions) -> None:
            self._backend = LlamaBackend(path, options)
            self.info, self.memory, self.close = self._backend.info, self._backend.memory, self._backend.close
            self.reset, self.last_logits = self._backend.reset, self._backend.last_logits

        def eval(self, tokens: list[int]) -> None:
            evaluated.append(len(tokens))
            self._backend.eval(tokens)

        @property
        def n_tokens(self) -> int:
            return self._backend.n_tokens

    monkeypatch.setitem(BACKENDS, "plain", Plain)  # type: ignore[arg-type]
    options = LoadOptions(n_ctx=256, n_threads=1)
    path = make_gguf(tiny_config("melt"))
    (found,) = child.run(path, options, [BenchTest(0, 2, 100)], backend="plain", repetitions=2, parts=True)
    assert found["depth_from"] == "evaluated"
    assert "loop_ms" not in found
    assert evaluated.count(100) == 3  # once to warm up, and before each repetition
    assert all(found["token_bandwidths"])


def test_a_test_that_does_not_fit_is_skipped_and_the_others_are_done(
    make_gguf: MakeGGUF, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = runs_of(make_gguf(tiny_config("melt")), make_tests([], [2], [0, 100_000]))
    monkeypatch.setattr(measuring, "available_bytes", lambda: 60 * 2**20)
    small, large = done(runs, repetitions=1)
    assert (small.status, large.status) == ("measured", "skipped")
    assert "(computed), this machine can give 60 MiB" in (large.reason or "")
    assert large.samples_ns == ()


def test_a_run_that_its_model_cannot_do_is_skipped(make_gguf: MakeGGUF) -> None:
    (row,) = done(runs_of(make_gguf(tiny_config("ouro")), make_tests([], [2], [0]), kv_types=["q8"]))
    assert row.status == "skipped"
    assert "kv_type is 'q8'" in (row.reason or "")


def test_an_error_of_the_child_is_the_reason_of_what_was_left(make_gguf: MakeGGUF, tmp_path: Path) -> None:
    """The file is gone when the child opens it."""
    (run,) = runs_of(make_gguf(tiny_config("melt")), make_tests([8], [2], [0]))
    header = run.contender.header
    gone = replace(run.contender, header=replace(header, source=replace(header.source, path=tmp_path / "gone.gguf")))
    found = done([replace(run, contender=gone)])
    assert [row.status for row in found] == ["failed", "failed"]
    assert "gone.gguf" in (found[0].reason or "")


# -- shown


def test_numbers_follow_from_the_samples() -> None:
    row = a_row()
    assert row.samples_ts == [2.0, 4.0]
    assert row.avg_ts == 3.0
    assert row.stddev_ts == pytest.approx(2**0.5)
    assert (row.read_bytes, row.bandwidth, row.limit_ts) == (5 * 10**9, 20e9, 4.0)
    assert row.limit_shares == [0.5, 0.8, 0.25]
    assert row.limit_share == 0.5
    assert a_row(samples_ns=(10**9,)).stddev_ts == 0.0
    assert a_row(cache_read_bytes=None).limit_share is None


@pytest.mark.parametrize(("n_gen", "repetitions", "expected"), [(24, 5, 20), (6, 5, 30), (2, 1, 2), (128, 3, 21)])
def test_some_tokens_of_each_repetition_are_held_against_the_memory(
    make_gguf: MakeGGUF, n_gen: int, repetitions: int, expected: int
) -> None:
    """All of few, and about twenty of many."""
    options = LoadOptions(n_ctx=256, n_threads=1)
    test = BenchTest(0, n_gen, 0)
    path = make_gguf(tiny_config("melt"))
    (found,) = child.run(path, options, [test], backend="llama", repetitions=repetitions, parts=False)
    assert len(found["token_ns"]) == len(found["token_bandwidths"]) == expected
    assert len(found["samples_ns"]) == repetitions


def test_a_row_survives_its_json() -> None:
    row = a_row(loop_ms=(1.0, 2.0))
    assert BenchRow.from_dict(json.loads(json.dumps(row.to_dict()))) == row


def test_the_table_fits_a_terminal_of_80_columns() -> None:
    long = a_row(n_gen=128, n_depth=16384, loop_ms=(500.0,) * 4, attention_share=0.8, gates_share=0.1, kv_type="q8_0")
    console = Console(width=80, file=io.StringIO())
    for table in tables([long, a_row(status="skipped", samples_ns=(), reason="no room")]):
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "tg128 @ d16384" in text
    assert "gates" in text
    assert "…" not in text
    assert "skipped" in text


def test_cells_and_notes_say_what_was_measured() -> None:
    row = a_row(loop_ms=(10.0, 12.0), parts_ms=350.0, parts_tokens=3, attention_share=0.25, gates_share=0.1)
    assert cells(row) == ["MELT T=4", "f16", "tg4", "3.00 ± 1.41", "5,000", "50%", "11", "25%", "10%"]
    said = " ".join(notes([row, a_row(depth_from="repeated")]))
    assert "20.0 GB/s" in said
    assert "3 tokens timed in pieces" in said
    assert "took 105% of the time" in said
    assert "repeated" in said
    assert notes([a_row(token_ns=(), token_bandwidths=())]) == []


def test_markdown_and_csv_have_every_row() -> None:
    found = [a_row(model="a|b", loop_ms=(1.0, 2.0)), a_row(n_prompt=8, n_gen=0)]
    lines = markdown(found).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| a\\|b MELT T=4 | q4_0 |")
    parsed = list(csv.DictReader(io.StringIO(csv_text(found))))
    assert [row["test"] for row in parsed] == ["tg4", "pp8"]
    assert json.loads(parsed[0]["loop_ms"]) == [1.0, 2.0]
    assert float(parsed[0]["avg_ts"]) == 3.0


def test_ratios_are_of_the_same_test_with_the_same_settings() -> None:
    now = [a_row(samples_ns=(10**9, 10**9)), a_row(n_depth=7), a_row(kv_type="q8_0")]
    base = [a_row(kv_type="q4_0"), a_row(), a_row(n_depth=8), a_row(kv_type="q8_0", samples_ns=(), status="failed")]
    (found,) = ratios(now, base)
    assert found.ratio == pytest.approx(4 / 3)
    assert found.stddev == pytest.approx(4 / 3 * 2**0.5 / 3)
    assert found.to_dict()["base_ts"] == 3.0


@pytest.mark.parametrize(
    "text",
    ["no json", "[]", '{"rows": [{}]}', '{"rows": 3}', "[" * 100_000, '{"rows": [{"model": "a"}]}', "\x00\xff"],
)
def test_a_base_that_is_none_is_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "base.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError, match=r"base\.json: "):
        read_base(path)


def test_a_base_with_impossible_numbers_is_told(tmp_path: Path) -> None:
    path = tmp_path / "base.json"
    for broken in ({"samples_ns": [0]}, {"samples_ns": ["1"]}, {"samples_ns": 5}):
        path.write_text(json.dumps({"rows": [{**a_row().to_dict(), **broken}]}))
        with pytest.raises(FormatError):
            read_base(path)
    with pytest.raises(ConfigError, match=r"gone\.json: cannot be read"):
        read_base(tmp_path / "gone.json")


# -- the command


def bench(*args: object) -> Any:
    return CliRunner().invoke(app, ["bench", *map(str, args)])


def test_the_command_prints_json_and_compares_with_it(make_gguf: MakeGGUF, tmp_path: Path) -> None:
    path = make_gguf(tiny_config("melt"))
    how = ("-p", 8, "-n", 2, "-r", 1, "-t", 1, "--loops", 2, "-ctk", "q8_0", "-ctv", "q8_0", "-ub", 4)
    first = bench(path, *how, "--json")
    assert first.exit_code == 0, first.output
    found = json.loads(first.stdout)
    assert found["complete"] is True
    assert [(row["test"], row["loops"], row["kv_type"], row["n_ubatch"]) for row in found["rows"]] == [
        ("pp8", 2, "q8_0", 4),
        ("tg2", 2, "q8_0", 4),
    ]
    base = tmp_path / "base.json"
    base.write_text(first.stdout)
    second = bench(path, *how, "--compare", base)
    assert second.exit_code == 0, second.output
    assert "against" in second.stdout
    again = json.loads(bench(path, *how, "--compare", base, "-o", "json").stdout)
    assert [ratio["test"] for ratio in again["compared"]] == ["pp8", "tg2"]
    other = bench(path, *how[:-1], 8, "--compare", base)
    assert "none of these tests" in other.stderr


def test_the_command_measures_a_shape_without_weights(tmp_path: Path) -> None:
    result = bench(
        *("--shape", "tiny", "--arch", "melt", "--cache-dir", tmp_path, "-p", 0, "-n", 2, "-r", 1, "-t", 1, "-o", "md")
    )
    assert result.exit_code == 0, result.output
    assert "| tiny MELT T=4 | q4_0 |" in result.stdout
    assert [path.name.split("-")[0] for path in tmp_path.iterdir()] == ["melt"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "nothing to measure"),
        (("ouro-tiny", "-p", 0, "-n", 0), "nothing to measure"),
        (("ouro-tiny", "-d", "-1"), "--n-depth"),
        (("ouro-tiny", "-ctk", "f16", "-ctv", "q8_0"), "the same"),
        (("ouro-tiny", "-ctk", "q7"), "--kv-type"),
        (("ouro-tiny", "-o", "sql"), "expected one of"),
        (("ouro-tiny", "-fa", "maybe"), "expected one of"),
        (("--shape", "tiny", "--arch", "mamba"), "--arch"),
    ],
)
def test_what_cannot_be_asked_is_told(args: tuple[object, ...], said: str) -> None:
    result = bench(*args)
    assert result.exit_code == 2
    assert said in result.output


def test_random_models_of_both_architectures_have_a_context_for_every_test(tmp_path: Path) -> None:
    path = random_model("tiny", shape_config("tiny", "melt"), tmp_path)
    (run,) = runs_of(path, make_tests([8], [1], [0, 300]))
    assert run.options.n_ctx == 308
    (short,) = runs_of(path, make_tests([], [1], [300]))
    assert short.options.n_ctx == 300 + child.PARTS_TOKENS
    assert os.fspath(path).endswith(".gguf")
