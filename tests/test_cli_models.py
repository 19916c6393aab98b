"""The commands that load a model: run, chat, serve, quantize and the demo, in processes of their own."""

from __future__ import annotations

import gc
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import melt_edge
from melt_edge.cli.chat import Conversation
from melt_edge.runtime.sampling import ChainSampler
from test_cli import assert_one_line_error, cli
from tiny import tiny_config

MakeGGUF = Callable[..., Path]
COMMAND = [sys.executable, "-m", "melt_edge"]
# A second thread of so small a model only waits for the first, for long where the machine is busy.
ONE = ("-t", "1")
# It never lets the model end, so that an answer lasts until somebody stops it.
ENDLESS = 'root ::= "a" root | "b" root\n'


@pytest.fixture(scope="module")
def long_melt(make_gguf: MakeGGUF) -> Path:
    """A MELT with room for an answer of minutes."""
    return make_gguf(tiny_config("melt", max_position_embeddings=200_000))


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    path = tmp_path / "endless.gbnf"
    path.write_text(ENDLESS)
    return path


def test_run_streams_text_and_closes_with_speed_and_memory(melt_gguf: Path) -> None:
    result = cli("run", melt_gguf, *ONE, "-p", "What is 12 + 30?", "-n", "12", "--seed", "1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("\n")
    assert re.search(r"^Prompt: \d+ tokens, [\d.]+ tokens-per-sec$", result.stderr, re.M)
    assert re.search(r"^Generation: \d+ tokens, [\d.]+ tokens-per-sec$", result.stderr, re.M)
    assert re.search(r"^Peak memory: [\d.]+ GB$", result.stderr, re.M)
    assert re.search(r"^KV cache: 256 KiB for 512 tokens \(melt, 4 loops, f16\)$", result.stderr, re.M)


def test_run_json_is_one_object_and_follows_the_seed(melt_gguf: Path) -> None:
    args = ("run", melt_gguf, *ONE, "-p", "Hello", "-n", "10", "--seed", "3", "--json")
    first, second = cli(*args), cli(*args)
    found = json.loads(first.stdout)
    assert found["tokens"] == json.loads(second.stdout)["tokens"]
    assert 1 <= len(found["tokens"]) <= 10
    assert found["finish_reason"] in ("stop", "length")
    assert found["memory"]["kv_bytes"] == 512 * 512
    assert found["model"]["num_loops"] == 4
    assert first.stderr == ""


def test_run_takes_the_prompt_from_option_pipe_or_file(melt_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("one two three")
    common = ("run", melt_gguf, *ONE, "-n", "6", "--temp", "0", "--json")
    results = (
        cli(*common, "-p", "one two three"),
        cli(*common, "-p", "-", stdin="one two three"),
        cli(*common, stdin="one two three"),
        cli(*common, "--file", tmp_path / "prompt.txt"),
    )
    texts = {json.loads(result.stdout)["text"] for result in results}
    assert len(texts) == 1
    raw = json.loads(cli(*common, "-p", "one two three", "--raw").stdout)
    templated = json.loads(results[0].stdout)
    assert raw["timings"]["prompt_tokens"] < templated["timings"]["prompt_tokens"]


def test_run_loops_and_cache_type_reach_the_library(ouro_gguf: Path) -> None:
    found = json.loads(
        cli("run", ouro_gguf, *ONE, "-p", "x", "-n", "2", "--loops", "2", "--kv-type", "f32", "--json").stdout
    )
    # 2 loops x 2 layers x K and V x 2 heads x 32 values x 4 bytes x 512 tokens
    assert found["memory"]["kv_bytes"] == 2 * 2 * 2 * 2 * 32 * 4 * 512
    assert found["model"]["num_loops"] == 2


def test_run_follows_a_grammar_and_a_schema(melt_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "yes.gbnf").write_text('root ::= "yes" | "no"\n')
    result = cli("run", melt_gguf, *ONE, "-p", "x", "--grammar", tmp_path / "yes.gbnf", "--json")
    assert json.loads(result.stdout)["text"] in ("yes", "no")
    (tmp_path / "schema.json").write_text(
        '{"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}'
    )
    result = cli("run", melt_gguf, *ONE, "-p", "x", "--json-schema", tmp_path / "schema.json", "--json")
    assert isinstance(json.loads(json.loads(result.stdout)["text"])["a"], bool)


def test_run_continues_a_saved_state(ouro_gguf: Path, tmp_path: Path) -> None:
    """Two commands with a state between them give what one gives: an Ouro does not depend on the cuts."""
    state = tmp_path / "state"
    whole = json.loads(cli("run", ouro_gguf, *ONE, "--raw", "-p", "abc def", "-n", "1", "--temp", "0", "--json").stdout)
    first = cli("run", ouro_gguf, *ONE, "--raw", "-p", "abc", "-n", "1", "--temp", "0", "--save-state", state)
    assert first.returncode == 0, first.stderr
    rest = cli("run", ouro_gguf, *ONE, "--load-state", state, "-p", " def", "-n", "1", "--temp", "0", "--json")
    assert json.loads(rest.stdout)["tokens"] == whole["tokens"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["-c", "4"], "context"),
        (["--raw", "--system", "x"], "--raw"),
        (["--grammar", "/nowhere"], "/nowhere"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_run_refuses_in_one_line(melt_gguf: Path, args: list[str], said: str) -> None:
    assert_one_line_error(cli("run", melt_gguf, *ONE, "-p", "What is 12 + 30?", *args), 1, said)


def test_run_stops_at_ctrl_c_without_a_traceback(long_melt: Path, endless: Path) -> None:
    args = ["run", str(long_melt), *ONE, "-p", "x", "--grammar", str(endless), "-c", "100000", "-n", "90000"]
    process = subprocess.Popen(
        [*COMMAND, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tempfile.gettempdir()
    )
    assert process.stdout is not None
    assert process.stdout.read(1) in "ab"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr


def test_run_survives_a_closed_pipe(long_melt: Path, endless: Path) -> None:
    args = ["run", str(long_melt), *ONE, "-p", "x", "--grammar", str(endless), "-c", "100000", "-n", "90000"]
    process = subprocess.Popen(
        [*COMMAND, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tempfile.gettempdir()
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == ""
    process.stderr.close()


def test_quantize(melt_gguf: Path, make_gguf: MakeGGUF, tmp_path: Path) -> None:
    small = tmp_path / "small.gguf"
    result = cli("quantize", melt_gguf, small, "Q8_0")
    assert result.returncode == 0, result.stderr
    assert small.stat().st_size < melt_gguf.stat().st_size / 2
    assert_one_line_error(cli("quantize", melt_gguf, small, "q8_0"), 1, "--force")
    found = json.loads(cli("run", small, *ONE, "-p", "x", "-n", "2", "--json").stdout)
    assert found["model"]["quantisation"].lower() == "q8_0"


def test_chat_answers_each_line_of_a_pipe(melt_gguf: Path) -> None:
    """Each question is one line, commands are not answered, and what follows /exit is not read."""
    questions = "Hello\n\n/help\n/nonsense\n/reset\nHello\n/exit\nnever\n"
    result = cli("chat", melt_gguf, *ONE, "-n", "5", "--temp", "0", stdin=questions)
    once = cli("chat", melt_gguf, *ONE, "-n", "5", "--temp", "0", stdin="Hello\n")
    assert (result.returncode, once.returncode) == (0, 0)
    assert result.stdout == 2 * once.stdout
    assert "/reset" in result.stderr
    assert "no command /nonsense" in result.stderr


def test_an_answer_left_half_way_leaves_nothing_behind(melt_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a piece is printed: the stream's sampler is gone, and the next question is answered."""
    samplers: list[weakref.ref[ChainSampler]] = []

    class Watched(ChainSampler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            samplers.append(weakref.ref(self))

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("melt_edge.runtime.vocab.ChainSampler", Watched)
    with melt_edge.load(melt_gguf, n_threads=1) as model:
        conversation = Conversation(None)
        with monkeypatch.context() as patch:
            patch.setattr("melt_edge.cli.generation.write_text", interrupt)
            conversation.ask(model, "Hello", {"max_tokens": 20, "seed": 1})
        gc.collect()
        assert samplers
        assert not any(sampler() for sampler in samplers)
        assert len(conversation.turns) == 2  # what had been written is kept
        conversation.ask(model, "Go on", {"max_tokens": 5, "seed": 1})
        assert len(conversation.turns) == 4


def test_chat_on_a_terminal(long_melt: Path) -> None:
    """Ctrl-C stops an answer and comes back to the prompt; Ctrl-D leaves with 0."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "chat", str(long_melt), *ONE, "-c", "50000", "-n", "40000", "--temp", "0"],
        stdin=child,
        stdout=child,
        stderr=child,
        cwd=tempfile.gettempdir(),
        start_new_session=True,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(child)
    try:
        _read_until(parent, b">>> ")
        os.write(parent, b"Hello\n")
        _read_until(parent, b"\n")  # the terminal's echo
        assert len(os.read(parent, 1)) == 1  # the answer has begun
        process.send_signal(signal.SIGINT)  # what the terminal sends for Ctrl-C, to this session
        _read_until(parent, b">>> ")
        os.write(parent, b"/info\n")
        assert b"4 loops" in _read_until(parent, b">>> ")
        os.write(parent, b"\x04")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(parent)


def _read_until(descriptor: int, wanted: bytes, seconds: float = 30.0) -> bytes:
    seen, start = b"", time.monotonic()
    while wanted not in seen:
        assert time.monotonic() - start < seconds, seen[-500:]
        if select.select([descriptor], [], [], 0.1)[0]:
            seen += os.read(descriptor, 4096)
    assert b"Traceback" not in seen
    return seen


@pytest.fixture
def server(melt_gguf: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [*COMMAND, "serve", str(melt_gguf), *ONE, "--port", "0", "--alias", "tiny"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=tempfile.gettempdir(),
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+/v1", line)
        assert address is not None, line + process.stderr.read()
        yield process, address.group()
    finally:
        process.kill()
        process.communicate()


def _post(url: str, body: dict[str, Any]) -> str:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return str(reply.read().decode())


def test_serve_speaks_openai_and_stops_at_ctrl_c(server: tuple[subprocess.Popen[str], str]) -> None:
    process, address = server
    with urllib.request.urlopen(address + "/models", timeout=60) as reply:
        assert [model["id"] for model in json.load(reply)["data"]] == ["tiny"]
    # letters alone: the bindings go on beyond max_tokens to the end of a UTF-8 character
    letters = {"max_tokens": 8, "seed": 1, "grammar": "root ::= [a-z]{200}"}
    question = {"messages": [{"role": "user", "content": "What is 2 + 3?"}], **letters}
    answer = json.loads(_post(address + "/chat/completions", question))
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["completion_tokens"] == 8
    events = _post(address + "/chat/completions", {**question, "stream": True}).split("\n")
    chunks = [json.loads(line[6:]) for line in events if line.startswith("data: {")]
    streamed = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert streamed == answer["choices"][0]["message"]["content"]
    assert "data: [DONE]" in events
    completion = json.loads(_post(address + "/completions", {"prompt": "abc", "max_tokens": 4}))
    assert isinstance(completion["choices"][0]["text"], str)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/completions", {"grammar": "root ::= " + "(" * 20_000}, "1024 parentheses"),
        ("/v1/completions", {"grammar": "root ::= (", "stream": True}, "cannot be parsed"),
        ("/v1/completions", {"grammar": 'root ::= "a"{5,2}'}, "smaller number"),
        ("/v1/completions", {"logit_bias": {"999999": 1}}, "an id from 0 to 300"),
        ("/v1/completions", {"logit_bias": {"5": float("nan")}}, "within 1e"),
        ("/v1/completions", {"repeat_penalty": 0}, "from 0.01"),
        ("/v1/completions", {"temperature": float("nan")}, "expected a number"),
        ("/v1/completions", {"seed": -1}, "seed is -1"),
        ("/v1/completions", {"top_k": 2**40}, "top_k is"),
        ("/v1/completions", {"max_tokens": -1}, "max_tokens"),
        ("/v1/chat/completions", {"messages": [], "grammar": "root ::= root"}, "left-recursive"),
        ("/extras/detokenize", {"tokens": [10**9]}, "not in the vocabulary"),
    ],
    ids=str,
)
def test_serve_refuses_what_would_end_it(
    server: tuple[subprocess.Popen[str], str], path: str, body: dict[str, object], message: str
) -> None:
    """Most of these ended the server, as a foreign token did in /extras/detokenize."""
    process, address = server
    with pytest.raises(urllib.error.HTTPError) as error:
        _post(address.removesuffix("/v1") + path, {"prompt": "hi", **body})
    assert error.value.code in (400, 422)
    assert message in error.value.read().decode()
    assert process.poll() is None


def test_serve_goes_on_after_a_grammar_without_a_token(server: tuple[subprocess.Popen[str], str]) -> None:
    process, address = server
    with pytest.raises(urllib.error.HTTPError) as error:
        _post(address + "/completions", {"prompt": "hi", "grammar": "root ::= <[300000]>"})
    assert b"allows no token" in error.value.read()
    assert "choices" in _post(address + "/completions", {"prompt": "hi", "max_tokens": 2})
    assert process.poll() is None


def test_serve_says_when_the_port_is_taken(melt_gguf: Path, server: tuple[subprocess.Popen[str], str]) -> None:
    port = server[1].rsplit(":", 1)[1].removesuffix("/v1")
    assert_one_line_error(cli("serve", melt_gguf, "--port", port), 1, port, "--port")


def test_demo_answers_with_both_caches() -> None:
    start = time.monotonic()
    result = cli("demo", "-q", "24+18=")
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - start < 30
    assert result.stdout.count("24+18=42.") == 2
    assert "4 times less cache" in result.stdout
    assert "\x1b" not in result.stdout
    assert max(len(line) for line in result.stdout.splitlines()) <= 80
    sizes = [int(size.replace(",", "")) for size in re.findall(r"(\d[\d,]{5,})", result.stdout)]
    assert sizes[-2] == 4 * sizes[-1]


def test_shipped_model_runs_by_name() -> None:
    found = json.loads(cli("run", "melt-tiny", *ONE, "-p", "What is 2 + 3?", "--temp", "0", "--json").stdout)
    assert "5" in found["text"]
    assert json.loads(cli("inspect", "melt-tiny", "--json").stdout)["kv_cache"]["shared_between_loops"] is True
    assert json.loads(cli("inspect", "ouro-tiny", "--json").stdout)["kv_cache"]["shared_between_loops"] is False
