"""Whole runs: both phases, killed and continued, stopped by bad input, and what they leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill.common import CPU, small_teacher, tiny_settings, write_prompts, write_texts
from melt_edge.checkpoint import Checkpoint, load_model, save_checkpoint
from melt_edge.distill.models import load_student
from melt_edge.distill.run import distill
from melt_edge.distill.settings import Settings
from melt_edge.distill.state import TrainingState, load_state, remove_leftovers, save_state
from melt_edge.distill.trainer import Report
from melt_edge.errors import ConfigError, FormatError, MeltError, SpecError, TrainingError
from melt_edge.export.gguf import export_gguf
from tiny import tiny_checkpoint, tiny_config, tiny_tensors


class Stopped(BaseException):
    """What the tests stop a run with."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("teacher") / "ouro", small_teacher())


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("data") / "texts.jsonl")


def run(teacher: Path, out: Path, settings: Settings, *, stop_after: int | None = None, **more: Any) -> list[Report]:
    """The steps done, stopped without warning after some."""
    reports: list[Report] = []

    def report(step: Report) -> None:
        reports.append(step)
        if len(reports) == stop_after:
            raise Stopped

    with suppress(Stopped):
        distill(teacher, out, settings, CPU, report=report, **more)
    return reports


def losses(reports: list[Report]) -> list[tuple[int, float, float, float]]:
    return [(r.step, r.loss, r.alignment, r.grad_norm) for r in reports]


@pytest.mark.parametrize("changes", [{"recompute_chunks": True, "micro_batch_size": 2}, {"detach_chunks": True}])
def test_both_phases_end_with_a_melt_that_exports(teacher: Path, texts: Path, tmp_path: Path, changes) -> None:
    reports = run(teacher, tmp_path / "melt", tiny_settings(texts, **changes))
    assert [(r.phase, r.alpha) for r in reports] == [
        ("transition", 0.5),
        ("transition", 1.0),
        ("alignment", 1.0),
        ("alignment", 1.0),
    ]
    assert all(r.kd > 0 and r.grad_norm > 0 and len(r.gate_means) == 2 for r in reports)
    assert [r.alignment > 0 for r in reports] == [False, False, True, True]
    checkpoint = Checkpoint.open(tmp_path / "melt")
    assert checkpoint.config.kv_gate == "elementwise"
    assert checkpoint.config.chunk_size == 4  # the largest of those it was trained with
    assert checkpoint.tokenizer_config == Checkpoint.open(teacher).tokenizer_config
    assert export_gguf(tmp_path / "melt", tmp_path / "melt.gguf", type="f32").verified
    lines = [json.loads(line) for line in (tmp_path / "melt.train" / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(r.step, r.loss) for r in reports]


def test_the_loss_falls(teacher: Path, tmp_path: Path) -> None:
    """A few steps on the same row again and again show that the gradients point the right way."""
    data = write_prompts(tmp_path / "one.jsonl", count=1)
    keys = {"transition_steps": 1, "alignment_steps": 6, "save_every": 100, "sequence_length": 90, "batch_size": 1}
    reports = run(teacher, tmp_path / "melt", tiny_settings(data, chunk_size=(20,), micro_batch_size=1, **keys))
    assert reports[-1].loss < 0.8 * reports[1].loss


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_run_that_continues_has_the_same_losses_and_weights(
    teacher: Path, texts: Path, tmp_path: Path, stop_after: int
) -> None:
    """Bit for bit, also over the end of a group of sorted batches and from a checkpoint in its middle."""
    settings = tiny_settings(texts, sort_batches=3, save_every=1)
    whole = run(teacher, tmp_path / "whole", settings)
    begun = run(teacher, tmp_path / "parts", settings, stop_after=stop_after)
    ended = run(teacher, tmp_path / "parts", settings, resume=True)
    assert losses(begun) == losses(whole)[:stop_after]
    # the step was done when the run stopped, but its checkpoint was not written
    assert losses(ended) == losses(whole)[stop_after - 1 :]
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    log = (tmp_path / "parts.train" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_killed_process_loses_the_steps_since_its_last_checkpoint(teacher: Path, texts: Path, tmp_path: Path) -> None:
    """SIGKILL from outside, at whatever point it hits; --resume ends with the weights of an undisturbed run."""
    settings = {"transition_steps": 20, "alignment_steps": 20, "save_every": 4}
    keys = tiny_settings(texts, **settings).to_dict()
    (tmp_path / "settings.json").write_text(json.dumps(keys))
    arguments = [
        teacher,
        "-o",
        tmp_path / "melt",
        "--config",
        tmp_path / "settings.json",
        "--threads",
        1,
        "--device",
        "cpu",
    ]
    command = [sys.executable, "-m", "melt_edge", "distill", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=tempfile.gettempdir(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    log = tmp_path / "melt.train" / "log.jsonl"
    deadline = time.monotonic() + 100
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < 11):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    done = log.read_text().count("\n")
    reports = run(teacher, tmp_path / "melt", tiny_settings(texts, **settings), resume=True)
    assert done - 4 <= reports[0].step <= done
    run(teacher, tmp_path / "whole", tiny_settings(texts, **settings))
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "melt"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert sorted(path.name for path in (tmp_path / "melt.train").iterdir()) == ["log.jsonl", "step-00000040"]


def state_at(step: int) -> TrainingState:
    weights = {"w": torch.full((1000,), float(step))}
    return TrainingState(step, weights, {"exp_avg/w": weights["w"] * 2}, {"place": step}, {}, "teacher")


def killed_at(event: int, action: Callable[[], object]) -> bool:
    """Run an action in a child that kills itself before its n-th sync or rename; True if it lived to the end."""
    child = os.fork()
    if child == 0:
        count = 0

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **more: Any) -> Any:
                nonlocal count
                count += 1
                if count == event:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **more)

            return call

        try:
            os.fsync, os.replace, os.rename, os.rmdir = map(counted, (os.fsync, os.replace, os.rename, os.rmdir))
            action()
            os._exit(0)
        finally:  # an exception must not run the tests a second time in here
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_checkpoint_is_whole_at_whatever_point_its_writer_is_killed(tmp_path: Path) -> None:
    event = 0
    finished = False
    while not finished:
        event += 1
        folder = tmp_path / f"killed-{event}"
        folder.mkdir()
        save_state(folder, state_at(1))
        finished = killed_at(event, lambda folder=folder: save_state(folder, state_at(2)))
        remove_leftovers(folder)
        state = load_state(folder)
        assert state is not None
        expected = state_at(state.step)
        assert torch.equal(state.weights["w"], expected.weights["w"])
        assert torch.equal(state.optimizer["exp_avg/w"], expected.optimizer["exp_avg/w"])
        assert state.data == expected.data
        assert not list(folder.glob(".*"))
    assert event > 5
    assert state.step == 2


def test_resume_without_a_run_begins_one(teacher: Path, texts: Path, tmp_path: Path) -> None:
    assert len(run(teacher, tmp_path / "melt", tiny_settings(texts), resume=True)) == 4


def test_nothing_is_overwritten_unasked(teacher: Path, texts: Path, tmp_path: Path) -> None:
    settings = tiny_settings(texts, transition_steps=1, alignment_steps=0)
    run(teacher, tmp_path / "melt", settings)
    with pytest.raises(ConfigError, match="exists already; choose another path or overwrite it with --force"):
        run(teacher, tmp_path / "melt", settings)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match="mine: exists already"):  # there is no run that could be continued
        run(teacher, tmp_path / "mine", settings, resume=True)
    assert run(teacher, tmp_path / "melt", settings, resume=True) == []  # done already, written again
    run(teacher, tmp_path / "other", settings, stop_after=1)
    with pytest.raises(ConfigError, match=r"other\.train: holds a run already; continue it with --resume"):
        run(teacher, tmp_path / "other", settings)
    assert len(run(teacher, tmp_path / "other", settings, force=True)) == 1


@pytest.mark.parametrize("change", [{"beta": 0.5}, {"seed": 9}, {"chunk_size": (2,)}])
def test_a_run_is_not_continued_as_another(teacher: Path, texts: Path, tmp_path: Path, change) -> None:
    run(teacher, tmp_path / "melt", tiny_settings(texts), stop_after=2)
    with pytest.raises(ConfigError, match=f"the run began with {next(iter(change))} = "):
        run(teacher, tmp_path / "melt", tiny_settings(texts, **change), resume=True)


def test_a_run_is_not_continued_with_other_data_or_teacher(teacher: Path, texts: Path, tmp_path: Path) -> None:
    run(teacher, tmp_path / "melt", tiny_settings(texts), stop_after=2)
    other = write_texts(tmp_path / "other.jsonl", count=4)
    with pytest.raises(ConfigError, match="give the same data to continue it"):
        run(teacher, tmp_path / "melt", tiny_settings(other), resume=True)
    stranger = tiny_checkpoint(tmp_path / "stranger", small_teacher(), seed=5)
    with pytest.raises(ConfigError, match="the run began with another teacher"):
        run(stranger, tmp_path / "melt", tiny_settings(texts), resume=True)


def test_a_damaged_checkpoint_is_named(teacher: Path, texts: Path, tmp_path: Path) -> None:
    run(teacher, tmp_path / "melt", tiny_settings(texts), stop_after=2)
    (file,) = (tmp_path / "melt.train").glob("step-*/optimizer.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(FormatError, match=r"step-00000001: a damaged training checkpoint .*; remove it"):
        run(teacher, tmp_path / "melt", tiny_settings(texts), resume=True)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(
    teacher: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from melt_edge.distill import unroll

    real, calls = unroll.kd_sum, []

    def kd_sum(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return real(student, teacher) * (float("nan") if len(calls) > 30 else 1.0)

    monkeypatch.setattr(unroll, "kd_sum", kd_sum)
    settings = tiny_settings(texts, chunk_size=(1,))  # 11 calls a step
    with pytest.raises(
        TrainingError, match=r"^step 2: the loss is nan .*; the last good checkpoint is in .*melt\.train"
    ):
        run(teacher, tmp_path / "melt", settings)
    assert not (tmp_path / "melt").exists()
    state = load_state(tmp_path / "melt.train")
    assert state is not None
    assert state.step == 2
    assert all(bool(weight.isfinite().all()) for weight in state.weights.values())


def test_a_learning_rate_far_too_high_ends_in_one_sentence(teacher: Path, texts: Path, tmp_path: Path) -> None:
    settings = tiny_settings(texts, learning_rate=1e30, gate_learning_rate=1e30, transition_steps=8)
    with pytest.raises(TrainingError, match=r"^step \d+: the (loss|gradient's norm) is (nan|inf)") as caught:
        run(teacher, tmp_path / "melt", settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("gate", ["scalar", "mean", "ema"])
def test_an_experiments_gate_is_trained_read_again_and_never_exported(
    teacher: Path, texts: Path, tmp_path: Path, gate: str
) -> None:
    settings = tiny_settings(texts, gate=gate, ema_decay=0.25, transition_steps=1, alignment_steps=1)
    reports = run(teacher, tmp_path / "melt", settings)
    assert all(r.kd > 0 for r in reports)
    student = load_student(tmp_path / "melt")
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        one, whole = student(tokens, chunk_size=1).logits, student(tokens, chunk_size=10).logits
    assert torch.isfinite(one).all()
    assert not torch.allclose(one, whole)
    if gate == "ema":
        assert student.model.layers[0].self_attn.kv_gate.decay == 0.25
    with pytest.raises(ConfigError, match=f"key 'kv_gate' is '{gate}', expected elementwise or none"):
        export_gguf(tmp_path / "melt", tmp_path / "melt.gguf", type="f32")


def test_a_tied_head_stays_tied(texts: Path, tmp_path: Path) -> None:
    teacher = tiny_checkpoint(tmp_path / "ouro", small_teacher(tied=True))
    run(teacher, tmp_path / "melt", tiny_settings(texts, save_every=2), stop_after=3)
    run(teacher, tmp_path / "melt", tiny_settings(texts, save_every=2), resume=True)
    run(teacher, tmp_path / "whole", tiny_settings(texts, save_every=2))
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "melt"))
    assert "lm_head.weight" not in a
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["model.embed_tokens.weight"], load_model(teacher).lm_head.weight)


def test_without_a_gate_the_last_loops_row_is_kept(teacher: Path, texts: Path, tmp_path: Path) -> None:
    run(teacher, tmp_path / "melt", tiny_settings(texts, gate="none", transition_steps=1, alignment_steps=1))
    assert load_model(tmp_path / "melt").config.kv_gate == "none"


@pytest.mark.parametrize(
    "changes",
    [{"transition_steps": 0}, {"beta": 0.0}, {"chunk_size": (0,)}, {"gate_init": "input"}, {"precision": "bfloat16"}],
)
def test_ablations_run(teacher: Path, texts: Path, tmp_path: Path, changes) -> None:
    reports = run(teacher, tmp_path / "melt", tiny_settings(texts, alignment_steps=1, **changes))
    assert len(reports) == tiny_settings(texts, alignment_steps=1, **changes).total_steps
    assert load_model(tmp_path / "melt").config.chunk_size == (12 if "chunk_size" in changes else 4)


def test_micro_batches_add_up_to_the_batch(teacher: Path, texts: Path, tmp_path: Path) -> None:
    """Gradient accumulation is arithmetic, also with answers of unequal length."""
    data = write_prompts(tmp_path / "prompts.jsonl")
    keys = {"sequence_length": 90, "alignment_steps": 1, "transition_steps": 1, "chunk_size": (20,)}
    found = [
        run(teacher, tmp_path / f"melt-{size}", tiny_settings(data, micro_batch_size=size, **keys))
        for size in (1, 2, 4)
    ]
    for reports in found[1:]:
        for a, b in zip(found[0], reports, strict=True):
            assert b.loss == pytest.approx(a.loss, rel=1e-4)
            assert b.alignment == pytest.approx(a.alignment, rel=1e-4)
            assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-3)


def bad_cases(folder: Path, teacher: Path) -> dict[str, tuple[Path, Settings, type[MeltError], str]]:
    good = write_texts(folder / "good.jsonl")
    melt = tiny_checkpoint(folder / "melt", tiny_config("melt"))
    llama = tiny_checkpoint(folder / "llama", small_teacher())
    keys = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**keys, "model_type": "llama"}))
    small = small_teacher(vocab=300)
    narrow = save_checkpoint(
        folder / "narrow",
        small,
        tiny_tensors(small),
        tokenizer_json=(teacher / "tokenizer.json").read_text(encoding="utf-8"),
    )
    last = json.loads((teacher / "tokenizer.json").read_text())["model"]["vocab"]
    beyond = folder / "beyond.jsonl"
    text = next(token for token, idx in last.items() if idx == 300).replace("Ġ", " ")
    beyond.write_text(json.dumps({"text": "a" + text}) + "\n", encoding="utf-8")
    empty, blank, broken, other = (folder / name for name in ("empty.jsonl", "blank.jsonl", "broken.jsonl", "x.jsonl"))
    empty.write_text("")
    blank.write_text("\n\n")
    broken.write_text('{"text": "a"}\n{"text": \n')
    other.write_text('{"question": "a"}\n')
    long = write_prompts(folder / "long.jsonl", count=2)
    return {
        "another architecture": (llama, tiny_settings(good), ConfigError, "model_type.*llama.*expected ouro"),
        "a melt": (melt, tiny_settings(good), ConfigError, "model_type is 'melt', expected 'ouro'"),
        "no folder": (folder / "none", tiny_settings(good), FormatError, "expected a checkpoint folder"),
        "no data": (teacher, tiny_settings(good, data=()), ConfigError, "no data to train on; give"),
        "no file": (teacher, tiny_settings(folder / "nofile"), ConfigError, "nofile: cannot be read"),
        "empty": (teacher, tiny_settings(empty), ConfigError, "empty.jsonl: is empty"),
        "blank": (teacher, tiny_settings(blank), ConfigError, "blank.jsonl: is empty"),
        "broken": (teacher, tiny_settings(broken), FormatError, "broken.jsonl, line 2: not valid JSON"),
        "other keys": (teacher, tiny_settings(other), FormatError, r"x.jsonl, line 1: expected \{\"text\"\}"),
        "nothing fits": (teacher, tiny_settings(long), ConfigError, "hold nothing to learn .* sequence_length = 12"),
        "beyond": (narrow, tiny_settings(beyond), ConfigError, r"beyond.jsonl, line 1: token 300 .* vocabulary of 300"),
    }


CASES = (
    *("another architecture", "a melt", "no folder", "no data", "no file", "empty", "blank"),
    *("broken", "other keys", "nothing fits", "beyond"),
)


@pytest.mark.parametrize("case", CASES)
def test_bad_input_ends_with_one_sentence(teacher: Path, tmp_path: Path, case: str) -> None:
    path, settings, error, message = bad_cases(tmp_path, teacher)[case]
    with pytest.raises(error, match=message) as caught:
        run(path, tmp_path / "out", settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.train").exists()


def test_a_teacher_without_all_its_tensors_is_refused(tmp_path: Path, texts: Path) -> None:
    config = small_teacher()
    folder = tiny_checkpoint(tmp_path / "ouro", config)
    keys = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**keys, "num_hidden_layers": 3}))
    with pytest.raises(SpecError, match=r"do not match config\.json"):
        run(folder, tmp_path / "out", tiny_settings(texts))
