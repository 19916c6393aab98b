"""Scoring on the tasks: the interval, the two ways to run a model, and the command `melt-edge eval`."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from melt_edge import tasks
from melt_edge.checkpoint import load_model
from melt_edge.errors import FormatError
from melt_edge.models import shipped_model_path
from melt_edge.tasks.evaluate import by_steps, by_task, evaluate, total
from melt_edge.tasks.greedy import greedy
from melt_edge.tasks.score import Z95, Score, wilson_interval
from melt_edge.tasks.solvers import FileSolver, ReferenceSolver
from test_cli import assert_one_line_error, cli
from tiny import tiny_config

MakeCheckpoint = Callable[..., Path]
MakeGGUF = Callable[..., Path]
# Most of one length, so that the reference model runs them together.
QUESTIONS = [p.question for p in tasks.test_problems("pointers", 3, 40) if p.steps <= 5] + ["(3+4)%10=", "b=3;b%10="]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Known:
    """Answers what it was told, last question first."""

    loops, chunk = 4, None

    def __init__(self, answers: dict[str, str]) -> None:
        self._answers = answers

    def answers(self, questions: Sequence[str]) -> Iterator[tuple[int, str]]:
        for index in reversed(range(len(questions))):
            yield index, self._answers.get(questions[index], "?")


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@settings(deadline=None)
def test_interval_holds_the_shares_that_the_count_does_not_contradict(counted: tuple[int, int]) -> None:
    """By its definition: at a bound p the share found lies 1.96 standard deviations of p away."""
    right, count = counted
    low, high = wilson_interval(right, count)
    assert 0.0 <= low <= right / count <= high <= 1.0
    for bound in (low, high):
        distance = Z95 * math.sqrt(bound * (1 - bound) / count)
        assert abs(right / count - bound) == pytest.approx(distance, abs=1e-9)


def test_score_adds_up_and_reads_well() -> None:
    score = sum([Score(3, 10), Score(47, 90)], Score())
    assert score == Score(50, 100)
    assert str(score) == "50.0 % (50/100, 95 %: 40.4 to 59.6)"
    assert score.to_dict() == {"accuracy": 0.5, "n": 100, "ci95": pytest.approx([0.40383, 0.59617], abs=1e-5)}
    with pytest.raises(ValueError, match="11 right answers out of 10"):
        wilson_interval(11, 10)
    with pytest.raises(ValueError, match="count of at least 1"):
        wilson_interval(0, 0)


def test_scores_go_to_their_task_and_steps() -> None:
    problems = tasks.test_problems("all", 1, 240)
    known = {p.question: f" {p.answer}\n" for p in problems if p.steps <= 3 and p.task != "nested"}
    told: list[Score] = []
    scores = evaluate(Known(known), problems, told.append)
    assert total(scores) == told[-1] == Score(len(known), 240)
    assert len(told) == 240
    assert {name: score.right > 0 for name, score in by_task(scores).items()} == {
        "chain": True,
        "nested": False,
        "pointers": True,
    }
    # two tasks of three are answered up to three steps; nested has no problems of one step
    two_thirds = pytest.approx(2 / 3)
    assert [score.share for score in by_steps(scores).values()] == [1.0, two_thirds, two_thirds, *[0.0] * 5]
    assert list(by_steps(scores)) == list(range(1, 9))
    assert scores["chain", 2].share == 1.0
    assert scores["chain", 4].share == 0.0


@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_prompts_that_run_together_give_what_each_gives_alone(melt_checkpoint: Path, chunk: int | None) -> None:
    model = load_model(melt_checkpoint)
    prompts = [[5 + (7 * i + j) % 290 for j in range(4 + i % 3)] for i in range(9)]
    options: dict[str, Any] = {"end_tokens": {2}, "max_tokens": 5, "chunk_size": chunk}
    together = dict(greedy(model, prompts, **options))
    alone = {i: next(greedy(model, [prompt], **options))[1] for i, prompt in enumerate(prompts)}
    assert together == alone
    assert len({tuple(tokens) for tokens in alone.values()}) > 1


def test_the_end_token_ends_one_prompt_of_many(melt_checkpoint: Path) -> None:
    model = load_model(melt_checkpoint)
    prompts = [[5 + i, 6, 7] for i in range(8)]
    free = dict(greedy(model, prompts, end_tokens=(), max_tokens=6))
    end = free[0][3]
    expected = {i: tokens[: tokens.index(end)] if end in tokens else tokens for i, tokens in free.items()}
    assert dict(greedy(model, prompts, end_tokens={end}, max_tokens=6)) == expected


@pytest.mark.parametrize(
    ("model_type", "options"),
    [("ouro", {}), ("ouro", {"loops": 2}), ("melt", {}), ("melt", {"chunk": 1}), ("melt", {"chunk": 5, "loops": 2})],
    ids=str,
)
def test_file_and_checkpoint_give_the_same_texts(
    make_checkpoint: MakeCheckpoint, make_gguf: MakeGGUF, model_type: str, options: dict[str, int]
) -> None:
    config = tiny_config(model_type)
    reference = ReferenceSolver.open(make_checkpoint(config), max_tokens=3, **options)
    expected = dict(reference.answers(QUESTIONS))
    with FileSolver(make_gguf(config), kv_type="f32", max_tokens=3, **options) as solver:
        assert dict(solver.answers(QUESTIONS)) == expected
        assert (solver.loops, solver.chunk) == (reference.loops, reference.chunk)
    assert reference.loops == options.get("loops", 4)
    assert reference.chunk == options.get("chunk", 8 if model_type == "melt" else None)
    assert len(set(expected.values())) > 1


def test_chunk_and_loops_reach_the_computation(melt_checkpoint: Path) -> None:
    """The twin of the test above: it can fail."""
    options: list[dict[str, int]] = [{}, {"chunk": 1}, {"loops": 2}]
    found = [dict(ReferenceSolver.open(melt_checkpoint, max_tokens=3, **o).answers(QUESTIONS)) for o in options]
    assert found[0] != found[1]
    assert found[0] != found[2]


def test_real_answers_of_the_shipped_model() -> None:
    with FileSolver(shipped_model_path(), max_tokens=32) as solver:
        found = dict(solver.answers(["24+18=", "What is 33 - 14?"]))
    assert found == {0: "24+18=42.", 1: "33-14=19."}


def changed_checkpoint(source: Path, folder: Path, template: str | None) -> Path:
    """A copy with another chat template."""
    shutil.copytree(source, folder)
    keys = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**keys, "chat_template": template}))
    return folder


def test_without_a_chat_template_the_question_is_the_prompt(melt_checkpoint: Path, tmp_path: Path) -> None:
    from melt_edge.export.gguf import export_gguf

    plain = changed_checkpoint(melt_checkpoint, tmp_path / "plain", None)
    expected = dict(ReferenceSolver.open(plain, max_tokens=3).answers(QUESTIONS))
    file = tmp_path / "plain.gguf"
    export_gguf(plain, file, type="f32", verify=False)
    with FileSolver(file, kv_type="f32", max_tokens=3) as solver:
        assert dict(solver.answers(QUESTIONS)) == expected
    assert dict(ReferenceSolver.open(melt_checkpoint, max_tokens=3).answers(QUESTIONS)) != expected


def test_a_template_that_hides_the_question_is_refused(melt_checkpoint: Path, tmp_path: Path) -> None:
    silent = changed_checkpoint(melt_checkpoint, tmp_path / "silent", "{{ messages | length }}")
    with pytest.raises(FormatError, match="does not show the user's message"):
        ReferenceSolver.open(silent)
    (silent / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match=r"tokenizer\.json is missing"):
        ReferenceSolver.open(silent)


def test_json_of_a_file_and_of_a_checkpoint(melt_gguf: Path, melt_checkpoint: Path) -> None:
    for model in (melt_gguf, melt_checkpoint):
        args = (
            "eval",
            model,
            "--task",
            "pointers",
            "--n",
            "16",
            "--seed",
            "5",
            "--chunk",
            "30",
            "--loops",
            "2",
            "--json",
        )
        result = cli(*args, "-t", "1", "--max-tokens", "2")
        assert result.returncode == 0, result.stderr
        found = json.loads(result.stdout)
        assert found["model"] == str(model)
        assert (found["task"], found["split"], found["seed"]) == ("pointers", "test", 5)
        assert (found["loops"], found["chunk"], found["n"]) == (2, 30, 16)
        assert 0.0 <= found["ci95"][0] <= found["accuracy"] <= found["ci95"][1] <= 1.0
        assert list(found["by_difficulty"]) == [str(steps) for steps in range(1, 9)]
        assert {entry["n"] for entry in found["by_difficulty"].values()} == {2}
        assert "by_task" not in found


def test_table_of_all_tasks() -> None:
    args = ("eval", "ouro-tiny", "--task", "all", "--n", "48", "--split", "validation", "--chunk", "5000")
    result = cli(*args, "--max-tokens", "2")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(
        "ouro-tiny: all, 48 validation problems of seed 0\n4 loops, chunks of 5000; a guess"
    )
    rows = [line.split() for line in result.stdout.splitlines()]
    counts = {row[0]: int(row[2]) for row in rows if len(row) == 9}
    assert counts == {**dict.fromkeys("12345678", 6), "chain": 17, "nested": 14, "pointers": 17, "all": 48}
    assert max(len(line) for line in result.stdout.splitlines()) <= 80
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["ouro-tiny", "--task", "sums"], 1, "'sums' is not a task, expected one of: chain, nested, pointers, all"),
        (["ouro-tiny", "--task", "chain", "--split", "training"], 1, "expected test or validation"),
        (["ouro-tiny", "--task", "chain", "--n", "0"], 2, "--n"),
        (["ouro-tiny", "--task", "chain", "--max-steps", "9"], 2, "--max-steps"),
        (["ouro-tiny", "--task", "chain", "--loops", "65"], 2, "--loops"),
        (["ouro-tiny"], 2, "--task"),
        (["/nowhere.gguf", "--task", "chain"], 1, "/nowhere.gguf: no such file"),
        (["/tmp", "--task", "chain"], 1, "/tmp/config.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refuses_in_one_line(args: list[str], code: int, said: str) -> None:
    assert_one_line_error(cli("eval", *args), code, said)
