"""examples/onnx_minimal.py: short, free of melt_edge, and right."""

from __future__ import annotations

import subprocess
import sys
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest

from melt_edge.checkpoint import load_model
from melt_edge.export.from_gguf import checkpoint_from_gguf
from melt_edge.export.onnx import export_onnx
from melt_edge.models import shipped_model_path
from melt_edge.tasks.greedy import greedy
from parity.reference import random_tokens
from tiny import tiny_config

EXAMPLE = Path(__file__).parent.parent / "examples" / "onnx_minimal.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = util.spec_from_file_location("onnx_minimal", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_short_and_needs_no_melt_edge() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80
    assert "import melt_edge" not in text
    assert "from melt_edge" not in text


@pytest.mark.parametrize("loops", [1, 4, 6])
@pytest.mark.parametrize(
    "config",
    [
        tiny_config("ouro"),
        tiny_config("melt", kv_gate="none"),
        tiny_config("melt"),
        tiny_config("melt", kv_gate_init="input"),
    ],
    ids=["ouro", "none", "zeros", "input"],
)
def test_greedy_tokens_are_the_references(example, make_checkpoint, tmp_path, config, loops: int) -> None:
    checkpoint = make_checkpoint(config)
    export_onnx(checkpoint, tmp_path / "model", n_ctx=64, verify=False)
    prompt = random_tokens(19, config.vocab_size)
    model = load_model(checkpoint)
    model.config = model.config.with_loops(loops)
    ((_, expected),) = greedy(model, [prompt], end_tokens={2}, max_tokens=40)
    assert list(example.greedy(example.LoopModel(tmp_path / "model", loops), prompt, 40)) == expected
    model.config = model.config.with_loops(loops + 1)
    ((_, other),) = greedy(model, [prompt], end_tokens={2}, max_tokens=40)
    assert other != expected  # so this test can fail


def test_it_runs_as_a_command(tmp_path) -> None:
    export_onnx(checkpoint_from_gguf(shipped_model_path(), tmp_path / "c"), tmp_path / "model", n_ctx=64, verify=False)
    prompt = "<|im_start|>user\n24+18=<|im_end|>\n<|im_start|>assistant\n"
    done = subprocess.run([sys.executable, EXAMPLE, tmp_path / "model", prompt], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "24+18=42.\n"), done.stderr
