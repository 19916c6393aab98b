"""Saved conversations: they come back exactly, and a bad file never costs the live one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import melt_edge
from melt_edge import Model
from melt_edge.errors import BackendError, ConfigError, ContextOverflowError, FormatError, MeltError
from melt_edge.runtime import state
from melt_edge.runtime.state import CacheLayout, check_payload, payload_bytes
from tiny import tiny_config

PROMPT = "What is 12 plus 30? The answer is 42."
OTHER = "A loop is one block of layers"


@pytest.fixture(scope="module", params=["melt", "ouro"])
def model(request: pytest.FixtureRequest, melt_gguf: Path, ouro_gguf: Path) -> Iterator[Model]:
    with melt_edge.load(melt_gguf if request.param == "melt" else ouro_gguf, n_threads=1) as model:
        yield model


@pytest.fixture
def saved(model: Model, tmp_path: Path) -> Path:
    """A state of PROMPT; the live conversation is then OTHER."""
    model.generate(PROMPT, max_tokens=0)
    model.save_state(tmp_path / "saved.state")
    model.generate(OTHER, max_tokens=0)
    return tmp_path / "saved.state"


def next_tokens(model: Model) -> list[int]:
    return model.generate(" so", append=True, max_tokens=6, temperature=0).tokens


def assert_refused(model: Model, path: Path, error: type[MeltError] = FormatError, match: str | None = None) -> None:
    """Loading fails, and the live conversation goes on as it would have."""
    model.generate(OTHER, max_tokens=0)
    expected, live = next_tokens(model), model.tokens
    model.generate(OTHER, max_tokens=0)
    with pytest.raises(error, match=match):
        model.load_state(path)
    assert next_tokens(model) == expected
    assert model.tokens == live


def resealed(path: Path, change: Callable[[bytearray], None]) -> None:
    """Change a container and give it a digest that fits again."""
    data = bytearray(path.read_bytes()[:-32])
    change(data)
    path.write_bytes(data + hashlib.sha256(data).digest())


def header_of(path: Path) -> tuple[int, dict[str, object]]:
    data = path.read_bytes()
    (n_header,) = struct.unpack_from("<I", data, 12)
    return 16 + n_header, json.loads(data[16 : 16 + n_header])


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("flash_attn", [None, True, False])
def test_a_state_comes_back_exactly(melt_gguf: Path, tmp_path: Path, kv_type: str, flash_attn: bool | None) -> None:
    if flash_attn is False and kv_type.startswith("q"):
        with pytest.raises(ConfigError, match="needs flash attention"):
            melt_edge.load(melt_gguf, kv_type=kv_type, flash_attn=False)
        return
    path = tmp_path / "a.state"
    with melt_edge.load(melt_gguf, kv_type=kv_type, flash_attn=flash_attn, n_threads=1) as model:
        model.generate(PROMPT, max_tokens=3, temperature=0)
        tokens = model.tokens
        model.save_state(path)
        expected = next_tokens(model)
        model.generate(OTHER, max_tokens=0)
        model.load_state(path)
        assert model.tokens == tokens
        assert next_tokens(model) == expected
    with melt_edge.load(melt_gguf, kv_type=kv_type, flash_attn=flash_attn, n_ctx=64, n_threads=1) as again:
        again.load_state(path)
        assert next_tokens(again) == expected


def test_an_empty_conversation_can_be_saved(model: Model, tmp_path: Path) -> None:
    model.reset()
    model.save_state(tmp_path / "empty.state")
    model.generate(OTHER, max_tokens=0)
    model.load_state(tmp_path / "empty.state")
    assert model.tokens == []
    assert model.generate(PROMPT, append=True, max_tokens=2).finish_reason == "length"


def test_continuing_needs_at_least_one_token(model: Model, saved: Path) -> None:
    model.load_state(saved)
    with pytest.raises(ConfigError, match="no tokens"):
        model.generate([], append=True)


def test_truncations_are_refused(model: Model, saved: Path, tmp_path: Path) -> None:
    data = saved.read_bytes()
    start, header = header_of(saved)
    n_tokens = header["n_tokens"]
    assert isinstance(n_tokens, int)
    places = [0, 4, 8, 15, 16, start - 1, start, start + 5, start + 4 * n_tokens, len(data) // 2, len(data) - 33]
    for place in [*places, len(data) - 32, len(data) - 1]:
        cut = tmp_path / "cut.state"
        cut.write_bytes(data[:place])
        with pytest.raises(FormatError, match=r"cut\.state"):
            model.load_state(cut)
    cut.write_bytes(data[: len(data) // 2])
    assert_refused(model, cut, match="cut off")
    cut.write_bytes(data + b"x")
    assert_refused(model, cut, match="appended")


def test_flipped_bytes_are_refused(model: Model, saved: Path, tmp_path: Path) -> None:
    data = saved.read_bytes()
    flipped = tmp_path / "flipped.state"
    for place in [*np.random.default_rng(0).integers(0, len(data), 60).tolist(), 0, 9, 13, 20, len(data) - 1]:
        changed = bytearray(data)
        changed[place] ^= 1 << (place % 8)
        flipped.write_bytes(changed)
        with pytest.raises(FormatError):
            model.load_state(flipped)
    assert_refused(model, flipped)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", "0" * 64, "saved with model file"),
        ("architecture", "llama", "saved with architecture llama"),
        ("num_loops", 3, "saved with number of loops 3"),
        ("kv_type", "q4_0", "saved with cache type q4_0"),
        ("n_tokens", -1, "negative"),
        ("n_tokens", "7", "other keys"),
        ("payload_bytes", 2**60, "bytes of cache rows"),
    ],
)
def test_headers_of_other_models_are_refused(model: Model, saved: Path, key: str, value: object, message: str) -> None:
    start, header = header_of(saved)
    new = json.dumps({**header, key: value}).encode()

    def change(data: bytearray) -> None:
        data[12:start] = struct.pack("<I", len(new)) + new

    resealed(saved, change)
    assert_refused(model, saved, match=message)


def test_more_tokens_than_the_context_are_refused(melt_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.state"
    with melt_edge.load(melt_gguf, n_threads=1) as model:
        model.generate([5] * 60, max_tokens=0)
        model.save_state(path)
    with melt_edge.load(melt_gguf, n_ctx=40, n_threads=1) as small:
        assert_refused(small, path, ContextOverflowError, "60 tokens.*room for 40")


@pytest.mark.parametrize("arch", ["melt", "ouro"])
def test_a_context_shorter_than_a_chunk_is_no_other_chunk(
    arch: str, make_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    """The chunk was compared after it had been limited to the context."""
    gguf = make_gguf(tiny_config("melt", chunk_size=100) if arch == "melt" else tiny_config("ouro"))
    path = tmp_path / "a.state"
    with melt_edge.load(gguf, n_threads=1) as model:
        model.generate([5] * 30, max_tokens=0)
        model.save_state(path)
    with melt_edge.load(gguf, n_ctx=40, n_threads=1) as shorter:
        shorter.load_state(path)
        assert shorter.tokens == [5] * 30
    with melt_edge.load(gguf, n_ctx=20, n_threads=1) as short:
        assert_refused(short, path, ContextOverflowError, "30 tokens.*room for 20")


def test_an_ouro_state_takes_any_chunk(ouro_gguf: Path, tmp_path: Path) -> None:
    with melt_edge.load(ouro_gguf, n_threads=1) as model:
        model.generate(PROMPT, max_tokens=0)
        model.save_state(tmp_path / "a.state")
        expected = next_tokens(model)
    with melt_edge.load(ouro_gguf, chunk_size=4, n_threads=1) as other:
        other.load_state(tmp_path / "a.state")
        assert next_tokens(other) == expected


def test_states_of_another_model_or_setting_are_refused(
    make_gguf: Callable[..., Path], melt_gguf: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.state"
    with melt_edge.load(melt_gguf, n_threads=1) as model:
        model.generate(PROMPT, max_tokens=0)
        model.save_state(path)
    others: list[tuple[Path, dict[str, object], str]] = [
        (make_gguf(tiny_config("melt"), seed=1), {}, "model file"),
        (make_gguf(tiny_config("ouro")), {}, "architecture"),
        (melt_gguf, {"loops": 2}, "number of loops"),
        (melt_gguf, {"chunk_size": 4}, "chunk size"),
        (melt_gguf, {"kv_type": "f32"}, "cache type"),
        (melt_gguf, {"flash_attn": False}, "V layout"),
    ]
    for file, options, message in others:
        with melt_edge.load(file, n_threads=1, **options) as other:  # type: ignore[arg-type]
            assert_refused(other, path, match=message)


def test_payloads_with_a_fitting_digest_are_walked(model: Model, saved: Path) -> None:
    start, header = header_of(saved)
    assert isinstance(header["n_tokens"], int)
    n_tokens = header["n_tokens"]
    at = start + 4 * n_tokens
    original = saved.read_bytes()
    cells = at + 16
    layers = cells + 12 * n_tokens
    for place, form, value, message in [
        (at, "<I", 1, "magic"),
        (at + 8, "<I", 2, "stream count"),
        (at + 12, "<I", 2**31, "cell count"),
        (cells + 12, "<i", 0, "positions"),
        (cells + 4, "<I", 9, "positions"),
        (layers + 4, "<I", 512, "slot count"),
        (layers + 8, "<i", 8, "K type"),
        (layers + 12, "<Q", 2**40, "K row size"),
        (layers + 20, "<H", 0x7E00, "not finite"),
    ]:
        saved.write_bytes(original)
        resealed(saved, lambda data, p=place, f=form, v=value: struct.pack_into(f, data, p, v))  # type: ignore[misc]
        assert_refused(model, saved, match=message)


def test_the_walk_reads_to_the_last_byte() -> None:
    layout = CacheLayout(n_slots=1, row_values=32, kv_type="q8_0", v_transposed=False)
    with pytest.raises(FormatError, match="magic"):
        check_payload(np.zeros(payload_bytes(layout, 2), np.uint8), 2, layout, source="s")
    start = np.frombuffer(struct.pack("<IIII", state.SEQUENCE_MAGIC, 0, 1, 0), np.uint8)
    check_payload(start, 0, layout, source="s")
    with pytest.raises(FormatError, match="1 bytes after"):
        check_payload(np.append(start, np.uint8(0)), 0, layout, source="s")


def test_a_restore_the_library_refuses_brings_the_old_conversation_back(
    model: Model, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    low = model._open._low  # type: ignore[union-attr]
    real = low.llama_state_seq_set_data
    calls: list[int] = []

    def refuse_once(*arguments: object) -> int:
        calls.append(1)
        return 0 if len(calls) == 1 else int(real(*arguments))

    monkeypatch.setattr(low, "llama_state_seq_set_data", refuse_once)
    assert_refused(model, saved, BackendError, "the conversation is kept")
    assert len(calls) == 2


def test_a_full_disk_is_a_typed_error_and_keeps_the_old_file(
    model: Model, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()
    live = model.tokens

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        model.save_state(saved, force=True)
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]
    assert model.tokens == live
    model.load_state(saved)


def test_a_write_that_does_not_read_back_is_an_error(
    model: Model, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()
    monkeypatch.setattr(state, "_digest_of", lambda file, path: (b"", b"other"))
    with pytest.raises(FormatError, match="does not read back"):
        model.save_state(saved, force=True)
    assert saved.read_bytes() == before


def test_an_existing_file_needs_force(model: Model, saved: Path) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        model.save_state(saved)
    model.save_state(saved, force=True)
    with pytest.raises(ConfigError, match="folder"):
        model.save_state(saved.parent / "missing" / "a.state")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"\x80\x04pickle", b"MELTSTAT" + b"\xff" * 64])
def test_other_files_are_no_states(model: Model, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    assert_refused(model, path)
    with pytest.raises(FormatError, match="cannot be read"):
        model.load_state(tmp_path / "nowhere")
