"""`melt-edge distill` as a shell sees it: a run, its log, its errors in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from distill.common import small_teacher, tiny_settings, write_prompts, write_texts
from melt_edge.cli import app
from melt_edge.distill.models import load_student
from melt_edge.tasks.greedy import greedy
from tiny import tiny_checkpoint


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["distill", *map(str, arguments), "--device", "cpu"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a teacher, data and settings."""
    tiny_checkpoint(tmp_path / "ouro", small_teacher())
    settings = tiny_settings(write_texts(tmp_path / "texts.jsonl")).to_dict()
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    return tmp_path


def test_a_run_from_a_file_and_options(folder: Path) -> None:
    """Options win over the file; the steps and what comes next are printed."""
    done = invoke(
        *(folder / "ouro", "-o", folder / "melt", "--config", folder / "settings.json"),
        *("--set", "alignment_steps=1", "--set", "gate=scalar", "--set", "chunk_size=[2, 3]"),
    )
    assert done.exit_code == 0, done.output
    assert "3 now, 3 in all" in done.stdout
    assert "export gguf" not in done.stdout  # an experiment's gate has no file format
    assert "step     2  alignment" in done.stderr
    assert load_student(folder / "melt").gate == "scalar"
    lines = [json.loads(line) for line in (folder / "melt.train" / "log.jsonl").read_text().splitlines()]
    assert {line["chunk_size"] for line in lines} <= {2, 3}
    for key in ("loss", "kd", "alignment", "alpha", "tokens_per_second", "gate_means", "learning_rate"):
        assert key in lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "beta"], "--set beta: expected KEY=VALUE"),
        (["--set", "beta=-1"], "--set: key 'beta' is -1, expected a number of at least 0"),
        (["--set", "bta=1"], "'bta' is no setting of a distillation; did you mean beta"),
        (["--preset", "huge"], "there is no preset 'huge'; expected paper or tiny"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        ([], "no data to train on"),
        (["--config", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--device", "tpu"], "device 'tpu' is unknown"),
    ],
)
def test_what_goes_wrong_is_one_line(folder: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["distill", str(folder / "ouro"), "-o", str(folder / "melt"), *arguments])
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (folder / "melt.train").exists()


def test_an_experiment_answers_token_by_token(folder: Path) -> None:
    """The student of an experiment decodes greedily through the same code as the reference."""
    data = write_prompts(folder / "prompts.jsonl")
    settings = tiny_settings(data, gate="mean", sequence_length=90, chunk_size=(20,), transition_steps=1).to_dict()
    (folder / "settings.json").write_text(json.dumps({**settings, "alignment_steps": 0}))
    assert invoke(folder / "ouro", "-o", folder / "melt", "--config", folder / "settings.json").exit_code == 0
    student = load_student(folder / "melt")
    answers = dict(greedy(student, [[1, 5, 9], [1, 7]], end_tokens=(), max_tokens=3))
    assert [len(answers[i]) for i in range(2)] == [3, 3]
