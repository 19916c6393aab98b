"""The command line as a person and as a script sees it: output, exit codes, one-line errors, no model needed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFWriter
from typer.testing import CliRunner

import melt_edge
from melt_edge.cli import app
from tiny import tiny_config

MakeCheckpoint = Callable[..., Path]
COMMANDS = (
    *(["demo"], ["export", "gguf"], ["quantize"], ["distill"], ["inspect"]),
    *(["run"], ["chat"], ["serve"]),
    *(["eval"], ["perplexity"], ["kl"], ["compare"]),
)


def cli(*args: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run melt-edge in a process of its own, as a shell would."""
    return subprocess.run(
        [sys.executable, "-m", "melt_edge", *map(str, args)],
        input=stdin if stdin is not None else "",
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tempfile.gettempdir(),  # not the source tree, where `-m` would find half a package
    )


def assert_one_line_error(result: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    """The exit code, and one line on standard error that has these parts."""
    assert result.returncode == code, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


@pytest.fixture
def melt_file(melt_checkpoint: Path, tmp_path: Path) -> Path:
    """A float32 GGUF written by the command itself."""
    path = tmp_path / "melt.gguf"
    args = ["export", "gguf", str(melt_checkpoint), str(path), "--type", "f32", "--no-verify"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    return path


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_teaches_by_example(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Examples:" in result.output
    assert f"melt-edge {' '.join(command)}" in result.output.split("Examples:")[1]
    assert max(len(line) for line in result.output.splitlines()) <= 80


def test_help_lists_the_commands_in_the_order_of_use() -> None:
    result = CliRunner().invoke(app, ["--help"])
    places = [result.output.index(f"│ {command[0]} ") for command in COMMANDS]
    assert result.exit_code == 0
    assert places == sorted(places)


def test_no_arguments_shows_the_help_once() -> None:
    result = cli()
    assert result.returncode == 0
    assert result.stdout.count("Usage: melt-edge") == 1


def test_version() -> None:
    result = cli("--version")
    assert (result.returncode, result.stdout) == (0, f"melt-edge {melt_edge.__version__}\n")


def test_the_command_line_imports_nothing_heavy() -> None:
    """Help and inspect have to start fast: torch and llama.cpp take seconds."""
    code = "import sys, melt_edge.cli; print(sorted({'torch', 'llama_cpp', 'gguf', 'numpy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tempfile.gettempdir())
    assert result.stdout == "[]\n", result.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["run"], "missing argument"),
        (["rnu"], "no such command"),
        (["run", "m.gguf", "--foo"], "--foo"),
        (["run", "m.gguf", "-p", "x", "--loops", "65"], "--loops"),
        (["run", "m.gguf", "-p", "x", "--kv-type", "q9"], "'q9' is none of f32, f16, q8_0, q4_0"),
        (["kl", "m.gguf", "n.gguf", "t.txt", "--base-kv-type", "q9"], "'q9' is none of f32, f16, q8_0, q4_0"),
        (["quantize", "m.gguf", "n.gguf", "q4_k_l"], "did you mean q4_k_s"),
        (["run", "m.gguf", "-p", "x", "--file", "y"], "not both"),
        (["run", "m.gguf", "-p", "x", "--load-state", "s", "--system", "y"], "--system cannot go with --load-state"),
        (["export", "gguf", "a", "b", "--chunk-size", "0"], "--chunk-size"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_exit_code_2(args: list[str], said: str) -> None:
    assert_one_line_error(cli(*args), 2, said, "--help")


@pytest.mark.parametrize("command", [["run", "-p", "x"], ["chat"], ["serve"], ["inspect"]], ids=lambda c: c[0])
def test_missing_file(command: list[str], tmp_path: Path) -> None:
    path = tmp_path / "none.gguf"
    assert_one_line_error(cli(command[0], path, *command[1:]), 1, str(path), "no such file", ".gguf")


def test_run_checks_the_state_to_write_before_it_loads_the_model(tmp_path: Path) -> None:
    """Was refused only after the answer, which was then not kept; the model here does not even exist."""
    state = tmp_path / "state"
    state.write_bytes(b"precious")
    run = ("run", tmp_path / "none.gguf", "-p", "x", "--save-state")
    assert_one_line_error(cli(*run, state), 1, str(state), "not overwritten")
    assert_one_line_error(cli(*run, tmp_path / "no" / "state"), 1, "its folder does not exist")
    assert state.read_bytes() == b"precious"


def test_checkpoint_folder_is_told_how_to_export(melt_checkpoint: Path) -> None:
    result = cli("run", melt_checkpoint, "-p", "x")
    assert_one_line_error(result, 1, f"melt-edge export gguf {melt_checkpoint}")


def test_export_of_something_else(tmp_path: Path) -> None:
    assert_one_line_error(cli("export", "gguf", tmp_path / "none", tmp_path / "x.gguf"), 1, "no such folder")
    assert_one_line_error(cli("export", "gguf", tmp_path, tmp_path / "x.gguf"), 1, "config.json")
    assert not (tmp_path / "x.gguf").exists()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = cli("inspect", tmp_path / "none.gguf", "--debug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_export_says_what_it_wrote(melt_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    args = ["export", "gguf", str(melt_checkpoint), str(path), "--type", "q8_0", "--no-verify"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    text = result.stdout.replace("\n", " ")
    assert str(path) in text
    assert "bits per weight" in text
    assert "512 B per token in f16 (Ouro with 4 loops: 2 KiB)" in text
    assert f"melt-edge chat {path}" in text


def test_export_never_overwrites_without_force(melt_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    path.write_bytes(b"precious")
    args = ["export", "gguf", melt_checkpoint, path, "--type", "f32", "--no-verify"]
    assert_one_line_error(cli(*args), 1, str(path), "--force")
    assert path.read_bytes() == b"precious"
    assert cli(*args, "--force").returncode == 0
    assert path.read_bytes()[:4] == b"GGUF"


def test_export_unknown_type(melt_checkpoint: Path, tmp_path: Path) -> None:
    result = cli("export", "gguf", melt_checkpoint, tmp_path / "x.gguf", "--type", "q9_9")
    assert_one_line_error(result, 2, "q9_9", "q8_0")


def test_inspect_json_of_a_file(melt_file: Path) -> None:
    result = cli("inspect", melt_file, "--json")
    found = json.loads(result.stdout)
    assert (result.returncode, result.stderr) == (0, "")
    assert found["architecture"] == "melt"
    assert found["check"] == {"ok": True, "error": None}
    assert found["model"]["num_loops"] == 4
    assert found["model"]["chunk_size"] == 8
    assert found["model"]["kv_gate"] == "elementwise"
    # 2 layers x K and V x 2 heads x 32 values x 2 bytes; an Ouro keeps that four times.
    assert found["kv_cache"]["bytes_per_token"]["f16"] == 512
    assert found["kv_cache"]["shared"]["bytes_at_n_ctx"] == 512 * 512
    assert found["kv_cache"]["per_loop"]["bytes_per_token"] == 4 * 512
    assert found["file_bytes"] == melt_file.stat().st_size
    assert found["bits_per_weight"] == 32.0
    assert found["chat_template"] is True
    assert found["tokenizer"]["tokens"] == 301
    assert "tensors" not in found


def test_inspect_json_of_values_that_are_no_numbers(tmp_path: Path) -> None:
    """llama.cpp's model saver writes -inf for a limit that is off; the command ended in a ValueError."""
    path = tmp_path / "saved.gguf"
    writer = GGUFWriter(path, "melt")
    values = {"-inf": -math.inf, "inf": math.inf, "nan": math.nan}
    for name, value in values.items():
        writer.add_float32(f"melt.limit.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    result = cli("inspect", path, "--json")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    metadata = json.loads(result.stdout, parse_constant=refuse)["metadata"]
    assert {name: metadata[f"melt.limit.{name}"] for name in values} == {name: name for name in values}


def test_inspect_checkpoint_and_file_agree(melt_checkpoint: Path, melt_file: Path) -> None:
    folder = json.loads(cli("inspect", melt_checkpoint, "--json").stdout)
    file = json.loads(cli("inspect", melt_file, "--json", "--tensors").stdout)
    assert folder["kind"] == "checkpoint"
    assert folder["kv_cache"] == file["kv_cache"]
    assert folder["parameters"] == file["parameters"]
    same = {key: value for key, value in folder["model"].items() if not isinstance(value, float)}
    assert same.items() <= file["model"].items()
    assert len(file["tensors"]) == sum(entry["tensors"] for entry in file["types"].values())


def test_inspect_for_people(melt_file: Path) -> None:
    result = cli("inspect", melt_file, "--tensors")
    assert result.returncode == 0
    assert "2 layers x 4 loops" in result.stdout
    assert "512 B per token, 256 KiB at 512 tokens" in result.stdout
    assert "2 KiB per token, 1 MiB at 512 tokens if each loop kept its own rows" in result.stdout
    assert "blk.1.kv_gate_h.weight" in result.stdout


def test_inspect_damaged_file(melt_file: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(melt_file.read_bytes()[:-100])
    assert_one_line_error(cli("inspect", cut), 1, str(cut), "truncated")


def test_inspect_shows_a_file_of_another_architecture_but_refuses_it(tmp_path: Path) -> None:
    path = tmp_path / "llama.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_name("evil\x1b]0;title\x07name")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    result = cli("inspect", path)
    assert_one_line_error(result, 1, "'llama'", "melt")
    assert "architecture   llama" in result.stdout
    assert "\x1b" not in result.stdout


def test_inspect_survives_a_closed_pipe(melt_file: Path) -> None:
    """`melt-edge inspect x --tensors | head -1` must not end in a traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen(
        [sys.executable, "-m", "melt_edge", "inspect", str(melt_file), "--tensors"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tempfile.gettempdir(),
    )
    os.close(writer)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (141, "")


def test_unexpected_failure_is_one_line_too(monkeypatch: pytest.MonkeyPatch, melt_file: Path) -> None:
    def fail(path: Path) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("melt_edge.cli.inspect.describe", fail)
    result = CliRunner().invoke(app, ["inspect", str(melt_file)])
    assert result.exit_code == 1
    hint = "add --debug for the traceback to report"
    assert result.stderr.splitlines() == [f"error: unexpected ZeroDivisionError: oh; {hint}"]


def test_ctrl_c_is_exit_code_130(monkeypatch: pytest.MonkeyPatch, melt_file: Path) -> None:
    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("melt_edge.cli.inspect.describe", interrupted)
    result = CliRunner().invoke(app, ["inspect", str(melt_file)])
    assert result.exit_code == 130
    assert "Traceback" not in result.stderr


def test_ctrl_c_while_the_command_line_is_imported_shows_no_traceback() -> None:
    """The imports take a third of a second, in which Ctrl-C ended in a traceback through typer."""
    code = (
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from melt_edge.__main__ import main\n"
        "main()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tempfile.gettempdir())
    assert (result.returncode, result.stderr) == (130, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk_behind_standard_output_is_one_line(melt_file: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "melt_edge", "inspect", str(melt_file)]
        result = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tempfile.gettempdir(), check=False
        )
    assert result.returncode == 1
    assert result.stderr == "error: No space left on device\n"


def test_share_kv_of_a_file_is_the_export_with_share_kv(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """The demo's second model: the same keys and the same bytes as an export of the checkpoint."""
    from melt_edge.export.gguf import export_gguf
    from melt_edge.export.share_kv import share_kv_gguf
    from melt_edge.runtime.gguf_check import check_gguf

    checkpoint = make_checkpoint(tiny_config("ouro"))
    for file_type in ("f32", "q8_0"):
        ouro, expected = tmp_path / f"ouro-{file_type}.gguf", tmp_path / f"expected-{file_type}.gguf"
        export_gguf(checkpoint, ouro, type=file_type, verify=False)
        export_gguf(checkpoint, expected, type=file_type, verify=False, share_kv=True, chunk_size=8)
        shared = share_kv_gguf(ouro, tmp_path / f"shared-{file_type}.gguf", chunk_size=8)
        found, wanted = check_gguf(shared), check_gguf(expected)
        assert dict(found.metadata) == dict(wanted.metadata)
        assert {t.name: t for t in found.tensors}.keys() == {t.name: t for t in wanted.tensors}.keys()
        for tensor in wanted.tensors:
            mine = next(t for t in found.tensors if t.name == tensor.name)
            assert (mine.shape, mine.type, mine.nbytes) == (tensor.shape, tensor.type, tensor.nbytes)
            at, there = found.data_offset + mine.offset, wanted.data_offset + tensor.offset
            a = shared.read_bytes()[at : at + mine.nbytes]
            b = expected.read_bytes()[there : there + tensor.nbytes]
            assert a == b, tensor.name
