"""ONNX folders on the command line: wherever a model file goes, or a sentence that says why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from test_cli import assert_one_line_error, cli
from tiny import CORPUS, tiny_config

ONE = ("-t", "1")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text(CORPUS, encoding="utf-8")
    return path


def printed(*args: object) -> dict[str, Any]:
    result = cli(*args, "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def test_run_and_chat_answer_as_with_a_file(melt_onnx: Path, melt_gguf: Path, tmp_path: Path) -> None:
    options = (*ONE, "-p", "Hello", "-n", "10", "--seed", "3")
    here = printed("run", melt_onnx, *options, "--save-state", tmp_path / "a.state")
    there = printed("run", melt_gguf, *options, "--kv-type", "f32")
    assert (here["text"], here["tokens"]) == (there["text"], there["tokens"])
    assert here["model"]["quantisation"] == "fp32"
    assert here["timings"]["decode_overhead"] > 0.0
    assert there["timings"]["decode_overhead"] is None
    assert printed("run", melt_onnx, *options, "--load-state", tmp_path / "a.state")["tokens"]
    early = printed("run", melt_onnx, *options, "--exit-threshold", "0.3", "--provider", "cpu", "--loops", "8")
    assert early["tokens"] != here["tokens"]
    chats = [
        cli("chat", model, *ONE, "-n", "6", "--seed", "1", *more, stdin="Hi\n").stdout
        for model, *more in ((melt_onnx,), (melt_gguf, "--kv-type", "f32"))
    ]
    assert chats[0] == chats[1] != ""


def test_quality_commands_compare_both_backends(melt_onnx: Path, melt_gguf: Path, text: Path) -> None:
    found = printed("kl", melt_onnx, melt_gguf, text, *ONE, "--ctx", "32", "--base-kv-type", "f32")
    assert abs(found["kl"]["mean"]) < 1e-8
    assert found["model"]["kv_type"] == found["base"]["kv_type"] == "f32"
    assert printed("perplexity", melt_onnx, text, *ONE)["n_ctx"] == 128
    assert_one_line_error(cli("perplexity", melt_onnx, text, "--ctx", "200"), 1, "was exported for 128 tokens")
    assert_one_line_error(cli("perplexity", melt_onnx, text, "--share-kv"), 1, "--share-kv rewrites a GGUF file")


def test_eval_takes_a_folder(melt_onnx: Path, melt_gguf: Path, melt_checkpoint: Path) -> None:
    options = ("--task", "chain", "-n", "8")
    here, there = printed("eval", melt_onnx, *options), printed("eval", melt_gguf, *options)
    assert {**here, "model": "", "seconds": 0} == {**there, "model": "", "seconds": 0}
    assert printed("eval", melt_onnx, *options, "--exit-threshold", "0.5")["n"] == 8
    assert_one_line_error(
        cli("eval", melt_checkpoint, *options, "--exit-threshold", "0.5"),
        1,
        "--exit-threshold ends the loops of an ONNX",
    )


def test_compare_measures_both_backends(make_onnx: Callable[..., Path], make_gguf: Callable[..., Path]) -> None:
    config = tiny_config("melt")
    command = ("compare", make_onnx(config), make_gguf(config), *ONE, "--ctx", "64", "--n-decode", "8")
    rows = printed(*command, "--kv-type", "f16,f32", "--loops", "2")["rows"]
    found = [(row["backend"], row["kv_type"], row["status"]) for row in rows]
    assert found == [
        ("onnx", "f32", "measured"),
        ("llama", "f16", "measured"),
        ("llama", "f32", "measured"),
    ]
    assert rows[0]["kv_bytes"] == 64 * 1024  # as many cells as asked for; llama.cpp's come in steps of 256
    assert 0.0 < rows[0]["decode_overhead"] < 1.0
    assert rows[1]["decode_overhead"] is None
    assert [row["backend"] for row in printed(*command, "--backend", "onnx")["rows"]] == ["onnx"]
    assert_one_line_error(cli("compare", make_gguf(config), "--backend", "onnx"), 1, "no model here runs on it")


def test_inspect_shows_a_folder(melt_onnx: Path) -> None:
    result = cli("inspect", melt_onnx, "--tensors")
    assert result.returncode == 0, result.stderr
    assert "ONNX folder" in result.stdout
    assert "KV cache f32   1 KiB per token, 128 KiB at 128 tokens" in result.stdout
    assert "lm_head.weight" in result.stdout
    assert printed("inspect", melt_onnx)["kind"] == "onnx"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("serve", "FOLDER"), "is an ONNX folder, which serve cannot run"),
        (("quantize", "FOLDER", "out.gguf", "q8_0"), "is an ONNX folder, this command takes a .gguf file"),
        (("run", "FOLDER", "-p", "x", "--provider", "cuda"), "the installed onnxruntime has cpu"),
    ],
)
def test_what_a_folder_cannot_do_is_told(melt_onnx: Path, command: tuple[str, ...], message: str) -> None:
    result = cli(*(melt_onnx if part == "FOLDER" else part for part in command))
    assert_one_line_error(result, 1, message)
