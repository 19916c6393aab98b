"""The shipped models as ONNX folders: the text llama.cpp gives, token by token."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import melt_edge
from melt_edge import Model
from melt_edge.export.from_gguf import checkpoint_from_gguf
from melt_edge.export.onnx import export_onnx
from melt_edge.export.share_kv import share_kv_gguf
from melt_edge.models import __file__ as models_file
from melt_edge.tasks import test_problems as held_out_problems

SHIPPED = sorted(Path(models_file).parent.glob("*.gguf"))
N_PROMPTS, MAX_TOKENS = 200, 32
_MARK = "QUESTION"


@pytest.fixture(
    scope="module",
    params=[(path, shared) for path in SHIPPED for shared in (False, True)],
    ids=lambda p: f"{p[0].stem}{'-shared' * p[1]}",
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Model, Model]]:
    """A shipped model in onnxruntime and in llama.cpp, both in float32; an Ouro also with one row for all loops."""
    path, shared = request.param
    folder = tmp_path_factory.mktemp("shipped")
    checkpoint = checkpoint_from_gguf(path, folder / "checkpoint")
    if shared:
        with melt_edge.load(path, n_threads=1, n_ctx=8) as model:
            if model.info.architecture != "ouro":
                pytest.skip("shares its rows as it is")
        path = share_kv_gguf(path, folder / "shared.gguf")
    export_onnx(checkpoint, folder / "onnx", share_kv=shared, n_ctx=512, verify=False)
    with (
        melt_edge.load(folder / "onnx", n_threads=1) as here,
        melt_edge.load(path, n_threads=1, n_ctx=512, kv_type="f32") as there,
    ):
        yield here, there


def prompts(model: Model) -> list[str]:
    """Sums and the several-step tasks' problems, in the model's own chat template."""
    rng = random.Random(0)
    questions = [
        f"What is {rng.randint(1, 99)} {rng.choice('+-*')} {rng.randint(1, 99)}?" for _ in range(N_PROMPTS // 2)
    ]
    questions += [problem.question for problem in held_out_problems("all", 0, N_PROMPTS - len(questions), "test")]
    frame = model.render_chat([{"role": "user", "content": _MARK}])
    return [frame.replace(_MARK, question) for question in questions]


@pytest.mark.slow
def test_greedy_text_over_200_prompts(pair: tuple[Model, Model]) -> None:
    here, there = pair
    texts = prompts(there)
    assert len(texts) == N_PROMPTS
    options = {"temperature": 0.0, "repeat_penalty": 1.0, "max_tokens": MAX_TOKENS}
    found = [here.generate(text, **options).tokens for text in texts]
    expected = [there.generate(text, **options).tokens for text in texts]
    assert found == expected
    assert len({tuple(tokens) for tokens in expected}) > 20  # answers, not one sentence for all


def test_other_loops_give_other_text(pair: tuple[Model, Model], tmp_path: Path) -> None:
    """The twin of the test above: it can fail."""
    here, _ = pair
    options = {"temperature": 0.0, "repeat_penalty": 1.0, "max_tokens": MAX_TOKENS}
    with melt_edge.load(here.info.path, n_threads=1, loops=1) as other:
        texts = prompts(here)[:20]
        assert [here.generate(t, **options).tokens for t in texts] != [
            other.generate(t, **options).tokens for t in texts
        ]
