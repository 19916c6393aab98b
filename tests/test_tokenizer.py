"""The tokenizer in the file is the checkpoint's: same splits, same merges, same special tokens."""

# ruff: noqa: RUF001  (odd characters are what is tested)
from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer

from conftest import MakeCheckpoint
from melt_edge.checkpoint import Checkpoint, save_checkpoint
from melt_edge.errors import FormatError
from melt_edge.export.gguf import export_gguf
from melt_edge.export.tokenizer import _LLAMA3_SPLIT, _QWEN2_SPLIT, write_tokenizer
from melt_edge.runtime.gguf_check import check_gguf
from melt_edge.runtime.llama import LlamaBackend
from melt_edge.runtime.options import LoadOptions
from tiny import CHAT_TEMPLATE, tiny_checkpoint, tiny_config, tiny_tensors, tiny_tokenizer_config, tiny_tokenizer_json

VOCAB = 2048
GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES = {**GPT2, "use_regex": False}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


PRE_TOKENIZERS: dict[str, Any] = {
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, GPT2]},
    "gpt-2": GPT2,
    "llama-bpe": {"type": "Sequence", "pretokenizers": [split(_LLAMA3_SPLIT), BYTES]},
    "qwen2": {"type": "Sequence", "pretokenizers": [split(_QWEN2_SPLIT), BYTES]},
}


def tokenizer_json(change: Callable[[dict[str, Any]], object] | None = None, vocab: int = VOCAB) -> str:
    source = json.loads(tiny_tokenizer_json(vocab))
    if change is not None:
        change(source)
    return json.dumps(source, ensure_ascii=False)


def with_pre(pre: str) -> Callable[[dict[str, Any]], None]:
    def change(source: dict[str, Any]) -> None:
        source["pre_tokenizer"] = PRE_TOKENIZERS[pre]
        source["model"]["ignore_merges"] = pre == "llama-bpe"

    return change


def checkpoint_with(
    folder: Path,
    tokenizer: str,
    *,
    vocab: int = VOCAB,
    tokenizer_config: dict[str, Any] | None = None,
    **config_keys: Any,
) -> Path:
    config = tiny_config("ouro", vocab=vocab, hidden_size=8, head_dim=2, layers=1, num_loops=1)
    return save_checkpoint(
        folder,
        replace(config, **config_keys),
        tiny_tensors(config),
        tokenizer_json=tokenizer,
        tokenizer_config=tiny_tokenizer_config() if tokenizer_config is None else tokenizer_config,
    )


@contextmanager
def opened(folder: Path, path: Path) -> Iterator[LlamaBackend]:
    export_gguf(folder, path, type="f32", verify=False)
    backend = LlamaBackend(path, LoadOptions(n_ctx=64))
    try:
        yield backend
    finally:
        backend.close()


WORDS = ["the", "loop", "Cache", "ÜBER", "niño", "straße", "Привет", "γεια", "שלום", "مرحبا", "नमस्ते", "สวัสดี"]
BLANKS = [" ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u2028", "\x0b", "\x85"]
CODE = [
    "def f(x):\n    return x\n",
    "a[i] += b->c;",
    "{{x}}",
    "<p>&amp;</p>",
    "\\n",
    "$E=mc^2$",
    "###",
    "...",
    "—",
    "«»",
]


def varied_strings(count: int, seed: int) -> list[str]:
    """Digits, blanks, emoji, CJK, combining marks, replaced invalid UTF-8, special tokens, code, contractions."""
    rng = random.Random(seed)
    pools: list[Callable[[], str]] = [
        lambda: rng.choice(WORDS),
        lambda: str(rng.randrange(10 ** rng.randrange(1, 12))),
        lambda: rng.choice(["٣٤٥", "½", "Ⅷ", "²³", "１２３", "3.14", "1,000", "0x1F", "-7e-3"]),
        lambda: rng.choice(BLANKS) * rng.randrange(1, 6),
        lambda: " " * rng.randrange(1, 20),
        lambda: rng.choice(["😀", "👩‍👩‍👧‍👦", "🇩🇪", "👍🏽", "❤️", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "🫠"]),
        lambda: "".join(chr(rng.randrange(0x4E00, 0x9FA5)) for _ in range(rng.randrange(1, 6))),
        lambda: rng.choice(["こんにちは", "カタカナ", "한국어", "漢字かな交じり文", "ｱｲｳ"]),
        lambda: rng.choice("aeoun") + "".join(chr(rng.randrange(0x300, 0x36F)) for _ in range(rng.randrange(1, 4))),
        lambda: bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9))).decode("utf-8", errors="replace"),
        lambda: rng.choice(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_start|>user\n", "<|im_", "|>", "<|"]),
        lambda: rng.choice(["I'm", "they've", "it'S", "we'LL", "'d", "''s", "can't", "o'clock", "d’accord"]),
        lambda: rng.choice(CODE),
        lambda: "".join(chr(rng.randrange(0x20, 0x7F)) for _ in range(rng.randrange(1, 10))),
        lambda: chr(rng.randrange(*rng.choice([(0x20, 0x800), (0x800, 0xD800), (0x1F300, 0x1F6FF)]))),
        lambda: "\x00\x01\x7f"[rng.randrange(3)],
    ]  # fmt: skip
    strings = []
    for _ in range(count):
        glue = rng.choice(["", " ", " "])
        strings.append(glue.join(rng.choice(pools)() for _ in range(rng.randrange(1, 12))))
    return strings


@pytest.mark.parametrize(("pre", "count"), [("smollm", 2000), ("gpt-2", 500), ("llama-bpe", 500), ("qwen2", 500)])
def test_both_libraries_agree_on_varied_strings(tmp_path: Path, pre: str, count: int) -> None:
    source = tokenizer_json(with_pre(pre))
    tokenizer = Tokenizer.from_str(source)
    strings = varied_strings(count, seed=1)
    assert len(set(strings)) > 0.9 * count
    with opened(checkpoint_with(tmp_path / "model", source), tmp_path / "m.gguf") as backend:
        wrong = []
        for text in strings:
            expected = tokenizer.encode(text).ids
            found = backend.tokenize(text.encode(), add_special=True, parse_special=True)
            if found != expected:
                wrong.append((text, found, expected))
            assert b"".join(backend.token_bytes(t, special=True) for t in found) == text.encode()
        assert wrong[:3] == []
    assert check_gguf(tmp_path / "m.gguf").metadata["tokenizer.ggml.pre"] == pre


def test_special_tokens_in_user_text_stay_text_when_not_parsed(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    with opened(make_checkpoint(tiny_config("melt")), tmp_path / "m.gguf") as backend:
        text = b"a<|im_end|>b"
        assert 2 in backend.tokenize(text, add_special=False, parse_special=True)
        plain = backend.tokenize(text, add_special=False, parse_special=False)
        assert not set(plain) & {0, 1, 2}
        assert b"".join(backend.token_bytes(t, special=False) for t in plain) == text


def test_a_post_processor_that_adds_bos(tmp_path: Path) -> None:
    def change(source: dict[str, Any]) -> None:
        source["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
        }

    source = tokenizer_json(change)
    with opened(checkpoint_with(tmp_path / "model", source), tmp_path / "m.gguf") as backend:
        expected = Tokenizer.from_str(source).encode("two words").ids
        assert expected[0] == 1
        assert backend.tokenize(b"two words", add_special=True, parse_special=True) == expected


def test_merges_in_both_spellings_give_the_same_file(tmp_path: Path) -> None:
    def respell(source: dict[str, Any]) -> None:
        merges = source["model"]["merges"]
        pairs = [m.split(" ") if isinstance(m, str) else m for m in merges]
        source["model"]["merges"] = [" ".join(p) for p in pairs] if isinstance(merges[0], list) else pairs

    keys = [keys_of(tmp_path / str(i), tokenizer_json(change))[0] for i, change in enumerate((None, respell))]
    assert keys[0]["tokenizer.ggml.merges"] == keys[1]["tokenizer.ggml.merges"]
    assert len(keys[0]["tokenizer.ggml.merges"]) == VOCAB - 259


def keys_of(folder: Path, tokenizer: str, **options: Any) -> tuple[dict[str, Any], list[str]]:
    """The keys that write_tokenizer adds for a tokenizer.json, and its notes."""
    checkpoint_with(folder, tokenizer, **options)
    writer = gguf.GGUFWriter(None, "ouro")
    with Checkpoint.open(folder) as checkpoint:
        notes = write_tokenizer(writer, checkpoint)
    return {key: value.value for key, value in writer.kv_data[0].items()}, notes


def special(keys: dict[str, Any]) -> tuple[Any, Any, Any]:
    return tuple(keys[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding"))  # type: ignore[return-value]


# --- special ids


@pytest.mark.parametrize("named", ["<|endoftext|>", None])
def test_the_released_ouro_checkpoints_ids_are_corrected(tmp_path: Path, named: str | None) -> None:
    """config.json says 0 for bos, eos and pad: with that eos, chat would never stop."""
    tokens = {f"{role}_token": named for role in ("bos", "eos", "unk")} if named else {}
    keys, notes = keys_of(
        tmp_path / "m",
        tokenizer_json(),
        tokenizer_config={**tokens, "chat_template": CHAT_TEMPLATE},
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    assert special(keys) == (1, 2, 0)
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert any("eos_token_id is 2 '<|im_end|>'" in note and "config.json says 0" in note for note in notes)
    assert any("bos_token_id is 1 '<|im_start|>'" in note for note in notes)


def test_ids_that_are_right_are_left_alone(tmp_path: Path) -> None:
    keys, notes = keys_of(tmp_path / "m", tokenizer_json())
    assert special(keys) == (1, 2, 0)
    assert notes == []


def test_without_a_template_the_tokenizers_own_tokens_count(tmp_path: Path) -> None:
    plain = {f"{role}_token": "<|endoftext|>" for role in ("bos", "eos", "pad")}
    keys, notes = keys_of(
        tmp_path / "a", tokenizer_json(), tokenizer_config=plain, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    assert special(keys) == (0, 0, 0)
    assert notes == ["the checkpoint has no chat template: chat needs one to be given"]
    keys, _ = keys_of(tmp_path / "b", tokenizer_json(), tokenizer_config={"eos_token": {"content": "<|im_end|>"}})
    assert special(keys)[1] == 2


OTHER_TEMPLATES = {
    "ends with eos_token": "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}",
    "tests the content first": (
        "{% for m in messages %}{% if m['content'] is string %}{% set content = m['content'] %}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + content | trim + '<|im_end|>' }}{% endfor %}"
    ),
    "headers closed by a token of their own": (
        "{{ '<|endoftext|>' }}{% for message in messages %}"
        "{{ '<|im_start|>' + message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    ),
}


@pytest.mark.parametrize("name", list(OTHER_TEMPLATES))
def test_the_token_that_ends_a_turn_is_found_in_other_templates(tmp_path: Path, name: str) -> None:
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "chat_template": OTHER_TEMPLATES[name]}
    if name == "ends with eos_token":
        config["eos_token"] = "<|im_end|>"
    keys, _ = keys_of(tmp_path / "m", tokenizer_json(), tokenizer_config=config, bos_token_id=0, eos_token_id=0)
    assert special(keys)[1] == 2


def test_no_end_token_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="names an end token"):
        keys_of(tmp_path / "m", tokenizer_json(), tokenizer_config={}, eos_token_id=None)


# --- template, vocabulary size


def test_templates_from_a_file_and_by_name(tmp_path: Path) -> None:
    named = [{"name": "default", "template": CHAT_TEMPLATE}, {"name": "tool_use", "template": "{{ tools }}"}]
    keys, _ = keys_of(tmp_path / "a", tokenizer_json(), tokenizer_config={"chat_template": named})
    assert keys["tokenizer.chat_template"] == CHAT_TEMPLATE
    assert keys["tokenizer.chat_template.tool_use"] == "{{ tools }}"
    folder = checkpoint_with(tmp_path / "b", tokenizer_json())
    (folder / "chat_template.jinja").write_text("{{ messages[0].content + '<|im_end|>' }}")
    export_gguf(folder, tmp_path / "b.gguf", verify=False)
    assert check_gguf(tmp_path / "b.gguf").metadata["tokenizer.chat_template"].startswith("{{ messages[0]")  # type: ignore[union-attr]
    with pytest.raises(FormatError, match="chat_template is a int"):
        keys_of(tmp_path / "c", tokenizer_json(), tokenizer_config={"chat_template": 7})


def test_missing_ids_become_unused_tokens(tmp_path: Path) -> None:
    folder = checkpoint_with(tmp_path / "model", tokenizer_json(vocab=300), vocab=305)
    report = export_gguf(folder, tmp_path / "m.gguf", type="f32", verify=False)
    meta = check_gguf(tmp_path / "m.gguf").metadata
    assert meta["tokenizer.ggml.tokens"][300:] == [f"[PAD{i}]" for i in range(300, 305)]  # type: ignore[index]
    assert meta["tokenizer.ggml.token_type"][299:] == [1, 5, 5, 5, 5, 5]  # type: ignore[index]
    assert meta["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]  # type: ignore[index]
    assert any("5 of 305" in note for note in report.notes)


def test_an_added_token_that_is_not_special(tmp_path: Path) -> None:
    def change(source: dict[str, Any]) -> None:
        source["added_tokens"].append({**source["added_tokens"][0], "id": 300, "content": "[tool]", "special": False})

    source = tokenizer_json(change, vocab=300)
    with opened(checkpoint_with(tmp_path / "model", source, vocab=301), tmp_path / "m.gguf") as backend:
        expected = Tokenizer.from_str(source).encode("a [tool] b").ids
        assert 300 in expected
        assert backend.tokenize(b"a [tool] b", add_special=True, parse_special=True) == expected
    assert check_gguf(tmp_path / "m.gguf").metadata["tokenizer.ggml.token_type"][300] == 4  # type: ignore[index]


# --- what is refused


def set_in(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(source: dict[str, Any]) -> None:
        for key in path[:-1]:
            source = source[key]
        source[path[-1]] = value

    return change


def twice(source: dict[str, Any]) -> None:
    source["added_tokens"].append({**source["added_tokens"][0], "id": VOCAB - 1})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_in("model", "type", value="Unigram"), "'Unigram', expected a byte-level BPE"),
        (set_in("model", value=None), "expected a byte-level BPE"),
        (set_in("model", "byte_fallback", value=True), "byte_fallback"),
        (set_in("model", "end_of_word_suffix", value="</w>"), "end_of_word_suffix"),
        (set_in("model", "ignore_merges", value=True), "ignore_merges True"),
        (set_in("model", "vocab", value={}), "vocab is missing or empty"),
        (set_in("model", "merges", value=[]), "merges is empty"),
        (set_in("model", "merges", value=["a b c"]), "not a pair"),
        (set_in("model", "merges", value=[["<|", "x"]]), "does not give a token"),
        (set_in("pre_tokenizer", value={"type": "Whitespace"}), "Whitespace"),
        (set_in("pre_tokenizer", value=None), "null"),
        (set_in("pre_tokenizer", value={**GPT2, "add_prefix_space": True}), "add_prefix_space"),
        (set_in("pre_tokenizer", value=split(r"\d+")), "expected one of gpt-2"),
        (set_in("normalizer", value={"type": "Lowercase"}), "Lowercase"),
        (set_in("model", "vocab", "new", value=0), "id 0 is both"),
        (set_in("model", "vocab", "new", value=-1), "an id from 0 on"),
        (set_in("model", "vocab", "new", value=VOCAB), f"id {VOCAB} does not fit vocab_size = {VOCAB}"),
        (twice, "two ids|is both"),
    ],
)
def test_a_tokenizer_llama_cpp_would_not_follow_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    with pytest.raises(FormatError, match=words) as caught:
        keys_of(tmp_path / "m", tokenizer_json(change))
    assert "tokenizer.json" in str(caught.value)


def test_differences_that_remain_are_told(tmp_path: Path) -> None:
    def change(source: dict[str, Any]) -> None:
        source["normalizer"] = {"type": "NFC"}
        source["added_tokens"][0]["rstrip"] = True

    _, notes = keys_of(tmp_path / "m", tokenizer_json(change))
    assert any("NFC" in note for note in notes)
    assert any("strips the blanks" in note for note in notes)


def test_the_tiny_tokenizers_have_exactly_the_tokens_asked_for(tmp_path: Path) -> None:
    for vocab in (259 + 1, 301, 1000):
        tokenizer = Tokenizer.from_str(tiny_tokenizer_json(vocab))
        assert tokenizer.get_vocab_size() == vocab
        text = "What is 12 plus 30?<|im_end|>"
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    with pytest.raises(ValueError, match="at least 259"):
        tiny_checkpoint(tmp_path / "m", tiny_config("ouro", vocab=258))
