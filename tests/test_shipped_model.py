"""The models that come with melt-edge: same text as the reference, right answers, reproducible making."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader

import melt_edge
from melt_edge.checkpoint import load_model
from melt_edge.errors import ConfigError
from melt_edge.export.quantize import quantize_gguf
from melt_edge.modeling import LoopLM
from melt_edge.models import SHIPPED_MODEL, SHIPPED_TEACHER, shipped_model_path
from melt_edge.models.demo_questions import DEMO_QUESTIONS
from melt_edge.names import checkpoint_name
from melt_edge.runtime.gguf_check import check_gguf, config_from_gguf
from melt_edge.tasks import test_problems as held_out_tasks
from melt_edge.tasks import training_problem as training_task
from melt_edge.tasks.evaluate import evaluate, total
from melt_edge.tasks.solvers import FileSolver
from parity.reference import kl_divergence

EXAMPLE = Path(__file__).parent.parent / "examples" / "train_tiny"
MAX_TOKENS = 48
SUMS_FLOOR = 0.93


@pytest.fixture(scope="module", autouse=True)
def _example_on_path() -> Iterator[None]:
    """The example's modules import each other by name, as scripts of one folder do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a tiny model: a second thread only waits
    sys.path.insert(0, str(EXAMPLE))
    yield
    sys.path.remove(str(EXAMPLE))
    torch.set_num_threads(threads)


@pytest.fixture(params=[SHIPPED_TEACHER, SHIPPED_MODEL])
def shipped(request: pytest.FixtureRequest) -> Path:
    """The two shipped files: the Ouro, and the MELT distilled from it."""
    return shipped_model_path(request.param)


def reference(path: Path) -> LoopLM:
    """The reference model with the weights of a GGUF file in float32 or float16."""
    model = LoopLM(config_from_gguf(check_gguf(path)))
    weights = {}
    for tensor in GGUFReader(path).tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        weights[checkpoint_name(tensor.name)] = torch.tensor(tensor.data).float().reshape(shape)
    model.load_state_dict(weights)
    return model.eval()


def test_package_data_is_small_and_found() -> None:
    folder = shipped_model_path().parent
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 12_000_000
    with pytest.raises(ConfigError, match=r"'../melt-tiny' is not a shipped model, expected one of: melt-tiny, ouro"):
        shipped_model_path("../melt-tiny")


def test_one_is_a_melt_of_the_other() -> None:
    ouro, melt = (config_from_gguf(check_gguf(shipped_model_path(n))) for n in (SHIPPED_TEACHER, SHIPPED_MODEL))
    assert (ouro.model_type, melt.model_type, melt.kv_gate) == ("ouro", "melt", "elementwise")
    assert ouro.share_kv(melt.chunk_size) == replace(melt, kv_gate="none")
    with (
        melt_edge.load(shipped_model_path(SHIPPED_TEACHER), n_threads=1) as teacher,
        melt_edge.load(shipped_model_path(SHIPPED_MODEL), n_threads=1) as student,
    ):
        assert teacher.memory().kv_bytes == 4 * student.memory().kv_bytes


@pytest.mark.parametrize("name", [SHIPPED_TEACHER, SHIPPED_MODEL])
def test_checkpoint_beside_the_file_holds_its_weights(name: str) -> None:
    """In float32; the student's file rounds its matrices to float16."""
    file = shipped_model_path(name)
    model, other = load_model(file.parent / name), reference(file)
    assert model.config == replace(other.config, torch_dtype=model.config.torch_dtype)
    for key, value in model.state_dict().items():
        is_rounded = name == SHIPPED_MODEL and value.dim() == 2 and "early_exit" not in key
        assert torch.equal(value.half().float() if is_rounded else value, other.state_dict()[key]), key


def test_greedy_text_is_the_references_token_by_token(shipped: Path) -> None:
    from bpe import prompt_text
    from problems import held_out_problems
    from scoring import greedy

    prompts = [prompt_text(p.question) for p in held_out_problems(seed=1, count=200)]
    with melt_edge.load(shipped, kv_type="f32", n_ctx=512, n_threads=1) as model:
        ids = [model.tokenize(prompt) for prompt in prompts]
        expected = greedy(reference(shipped), ids, MAX_TOKENS)
        found = [model.generate(i, temperature=0.0, repeat_penalty=1.0, max_tokens=MAX_TOKENS).tokens for i in ids]
    assert found == expected
    assert len({tuple(tokens) for tokens in expected}) > 150  # answers, not one sentence for all


def test_a_changed_weight_changes_the_text() -> None:
    """The twin of the test above: it can fail."""
    from bpe import prompt_text
    from scoring import greedy

    with melt_edge.load(shipped_model_path(SHIPPED_TEACHER), kv_type="f32", n_ctx=512, n_threads=1) as model:
        prompt = model.tokenize(prompt_text("What is 33 - 14?"))
        found = model.generate(prompt, temperature=0.0, repeat_penalty=1.0, max_tokens=MAX_TOKENS).tokens
    other = reference(shipped_model_path(SHIPPED_TEACHER))
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(-1.0)
    assert greedy(other, [prompt], MAX_TOKENS) != [found]


def test_demo_questions_are_held_out_and_answered(shipped: Path) -> None:
    from random import Random

    from problems import training_problem

    rng = Random(0)
    trained = {training_problem(rng).question for _ in range(20000)}
    assert not trained & set(DEMO_QUESTIONS)
    with melt_edge.load(shipped, n_ctx=512, n_threads=1) as model:
        for question, answer in DEMO_QUESTIONS.items():
            model.reset()
            told = model.chat([{"role": "user", "content": question}], temperature=0.0, max_tokens=MAX_TOKENS)
            assert told.text.strip() == answer
            assert told.finish_reason == "stop"


# Mean KL divergence from the float32 file over the demo's questions and answers, in nats: two to three times the
# larger of the two models' (f16 4.8e-7, q8_0 3.2e-4, q4_0 5.0e-2).
KL_LIMITS = {"f16": 1.5e-6, "q8_0": 1e-3, "q4_0": 0.1}


@pytest.mark.parametrize("file_type", KL_LIMITS)
def test_smaller_files_stay_close(shipped: Path, tmp_path: Path, file_type: str) -> None:
    """What a file type costs a trained model, with a row per loop and with one for all."""

    def logits(path: Path) -> np.ndarray:
        with melt_edge.load(path, n_threads=1, kv_type="f32", chunk_size=1) as model:
            texts = [
                model.render_chat([{"role": "user", "content": question}]) + answer + "<|im_end|>"
                for question, answer in DEMO_QUESTIONS.items()
            ]
            return np.concatenate([model.logits(model.tokenize(text)) for text in texts])

    if file_type == "f16" and shipped.stem == SHIPPED_MODEL:
        pytest.skip("is float16 already")
    smaller = quantize_gguf(shipped, tmp_path / "smaller.gguf", file_type)
    assert 0 < kl_divergence(logits(smaller), logits(shipped)) < KL_LIMITS[file_type]


def test_accuracy_on_held_out_sums(shipped: Path) -> None:
    """A floor below what the card says; 140 other problems."""
    from problems import held_out_problems, is_correct

    problems = held_out_problems(seed=2, count=140)
    right = 0
    with melt_edge.load(shipped, n_ctx=512, n_threads=1) as model:
        for problem in problems:
            model.reset()
            messages = [{"role": "user", "content": problem.question}]
            right += is_correct(problem, model.chat(messages, temperature=0.0, max_tokens=MAX_TOKENS).text)
    assert right / len(problems) >= SUMS_FLOOR


def test_loops_matter_and_melt_keeps_what_they_are_worth() -> None:
    """The card's claims on 440 other problems: wider margins than the card's 5000 need."""
    problems = held_out_tasks("all", seed=1, count=440, max_steps=4)
    shares = {}
    for name, loops in ((SHIPPED_TEACHER, 1), (SHIPPED_TEACHER, 4), (SHIPPED_MODEL, 4)):
        with FileSolver(shipped_model_path(name), loops=loops, chunk=1, threads=1) as solver:
            shares[name, loops] = total(evaluate(solver, problems)).share
    assert shares[SHIPPED_TEACHER, 4] > shares[SHIPPED_TEACHER, 1] + 0.12
    assert shares[SHIPPED_MODEL, 4] > shares[SHIPPED_TEACHER, 4] - 0.03


def test_exit_gate_is_trained() -> None:
    """No loop is never or always left at, and the gate tells tokens and loops apart."""
    from bpe import prompt_text

    model = reference(shipped_model_path(SHIPPED_TEACHER))
    with melt_edge.load(shipped_model_path(SHIPPED_TEACHER), n_ctx=512, n_threads=1) as runtime:
        tokens = torch.tensor([runtime.tokenize(prompt_text(q) + a) for q, a in [("6 * 7 = ?", "6*7=42.")]])
    with torch.no_grad():
        probs = model(tokens).exit_probs
    assert probs.isfinite().all()
    assert (probs[:-1] > 0.0).all()
    assert (probs[:-1] < 1.0).all()
    assert probs[:-1].std() > 0.01  # zeros would give 0.5 everywhere


def test_held_out_problems_are_never_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from random import Random

    from problems import KINDS, held_out_problems, training_problem

    rng = Random(3)
    trained = [training_problem(rng) for _ in range(5000)]
    assert not {p.key for p in trained} & {p.key for p in held_out_problems(seed=3, count=500)}
    assert {p.kind for p in trained} == set(KINDS)
    monkeypatch.setattr("problems.HELD_OUT_SHARE", 2**33)  # no checksum is a multiple of it but 0
    with pytest.raises(ValueError, match="found 0 different held-out problems, expected 1"):
        held_out_problems(seed=3, count=1)


def test_the_whole_recipe_runs_end_to_end(tmp_path: Path) -> None:
    """A few steps of everything that made the shipped models: pre-training, both phases, export, measurement."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLE / "make_models.py"), str(tmp_path / "out"), "--steps", "6"]
    command += ["--more-steps", "4", "--student-steps", "4", "--batch-tokens", "200", "--problems", "24"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    configs = {name: load_model(out / name).config for name in (SHIPPED_TEACHER, SHIPPED_MODEL)}
    assert (configs[SHIPPED_TEACHER].num_loops, configs[SHIPPED_MODEL].kv_gate) == (4, "elementwise")
    assert {check_gguf(out / f"{name}.gguf").arch for name in configs} == {"ouro", "melt"}
    measured = json.loads((out / "measured.json").read_text())
    assert measured["tasks"]["melt-tiny T=4"]["n"] == measured["sums"]["melt-tiny T=4"]["all"]["n"] == 24
    weights = (out / SHIPPED_MODEL / "model.safetensors").stat().st_mtime_ns
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert again.returncode == 0, again.stderr
    assert (out / SHIPPED_MODEL / "model.safetensors").stat().st_mtime_ns == weights  # what is there is not made anew


def test_guided_questions_say_what_the_problems_say() -> None:
    """The stations that the teacher is trained with, against the problems' own answers."""
    from random import Random

    from bpe import train_tokenizer
    from followups import bracket_values, questions
    from rows import Mixture, encode, row, sums
    from train import mixture_at

    rng = Random(4)
    tokenizer = train_tokenizer(("".join(p + a for p, a in sums(rng)) for _ in range(20000)), 512)
    for _ in range(300):
        parts = row(rng, mixture_at(rng.random(), Mixture(), loops=4))
        whole = tokenizer.encode("".join(part.text for part in parts)).ids
        assert encode(parts, tokenizer).tokens == whole  # cutting a row into parts does not change its tokens
        for before, part in pairwise(parts):
            if part.answer and before.stations:
                assert before.stations[-1] == part.text[0]
    for _ in range(100):
        problem = training_task(rng)
        asked = next(iter(questions(rng, problem, 8)))
        assert (asked.question, asked.answer) == (problem.question, problem.answer)
        if problem.task == "nested":
            *_, (end, value, steps) = bracket_values(problem.question)
            assert (problem.question[end:], value, steps) == ("%10=", problem.answer, problem.steps)
        else:
            assert len(asked.stations) == problem.steps
            assert asked.stations[-1] == problem.answer
