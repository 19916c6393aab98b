"""The web page in a headless Chromium: the same tokens as the Python backends, and a true account of the cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

import melt_edge
from melt_edge.checkpoint import load_model
from melt_edge.export.from_gguf import checkpoint_from_gguf
from melt_edge.export.onnx import export_onnx
from melt_edge.models import SHIPPED_MODEL, SHIPPED_TEACHER, shipped_model_path
from melt_edge.models.demo_questions import DEMO_QUESTIONS
from melt_edge.runtime.gguf_check import check_gguf, config_from_gguf
from melt_edge.tasks.greedy import greedy
from tiny import CHAT_TEMPLATE, tiny_config

WEB = Path(__file__).parent.parent / "examples" / "web"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
MISSING = [
    what
    for what, there in (
        ("node", shutil.which("node")),
        ("Chromium (or CHROMIUM=program)", os.environ.get("CHROMIUM") or any(map(shutil.which, BROWSERS))),
        ("examples/web/node_modules (make web)", (WEB / "node_modules" / "playwright-core").is_dir()),
    )
    if not there
]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"the web page was not tested: no {', no '.join(MISSING)}")
TEXTS = ["What is 12 plus 30?", "<|im_start|>user\nA1b2  c<|im_end|>\n", "über\t  \n\n123'll don't", "日本語 🙂"]
N_CTX = 256
MAX_TOKENS = 128  # the page's


def check_page(folder: Path, asked: list[dict[str, Any]], texts: list[str] | None = None) -> dict[str, Any]:
    """What the page showed for these questions."""
    subprocess.run(["node", "vendor.mjs"], cwd=WEB, check=True, capture_output=True)
    arguments = ["--model", str(folder), "--ask", json.dumps(asked), "--tokenize", json.dumps(texts or [])]
    command = ["node", "check.mjs", *arguments]
    done = subprocess.run(command, cwd=WEB, capture_output=True, text=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["problems"] == []
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [SHIPPED_TEACHER, SHIPPED_MODEL])
def test_the_shipped_model_answers_as_in_python(name: str, tmp_path: Path) -> None:
    gguf = shipped_model_path(name)
    folder = tmp_path / "model"
    export_onnx(checkpoint_from_gguf(gguf, tmp_path / "checkpoint"), folder, n_ctx=N_CTX, verify=False)
    asked = [{"question": question, "loops": 4} for question in DEMO_QUESTIONS]
    asked += [{"question": question, "loops": loops} for loops in (1, 2, 7) for question in list(DEMO_QUESTIONS)[:2]]
    found = check_page(folder, asked, TEXTS)
    for loops in (1, 2, 4, 7):
        with melt_edge.load(folder, n_threads=1, loops=loops) as model:
            for given, answer in zip(asked, found["answers"], strict=True):
                if given["loops"] == loops:
                    options = {"temperature": 0.0, "repeat_penalty": 1.0, "max_tokens": MAX_TOKENS}
                    expected = model.chat([{"role": "user", "content": given["question"]}], **options)
                    assert (answer["tokens"], answer["text"]) == (expected.tokens, expected.text), given
                    assert answer["loops"] == loops
                    model.reset()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert [tokens["ids"] for tokens in found["tokens"]] == [tokenizer.encode(text).ids for text in TEXTS]

    config = config_from_gguf(check_gguf(gguf))
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    own, other = ("perLoop", "shared") if name == SHIPPED_TEACHER else ("shared", "perLoop")
    for given, answer in zip(asked, found["answers"], strict=True):
        assert (answer[own]["kind"], answer[other]["kind"]) == ("measured", "computed")
        assert int(answer["shared"]["bytes"]) == row * N_CTX
        assert int(answer["perLoop"]["bytes"]) == row * N_CTX * given["loops"]


@pytest.mark.slow
@pytest.mark.parametrize("init", ["zeros", "input"])
def test_the_gate_is_computed_as_in_the_reference(make_checkpoint, init: str, tmp_path: Path) -> None:
    """Random weights, and a prompt of several chunks; the twin is another number of loops."""
    config = tiny_config("melt", kv_gate_init=init)
    checkpoint = make_checkpoint(config)
    export_onnx(checkpoint, tmp_path / "model", n_ctx=N_CTX, verify=False)
    question = "How many?"
    found = check_page(tmp_path / "model", [{"question": question, "loops": 4}, {"question": question, "loops": 3}])
    system = "<|im_start|>system\nYou are a careful assistant<|im_end|>\n"
    assert "You are a careful assistant" in CHAT_TEMPLATE
    prompt = f"{system}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    ids = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(prompt).ids
    room = min(MAX_TOKENS, N_CTX - len(ids))
    ((_, expected),) = greedy(load_model(checkpoint), [ids], end_tokens={2}, max_tokens=room)
    assert found["answers"][0]["tokens"] == expected
    assert found["answers"][1]["tokens"] != expected


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    export_onnx(checkpoint_from_gguf(shipped_model_path(), tmp_path / "c"), folder, n_ctx=64, verify=False)
    weights = bytearray((folder / "weights.bin").read_bytes())
    weights[1000] ^= 1
    (folder / "weights.bin").write_bytes(weights)
    assert "weights.bin is not the file that the manifest describes" in check_page(folder, [])["status"]
