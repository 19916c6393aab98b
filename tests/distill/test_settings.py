"""Settings and schedules: presets, files, options, bounds, and what changes from step to step."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from melt_edge.distill import schedule
from melt_edge.distill.settings import PRESETS, Settings, preset, read_settings
from melt_edge.errors import ConfigError


def test_the_papers_values_are_a_preset() -> None:
    """arXiv 2605.07721: chunk 500, 10 000 tokens, 320 000 a batch, 8e-6 and 5e-4, 500 and 300 steps, beta 0.1."""
    paper = preset("paper")
    assert paper.chunk_size == (500,)
    assert (paper.sequence_length, paper.batch_size * paper.sequence_length) == (10_000, 320_000)
    assert (paper.learning_rate, paper.gate_learning_rate) == (8e-6, 5e-4)
    assert (paper.transition_steps, paper.alignment_steps, paper.beta) == (500, 300, 0.1)
    assert paper.gate == "elementwise"
    assert not paper.detach_chunks


def test_a_file_overrides_a_preset(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"beta": 0.5, "chunk_size": [1, 2], "data": "a.jsonl"}))
    settings = read_settings(file, preset("tiny"))
    assert (settings.beta, settings.chunk_size, settings.data) == (0.5, (1, 2), ("a.jsonl",))
    assert settings.learning_rate == PRESETS["tiny"].learning_rate


@pytest.mark.parametrize("name", PRESETS)
def test_settings_survive_json(name: str) -> None:
    settings = PRESETS[name]
    assert Settings().changed(json.loads(json.dumps(settings.to_dict())), source="test") == settings


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("beta", -1, "a number of at least 0"),
        ("beta", "big", "a number of at least 0"),
        ("beta", math.nan, "a number of at least 0"),
        ("beta", True, "a number of at least 0"),
        ("transition_steps", 1.5, "an integer from 0"),
        ("gate", "wide", "one of elementwise, none, scalar"),
        ("chunk_size", [], "a chunk size, or a list of them"),
        ("chunk_size", [1, -2], "a chunk size, or a list of them"),
        ("chunk_size", True, "a chunk size, or a list of them"),
        ("detach_chunks", 1, "true or false"),
        ("data", 3, "a list of file names or task:NAME"),
        ("micro_batch_size", 3, "a divisor of batch_size = 32"),
        ("save_every", 0, "an integer from 1"),
    ],
)
def test_a_wrong_value_is_told_with_file_and_key(tmp_path: Path, key: str, value: object, expected: str) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({key: value}))
    with pytest.raises(ConfigError) as caught:
        read_settings(file, Settings())
    message = str(caught.value)
    assert message.startswith(f"{file}: key {key!r} is ")
    assert expected in message


def test_an_unknown_key_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"--set: 'learning_rat' is no setting .* did you mean learning_rate"):
        Settings().changed({"learning_rat": 1}, source="--set")
    with pytest.raises(ConfigError, match="there is no preset 'big'; expected paper or tiny"):
        preset("big")


def test_no_steps_at_all_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least one step"):
        Settings(transition_steps=0, alignment_steps=0)


def test_alpha_rises_to_1_and_stays() -> None:
    settings = Settings(transition_steps=4, alignment_steps=2)
    assert [schedule.alpha(settings, step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert schedule.alpha(Settings(transition_steps=0), 0) == 1.0


def test_the_alignment_counts_in_phase_2() -> None:
    settings = Settings(transition_steps=1, alignment_steps=1)
    assert [schedule.beta(settings, step) for step in range(2)] == [0.0, 0.1]


def test_learning_rates_warm_up_and_fall() -> None:
    settings = Settings(transition_steps=50, alignment_steps=50, warmup_steps=10, final_learning_rate_share=0.1)
    shares = [schedule.learning_rate_share(settings, step) for step in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert max(shares) == shares[9] == 1.0
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert 0.1 < shares[-1] < 0.11


def test_chunk_sizes_are_drawn_for_every_batch() -> None:
    settings = Settings(chunk_size=(1, 2, 8))
    drawn = [schedule.chunk_size(settings, step) for step in range(60)]
    assert set(drawn) == {1, 2, 8}
    assert drawn == [schedule.chunk_size(settings, step) for step in range(60)]
    assert settings.trained_chunk_size == 8
    assert Settings(chunk_size=(0,), sequence_length=77).trained_chunk_size == 77
