"""What the trainer reads: which tokens, which of them are learned, in which order, and from where on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill.common import tiny_settings, write_prompts, write_texts
from melt_edge.checkpoint import Checkpoint
from melt_edge.distill.data import Batches, collate
from melt_edge.distill.text import Encoder, Row, pack
from melt_edge.errors import ConfigError, FormatError
from tiny import tiny_checkpoint, tiny_config

SYSTEM = "<|im_start|>system\nYou are a careful assistant<|im_end|>\n"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("teacher") / "ouro", tiny_config("ouro"))


def encoder(teacher: Path, **keys: Any) -> Encoder:
    return Encoder(Checkpoint.open(teacher), **{"prompt_loss": False, **keys})


def learned_text(encoder: Encoder, row: Row) -> str:
    ids = [token for token, flag in zip(row.tokens, row.learned, strict=True) if flag]
    return encoder.tokenizer.decode(ids, skip_special_tokens=False)


def full_text(encoder: Encoder, row: Row) -> str:
    return encoder.tokenizer.decode(row.tokens, skip_special_tokens=False)


def test_a_prompt_and_its_answer_are_the_chat_templates(teacher: Path) -> None:
    """Read: what chat feeds the model. Learned: the answer and the token that ends it."""
    found = encoder(teacher)
    row = found.encode({"prompt": "2+3?", "answer": "5"}, "here")
    asked = f"{SYSTEM}<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n"
    assert full_text(found, row) == f"{asked}5<|im_end|>"
    assert learned_text(found, row) == "5<|im_end|>"
    # cut where generation begins, so that the answer's tokens are those that generation makes
    assert row.tokens[: row.learned.index(True)] == found.tokenizer.encode(asked).ids


def test_every_assistant_message_of_a_conversation_is_learned(teacher: Path) -> None:
    found = encoder(teacher)
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "2+3?"), ("assistant", "5")]
    row = found.encode({"messages": [{"role": r, "content": c} for r, c in turns]}, "here")
    assert learned_text(found, row) == "Hello<|im_end|>5<|im_end|>"
    assert full_text(found, row).endswith("<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n5<|im_end|>")


def test_prompts_are_learned_where_asked_for(teacher: Path) -> None:
    row = encoder(teacher, prompt_loss=True).encode({"prompt": "2+3?", "answer": "5"}, "here")
    assert all(row.learned)


def test_without_a_chat_template_prompt_and_answer_stand_alone(teacher: Path, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "ouro", tiny_config("ouro"))
    keys = json.loads((folder / "tokenizer_config.json").read_text())
    del keys["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(keys))
    found = encoder(folder)
    row = found.encode({"prompt": "2+3=", "answer": "5"}, "here")
    assert full_text(found, row) == "2+3=5<|im_end|>"
    assert learned_text(found, row) == "5<|im_end|>"


def test_a_text_is_learned_whole_and_ends(teacher: Path) -> None:
    found = encoder(teacher)
    row = found.encode({"text": "abc"}, "here")
    assert full_text(found, row) == "abc<|im_end|>"
    assert all(row.learned)
    assert row.is_text


@pytest.mark.parametrize(
    "record",
    [[], "text", {"text": 3}, {"prompt": "a"}, {"messages": []}, {"messages": [{"role": "user"}]}, {"messages": "a"}],
)
def test_other_records_are_refused_by_name(teacher: Path, record: object) -> None:
    with pytest.raises(FormatError, match=r"^x.jsonl, line 7: "):
        encoder(teacher).encode(record, "x.jsonl, line 7")


def test_a_template_that_drops_a_message_is_told(teacher: Path, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "ouro", tiny_config("ouro"))
    keys = json.loads((folder / "tokenizer_config.json").read_text())
    keys["chat_template"] = "{{ messages[-1]['content'] }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(keys))
    with pytest.raises(FormatError, match="does not show all messages of the roles user, assistant"):
        encoder(folder).encode({"prompt": "a", "answer": "b"}, "here")


def test_texts_are_joined_and_cut(teacher: Path) -> None:
    texts = [Row([1, 2, 3], [True] * 3, True), Row([4, 5], [True] * 2, True), Row([6, 7], [False, True], False)]
    packed, left = pack(texts, 2)
    assert [row.tokens for row in packed] == [[1, 2], [3, 4], [6, 7]]
    assert [row.tokens for row in left] == [[5]]


def test_rows_are_padded_at_their_ends() -> None:
    batch = collate([Row([1, 2, 3], [False, True, True], False), Row([4], [True], False)])
    assert batch.tokens.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert batch.learned.tolist() == [[False, True, True], [True, False, False]]
    assert batch.present.tolist() == [[True, True, True], [True, False, False]]
    assert collate([Row([1], [True], False)], length=3).tokens.shape == (1, 3)


def rows_of(batches: Batches, steps: int) -> list[list[list[int]]]:
    return [[row.tokens for row in batches.next_rows()] for _ in range(steps)]


@pytest.mark.parametrize("sort_batches", [1, 3])
@pytest.mark.parametrize("kind", ["texts", "prompts", "both"])
def test_batches_continue_from_any_position(teacher: Path, tmp_path: Path, kind: str, sort_batches: int) -> None:
    """Over the ends of groups and of whole passes through the data; the state survives JSON."""
    files = []
    if kind in ("texts", "both"):
        files.append(write_texts(tmp_path / "texts.jsonl", count=7))
    if kind in ("prompts", "both"):
        files.append(write_prompts(tmp_path / "prompts.jsonl", count=5))
    settings = tiny_settings(files[0], sequence_length=90, sort_batches=sort_batches)
    settings = settings.changed({"data": [str(file) for file in files]}, source="test")
    found = encoder(teacher)
    whole = rows_of(Batches(settings, found), 12)
    for position in range(8):
        first = Batches(settings, found)
        assert rows_of(first, position) == whole[:position]
        again = Batches(settings, found)
        again.restore(json.loads(json.dumps(first.state())))
        assert rows_of(again, 12 - position) == whole[position:]


def test_a_pass_reads_every_record_once_in_another_order(teacher: Path, tmp_path: Path) -> None:
    file = write_prompts(tmp_path / "prompts.jsonl", count=8)
    lines = [json.dumps({"prompt": f"{i}?", "answer": "x"}) for i in range(8)]
    file.write_text("\n\n".join(lines))  # empty lines, and none at the end
    batches = Batches(tiny_settings(file, sequence_length=90), encoder(teacher))
    passes = [[tuple(row) for rows in rows_of(batches, 2) for row in rows] for _ in range(2)]
    assert len(set(passes[0])) == 8
    assert set(passes[0]) == set(passes[1])
    assert passes[0] != passes[1]


def test_text_files_are_cut_at_line_ends(teacher: Path, tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("".join(f"line {i} äöü\n" for i in range(200)), encoding="utf-8")
    found = encoder(teacher)
    batches = Batches(tiny_settings(file, sequence_length=24), found)
    ids = [token for _ in range(30) for row in batches.next_rows() for token in row.tokens]
    text = found.tokenizer.decode(ids)
    assert "\ufffd" not in text
    assert "line 7 äöü\n" in text


def test_text_that_is_not_utf8_is_named(teacher: Path, tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_bytes(b"good\n\xff\xfe\n")
    with pytest.raises(FormatError, match=r"book.txt, line 1: not UTF-8 text"):
        Batches(tiny_settings(file), encoder(teacher)).next_rows()


def test_an_unknown_task_is_told(teacher: Path, tmp_path: Path) -> None:
    pytest.importorskip("melt_edge.tasks")
    with pytest.raises(ConfigError, match="task:nonsense is no task; expected task:all"):
        Batches(tiny_settings(tmp_path).changed({"data": ["task:nonsense"]}, source="test"), encoder(teacher))


def test_tasks_are_data(teacher: Path, tmp_path: Path) -> None:
    """Generated problems in the model's chat form; the same seed and place give the same ones."""
    pytest.importorskip("melt_edge.tasks")
    settings = tiny_settings(tmp_path, sequence_length=250).changed({"data": ["task:all"]}, source="test")
    found = encoder(teacher)
    batches = Batches(settings, found)
    rows = [row for _ in range(3) for row in batches.next_rows()]
    assert len({tuple(row.tokens) for row in rows}) == 12
    for row in rows:
        assert learned_text(found, row).endswith("<|im_end|>")
        assert full_text(found, row).startswith(SYSTEM)
    assert rows_of(Batches(settings, encoder(teacher)), 1)[0] == [row.tokens for row in rows[:4]]
