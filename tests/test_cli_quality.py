"""`melt-edge perplexity` and `melt-edge kl` in processes of their own: results, settings, errors."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from test_cli import assert_one_line_error, cli
from tiny import CORPUS, tiny_config

MakeGGUF = Callable[..., Path]
SMALL = ("-t", "1", "--ctx", "32")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some hundred tokens of the tiny tokenizer."""
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text(CORPUS, encoding="utf-8")
    return path


def measured(*args: object, stdin: str | None = None) -> dict[str, Any]:
    """What a command prints with --json."""
    result = cli(*args, *SMALL, "--json", stdin=stdin)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def test_perplexity_prints_its_value_and_how_it_was_measured(melt_gguf: Path, text: Path) -> None:
    result = cli("perplexity", melt_gguf, text, *SMALL)
    assert (result.returncode, result.stderr) == (0, "")
    lines = {line[:16].strip(): line[17:].strip() for line in result.stdout.splitlines()}
    assert set(lines) == {"perplexity", "bits per byte", "scored", "model"}
    assert lines["model"] == f"{melt_gguf.name}: melt, f32, 4 loops, chunk 8, cache f16 shared"
    found = measured("perplexity", melt_gguf, text)
    assert lines["perplexity"] == f"{found['perplexity']:.4f} +/- {found['perplexity_error']:.4f}"
    scored, tokens, windows = (found[key] for key in ("tokens_scored", "tokens", "windows"))
    assert lines["scored"] == f"{scored} of {tokens} tokens, in {windows} windows of 32"
    assert scored == 15 * (tokens // 32)
    assert found["perplexity_error"] > 0


def test_perplexity_reads_standard_input_and_counts_control_tokens_as_text(melt_gguf: Path, text: Path) -> None:
    keys = ("perplexity", "bits_per_byte", "tokens")
    from_file, from_pipe = measured("perplexity", melt_gguf, text), measured("perplexity", melt_gguf, "-", stdin=CORPUS)
    assert [from_file[key] for key in keys] == [from_pipe[key] for key in keys]
    chat = "<|im_start|>user\nHello<|im_end|>\n" * 20
    as_text = measured("perplexity", melt_gguf, "-", stdin=chat)
    as_control = measured("perplexity", melt_gguf, "-", "--parse-special", stdin=chat)
    assert as_control["tokens"] < as_text["tokens"] / 2


def test_perplexity_takes_every_setting(ouro_gguf: Path, text: Path) -> None:
    options = ("--loops", "2", "--chunk", "4", "--kv-type", "q8_0", "--share-kv", "--stride", "8")
    found = measured("perplexity", ouro_gguf, text, *options)
    side = found["model"]
    assert side["path"] == str(ouro_gguf)
    assert (side["architecture"], side["share_kv"]) == ("melt", True)
    assert (side["num_loops"], side["chunk_size"], side["kv_type"]) == (2, 4, "q8_0")
    assert (found["n_ctx"], found["stride"]) == (32, 8)
    assert found["tokens_scored"] == 8 * found["windows"]
    assert list(Path(tempfile.gettempdir()).glob(f"melt-edge-*/{ouro_gguf.stem}-shared.gguf")) == []


def test_the_default_window_is_no_longer_than_the_model_knows(make_gguf: MakeGGUF, text: Path) -> None:
    path = make_gguf(tiny_config("ouro", max_position_embeddings=48))
    result = cli("perplexity", path, text, "-t", "1", "--json")
    assert json.loads(result.stdout)["n_ctx"] == 48


def test_kl_of_a_file_with_itself_is_0(melt_gguf: Path, text: Path) -> None:
    found = measured("kl", melt_gguf, melt_gguf, text)
    assert abs(found["kl"]["mean"]) <= 1e-9
    assert abs(found["kl"]["maximum"]) <= 1e-9
    assert (found["same_top"], found["rms_delta_p"], found["ppl_ratio"]) == (1, 0, 1)
    assert found["ppl"] == measured("perplexity", melt_gguf, text)["perplexity"]
    assert found["model"] == found["base"]


@pytest.mark.parametrize(
    ("options", "base_options"),
    [
        (("--kv-type", "q4_0"), ("--base-kv-type", "f32")),
        (("--chunk", "32"), ("--base-chunk", "1")),
        (("--loops", "2"), ("--base-loops", "3")),
    ],
    ids=lambda options: options[0],
)
def test_kl_between_settings_of_one_file(
    melt_gguf: Path, text: Path, options: tuple[str, str], base_options: tuple[str, str]
) -> None:
    found = measured("kl", melt_gguf, melt_gguf, text, *options, *base_options)
    key = {"--kv-type": "kv_type", "--chunk": "chunk_size", "--loops": "num_loops"}[options[0]]
    assert (str(found["model"][key]), str(found["base"][key])) == (options[1], base_options[1])
    assert found["kl"]["mean"] > 1e-6
    assert found["kl"]["median"] <= found["kl"]["p90"] <= found["kl"]["p99"] <= found["kl"]["p99_9"]
    assert found["same_top_interval"][0] <= found["same_top"] <= found["same_top_interval"][1]
    # The same comparison with the sides swapped has the same perplexities, and another divergence.
    swapped = [*base_options, *options]
    swapped[0], swapped[2] = swapped[0].replace("--base-", "--"), swapped[2].replace("--", "--base-")
    other = measured("kl", melt_gguf, melt_gguf, text, *swapped)
    assert (other["ppl"], other["base_ppl"]) == (found["base_ppl"], found["ppl"])
    assert other["kl"]["mean"] != found["kl"]["mean"]


def test_a_shared_cache_shows_only_across_chunks(ouro_gguf: Path, text: Path) -> None:
    """Within one chunk every loop attends to its own rows, so that --share-kv alone measures nothing there."""
    within, across = (
        measured("kl", ouro_gguf, ouro_gguf, text, "--share-kv", "--chunk", chunk)["kl"]["mean"] for chunk in (32, 1)
    )
    assert abs(within) < 1e-6
    assert across > 1e-3


def test_kl_between_files_and_cache_layouts(ouro_gguf: Path, make_gguf: MakeGGUF, text: Path) -> None:
    smaller = make_gguf(tiny_config("ouro"), "q8_0")
    result = cli("kl", smaller, ouro_gguf, text, *SMALL, "--base-share-kv")
    assert (result.returncode, result.stderr) == (0, "")
    assert "nats per token" in result.stdout
    assert f"{smaller.name}: ouro, q8_0, 4 loops, chunk 32, cache f16 per loop" in result.stdout
    assert f"{ouro_gguf.name}: melt, f32, 4 loops, chunk 32, cache f16 shared" in result.stdout


@pytest.mark.parametrize("command", ["perplexity", "kl"])
def test_texts_that_cannot_be_measured(command: str, melt_gguf: Path, tmp_path: Path) -> None:
    files = [melt_gguf] if command == "perplexity" else [melt_gguf, melt_gguf]
    bad = tmp_path / "bad.txt"
    assert_one_line_error(cli(command, *files, bad), 1, str(bad), "cannot be read")
    assert_one_line_error(cli(command, *files, tmp_path), 1, str(tmp_path), "cannot be read")
    bad.write_bytes(b"")
    assert_one_line_error(cli(command, *files, bad), 1, str(bad), "is empty")
    bad.write_bytes(b"caf\xe9 " * 500)
    assert_one_line_error(cli(command, *files, bad), 1, str(bad), "not UTF-8")
    bad.write_text("A short text.")
    assert_one_line_error(cli(command, *files, bad), 1, str(bad), "tokens, expected at least one window of 512")
    assert_one_line_error(cli(command, *files, "-", stdin=""), 1, "standard input: is empty")


def test_windows_that_cannot_be_measured(melt_gguf: Path, make_gguf: MakeGGUF, text: Path) -> None:
    too_long = cli("perplexity", melt_gguf, text, "--ctx", "513")
    assert_one_line_error(too_long, 1, str(melt_gguf), "--ctx is 513", "use --ctx 512 or less")
    short = make_gguf(tiny_config("ouro", max_position_embeddings=48))
    assert_one_line_error(cli("kl", melt_gguf, short, text, "--ctx", "64"), 1, str(short), "trained for 48 tokens")
    assert_one_line_error(cli("perplexity", melt_gguf, text, *SMALL, "--stride", "17"), 1, "expected 1 to 16")
    assert_one_line_error(cli("perplexity", melt_gguf, text, *SMALL, "--chunk", "33"), 1, "chunk_size is 33")
    assert_one_line_error(cli("perplexity", melt_gguf, text, "--ctx", "3"), 2, "--ctx")


def test_models_that_cannot_be_measured(melt_gguf: Path, make_gguf: MakeGGUF, text: Path, tmp_path: Path) -> None:
    missing = tmp_path / "none.gguf"
    assert_one_line_error(cli("perplexity", missing, text), 1, str(missing), "no such file")
    assert_one_line_error(cli("kl", melt_gguf, missing, text), 1, str(missing), "no such file")
    assert_one_line_error(cli("perplexity", melt_gguf, text, *SMALL, "--share-kv"), 1, "expected 'ouro'")
    other = make_gguf(tiny_config("melt", vocab=300))
    result = cli("kl", melt_gguf, other, text, *SMALL)
    assert_one_line_error(result, 1, f"{melt_gguf}: has 301 tokens, {other} has 300", "one vocabulary")


def test_a_token_that_stands_for_another_text_is_named(melt_gguf: Path, text: Path, tmp_path: Path) -> None:
    """Two vocabularies of one size: the second and third letters of a token change places in the file."""
    data = melt_gguf.read_bytes()
    changed = tmp_path / "changed.gguf"
    token = b"<|endoftext|>"
    assert token in data
    changed.write_bytes(data.replace(token, b"<|ednoftext|>", 1))
    result = cli("kl", changed, melt_gguf, text, *SMALL)
    assert_one_line_error(result, 1, "token 0 is '<|ednoftext|>'", "it is '<|endoftext|>'")


def test_a_terminal_sees_the_value_so_far(melt_gguf: Path, text: Path) -> None:
    """On a terminal a bar counts the windows, on standard error, and is gone at the end."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "melt_edge", "perplexity", str(melt_gguf), str(text), *SMALL, "--stride", "1"]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
        cwd=tempfile.gettempdir(),
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    ) as process:
        os.close(theirs)
        shown = b""
        while select.select([ours], [], [], 60)[0]:
            try:
                part = os.read(ours, 65536)
            except OSError:  # Linux: the other side is closed
                break
            if not part:
                break
            shown += part
        os.close(ours)
        assert process.stdout is not None
        printed = process.stdout.read()
    assert process.returncode == 0
    assert b"perplexity " in shown
    assert b"/" in shown
    assert printed.startswith(b"  perplexity ")
