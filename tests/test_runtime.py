"""Loading, its arguments, numbers and bytes; the library's identity; what happens after close."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import melt_edge
from melt_edge import Model
from melt_edge.checkpoint import load_model
from melt_edge.config import LoopConfig
from melt_edge.errors import (
    AbiMismatchError,
    BackendError,
    BackendUnavailableError,
    ConfigError,
    ContextOverflowError,
    FormatError,
    MemoryBudgetError,
)
from melt_edge.runtime import library, machine, memory
from melt_edge.runtime.gguf_check import check_gguf, config_from_gguf
from melt_edge.runtime.memory import KV_TYPES, estimate, padded_ctx
from tiny import tiny_config

PROMPT = "What is 12 plus 30?"
torch.set_num_threads(1)  # a second thread only spins for matrices this small


@pytest.fixture(scope="module")
def model(melt_gguf: Path) -> Iterator[Model]:
    with melt_edge.load(melt_gguf, n_threads=1) as model:
        yield model


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


# -- import and library


def test_import_is_light() -> None:
    done = python(
        "import sys, melt_edge; dir(melt_edge); "
        "assert not {'torch', 'llama_cpp', 'numpy', 'onnxruntime'} & set(sys.modules); print(melt_edge.__version__)"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = melt_edge.nothing_here


def test_loading_and_generating_say_nothing_on_stderr(melt_gguf: Path) -> None:
    done = python(
        f"import melt_edge\nwith melt_edge.load({str(melt_gguf)!r}, loops=2) as model:\n"
        "    model.generate('hi', max_tokens=2)"
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


def test_llama_cpp_imported_before_with_another_library_is_explained(tmp_path: Path) -> None:
    # A foreign build looks like this to us: a loaded llama_cpp without our symbol.
    done = python(
        "import sys, types\n"
        "low = types.SimpleNamespace(_lib=types.SimpleNamespace(_name='/elsewhere/libllama.so'))\n"
        "sys.modules['llama_cpp'] = types.SimpleNamespace(llama_cpp=low, __version__='0')\n"
        "from melt_edge.runtime.library import import_llama_cpp\n"
        "from melt_edge.errors import BackendUnavailableError\n"
        "try:\n    import_llama_cpp()\nexcept BackendUnavailableError as err:\n    print(err)"
    )
    assert "another library (/elsewhere/libllama.so)" in done.stdout, done.stderr
    assert "before importing llama_cpp" in done.stdout
    assert "LLAMA_CPP_LIB_PATH=" in done.stdout


def test_a_missing_library_is_explained(tmp_path: Path) -> None:
    code = (
        "from melt_edge.runtime.library import import_llama_cpp\n"
        "from melt_edge.errors import BackendUnavailableError\n"
        "try:\n    import_llama_cpp()\nexcept BackendUnavailableError as err:\n    print(err)"
    )
    assert "is missing (expected in" in python(code, MELT_EDGE_LIB=str(tmp_path / "nowhere")).stdout
    (tmp_path / "libllama.so").write_bytes(b"no library")
    (tmp_path / "libllama.dylib").write_bytes(b"no library")
    assert "cannot be loaded" in python(code, MELT_EDGE_LIB=str(tmp_path)).stdout


def test_a_library_of_another_version_or_layout_is_refused() -> None:
    module = library.import_llama_cpp()
    native = library.build_info(module)
    same = {key: native[key] for key in ("llama_cpp_python", "sizeof", "sources_sha256")}
    library.check_build(native, same)
    assert native["sizeof"]["llama_batch"] == ctypes.sizeof(module.llama_cpp.llama_batch)
    sizes = {**native["sizeof"], "llama_context_params": 1}
    with pytest.raises(AbiMismatchError, match=r"'9\.9'.*struct llama_context_params has 1 bytes"):
        library.check_build({"llama_cpp_python": "9.9", "sizeof": sizes}, same)
    with pytest.raises(AbiMismatchError, match="has None bytes"):
        library.check_build({"llama_cpp_python": module.__version__, "sizeof": "x"}, same)
    with pytest.raises(AbiMismatchError, match="has no melt_edge_nothing"):
        library.native_function("melt_edge_nothing", ctypes.c_int)


def test_llama_cpps_log_goes_to_logging(melt_gguf: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="melt_edge.llama"), melt_edge.load(melt_gguf, n_threads=1):
        pass
    lines = [record.message for record in caplog.records if record.name == "melt_edge.llama"]
    assert any("n_ctx" in line for line in lines)
    assert all("\n" not in line for line in lines)


# -- load's arguments


def test_info_tells_what_was_loaded(model: Model, melt_gguf: Path) -> None:
    info = model.info
    assert (info.architecture, info.path, info.backend) == ("melt", melt_gguf, "llama")
    assert (info.num_loops, info.trained_loops, info.chunk_size, info.trained_chunk_size) == (4, 4, 8, 8)
    assert (info.n_ctx, info.n_ctx_train, info.n_layer, info.n_vocab) == (512, 512, 2, 301)
    assert (info.quantisation, info.kv_type, info.kv_gate, info.n_threads) == ("f32", "f16", "elementwise", 1)
    assert info.file_bytes == melt_gguf.stat().st_size
    assert "melt" in repr(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_ctx": -1}, "n_ctx is -1"),
        ({"n_ctx": 2**31}, "n_ctx is 2147483648"),
        ({"n_ctx": "8"}, "n_ctx is '8'"),
        ({"loops": 0}, "loops is 0, expected a whole number from 1 to 64"),
        ({"loops": 65}, "loops is 65"),
        ({"loops": True}, "loops is True"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"chunk_size": 65, "n_ctx": 64}, "expected a whole number from 1 to n_ctx = 64"),
        ({"kv_type": "q5_0"}, "kv_type is 'q5_0'"),
        ({"n_threads": 0}, "n_threads is 0"),
        ({"n_gpu_layers": -2}, "n_gpu_layers is -2"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_arguments_are_named(melt_gguf: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        melt_edge.load(melt_gguf, **options)


@pytest.mark.parametrize(
    "options",
    [
        *({name: 10**5000} for name in ("n_ctx", "chunk_size", "loops", "n_threads", "n_gpu_layers", "seed")),
        *({name: True} for name in ("n_ctx", "chunk_size", "loops", "n_threads", "n_gpu_layers", "seed")),
        {"seed": 2**70},
        {"kv_type": []},
        {"flash_attn": "no"},
    ],
    ids=lambda options: f"{next(iter(options))}-{type(next(iter(options.values()))).__name__}",
)
def test_odd_arguments_are_typed_errors(melt_gguf: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"{next(iter(options))} is .*expected"):
        melt_edge.load(melt_gguf, **options)


@pytest.mark.parametrize("path", [5, None, b"model.gguf", "a\0b"])
def test_what_is_no_path_is_a_typed_error(model: Model, path: Any) -> None:
    for call in (melt_edge.load, model.save_state, model.load_state):
        with pytest.raises(ConfigError, match=r"path is .*expected a path as text"):
            call(path)


def test_what_is_no_text_is_a_typed_error(model: Model) -> None:
    for text in (None, 5, ["a"]):
        with pytest.raises(ConfigError, match="expected str or bytes"):
            model.tokenize(text)  # type: ignore[arg-type]


def test_an_unknown_backend_is_named(melt_gguf: Path) -> None:
    with pytest.raises(BackendUnavailableError, match="backend is 'tpu', expected one of llama"):
        melt_edge.load(melt_gguf, backend="tpu")
    with pytest.raises(BackendUnavailableError, match="backend is 5"):
        melt_edge.load(melt_gguf, backend=5)  # type: ignore[arg-type]


def test_the_loops_of_an_ouro_of_many_layers_end_earlier(make_gguf: Callable[..., Path]) -> None:
    """It was the number of layers that the error blamed."""
    deep = {"layers": 10, "hidden_size": 16, "n_head": 1, "n_head_kv": 1}
    path = make_gguf(tiny_config("ouro", **deep))
    expected = r"loops is 52, expected a whole number from 1 to 512 layer slots in llama\.cpp / 10 layers = 51"
    with pytest.raises(ConfigError, match=expected):
        melt_edge.load(path, loops=52)
    with melt_edge.load(path, loops=51, n_threads=1) as model:
        assert model.info.num_loops == 51
    with melt_edge.load(make_gguf(tiny_config("melt", **deep)), loops=64, n_threads=1) as model:
        assert model.info.num_loops == 64


def test_a_cache_type_that_does_not_divide_the_head_is_refused(make_gguf: Callable[..., Path]) -> None:
    path = make_gguf(tiny_config("melt", head_dim=16))
    with pytest.raises(ConfigError, match="head size divisible by 32, this model's is 16"):
        melt_edge.load(path, kv_type="q8_0")


def test_files_that_are_no_models_are_format_errors(tmp_path: Path) -> None:
    for content in (b"", b"GGUF", b"\x80\x04pickle"):
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(FormatError, match=r"x\.gguf"):
            melt_edge.load(tmp_path / "x.gguf")
    with pytest.raises(FormatError, match="cannot be read"):
        melt_edge.load(tmp_path / "nowhere.gguf")


def test_a_nan_in_the_weights_is_llama_cpps_reason(melt_gguf: Path, tmp_path: Path) -> None:
    info = check_gguf(melt_gguf)
    tensor = next(entry for entry in info.tensors if entry.name == "blk.0.attn_q.weight")
    data = bytearray(melt_gguf.read_bytes())
    start = info.data_offset + tensor.offset
    data[start : start + 4] = np.float32("nan").tobytes()
    bad = tmp_path / "nan.gguf"
    bad.write_bytes(data)
    with pytest.raises(BackendError, match=r"nan\.gguf: llama\.cpp cannot load this file: .*(invalid|nan)"):
        melt_edge.load(bad)


def test_loops_outside_the_trained_count_warn(melt_gguf: Path, caplog: pytest.LogCaptureFixture) -> None:
    with melt_edge.load(melt_gguf, loops=2, n_threads=1) as model:
        assert (model.info.num_loops, model.info.trained_loops) == (2, 4)
    assert "running with 2 loops a model trained with 4" in caplog.text
    caplog.clear()
    with melt_edge.load(melt_gguf, loops=4, n_threads=1):
        assert "loops" not in caplog.text


def test_n_ctx_zero_takes_the_files_length_and_a_longer_one_warns(
    melt_gguf: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with melt_edge.load(melt_gguf, n_ctx=0, n_threads=1) as model:
        assert model.info.n_ctx == 512
        assert "n_ctx" not in "".join(record.message for record in caplog.records if "options" in record.name)
    with melt_edge.load(melt_gguf, n_ctx=600, n_threads=1) as model:
        assert model.info.n_ctx == 600
    assert "n_ctx is 600, the model was trained for 512" in caplog.text


def test_a_long_files_default_context_is_capped(make_gguf: Callable[..., Path]) -> None:
    with melt_edge.load(make_gguf(tiny_config("melt", max_position_embeddings=65536)), n_threads=1) as model:
        assert (model.info.n_ctx, model.info.n_ctx_train) == (4096, 65536)


def test_a_context_that_does_not_fit_names_the_numbers(melt_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 2**20)
    with pytest.raises(
        MemoryBudgetError, match=r"needs about .* MiB .*cache of 512 tokens in f16.*n_ctx below 512.*q8_0"
    ):
        melt_edge.load(melt_gguf)
    monkeypatch.setattr(memory, "available_bytes", lambda: None)  # a system that does not say
    with melt_edge.load(melt_gguf, n_threads=1) as model:
        monkeypatch.setattr(memory, "available_bytes", lambda: 100)
        with pytest.raises(MemoryBudgetError, match="logits of 3 tokens"):
            model.logits([1, 2, 3])


def test_huge_contexts_are_refused_before_anything_is_allocated(make_gguf: Callable[..., Path]) -> None:
    path = make_gguf(tiny_config("ouro", max_position_embeddings=65536))
    before = machine.rss_bytes()
    with pytest.raises(MemoryBudgetError, match="MiB"):
        melt_edge.load(path, n_ctx=2**31 - 1)
    assert machine.rss_bytes() - before < 64 * 2**20


# -- memory


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
@pytest.mark.parametrize("arch", ["melt", "ouro"])
def test_cache_bytes_per_loop_count(arch: str, kv_type: str, melt_gguf: Path, ouro_gguf: Path) -> None:
    _, block, block_bytes = KV_TYPES[kv_type]
    one_plane = 2 * 2 * 2 * 32 // block * block_bytes * 512  # layers, K and V, heads, head size, tokens
    for loops in (1, 2, 4, 8):
        path = melt_gguf if arch == "melt" else ouro_gguf
        with melt_edge.load(path, loops=loops, kv_type=kv_type, n_threads=1) as model:
            found = model.memory()
        assert found.kv_bytes == one_plane * (loops if arch == "ouro" else 1)
        assert found.weights_bytes > 0
        assert found.compute_bytes > 0
        assert found.rss_bytes > found.weights_bytes


@pytest.mark.parametrize("flash_attn", [True, False])
@pytest.mark.parametrize("arch", ["melt", "ouro"])
def test_the_estimate_covers_what_the_library_takes(
    arch: str, flash_attn: bool, melt_gguf: Path, ouro_gguf: Path
) -> None:
    info = check_gguf(melt_gguf if arch == "melt" else ouro_gguf)
    config = config_from_gguf(info)
    with melt_edge.load(info.path, n_ctx=512, chunk_size=256, flash_attn=flash_attn, n_threads=1) as model:
        found = model.memory()
    guess = estimate(info, config, n_ctx=512, n_ubatch=256, n_batch=512, kv_type="f16", flash_attn=flash_attn)
    assert guess.kv_bytes == found.kv_bytes
    assert guess.weights_bytes >= found.weights_bytes
    assert guess.compute_bytes >= found.compute_bytes


def test_machine_facts_are_plausible() -> None:
    assert 1 <= machine.usable_cores() <= (os.cpu_count() or 1)
    assert machine.rss_bytes() > 2**20
    available = machine.available_bytes()
    assert available is None or available > 2**20
    assert padded_ctx(1) == 256 == padded_ctx(256)


def test_container_limits_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 250\nactive_file 50\n")
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert machine.available_bytes() == 600
    assert machine.usable_cores() == 1
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.available_bytes() != 600


# -- numbers


@pytest.mark.parametrize("chunk_size", [1, 3, 8, 64])
@pytest.mark.parametrize("arch", ["melt", "ouro"])
def test_logits_equal_the_reference(
    arch: str, chunk_size: int, make_gguf: Callable[..., Path], make_checkpoint: Callable[..., Path]
) -> None:
    config: LoopConfig = tiny_config(arch)
    tokens = np.random.default_rng(0).integers(3, 301, 45).tolist()
    with torch.no_grad():
        reference = load_model(make_checkpoint(config))
        expected = reference(torch.tensor([tokens]), chunk_size=chunk_size).logits[0].numpy()
    with melt_edge.load(make_gguf(config), chunk_size=chunk_size, kv_type="f32", n_ctx=64, n_threads=1) as model:
        found = model.logits(tokens)
        assert found.shape == (45, 301)
        assert found.dtype == np.float32
        assert model.tokens == tokens
        assert np.abs(found - expected).max() < 1e-3 * expected.std()
    # The same comparison sees one scaled norm of one layer.
    with torch.no_grad():
        reference.state_dict()["model.layers.1.input_layernorm_2.weight"].mul_(1.05)
        other = reference(torch.tensor([tokens]), chunk_size=chunk_size).logits[0].numpy()
    assert np.abs(found - other).max() > 1e-3 * expected.std()


def test_logits_take_pieces_larger_than_a_batch(melt_gguf: Path) -> None:
    with melt_edge.load(melt_gguf, chunk_size=100, n_threads=1) as model:
        tokens = [4 + at % 250 for at in range(512)]  # a batch is 500: 5 whole chunks
        whole = model.logits(tokens)
        assert model.llama.n_batch == 500
        model.llama.reset()
        model.generate(tokens[:500], max_tokens=0)
        assert np.allclose(whole[499], model.llama._ctx.get_logits_ith(-1)[:301], atol=1e-5)


@pytest.mark.parametrize("tokens", [[301], [-1], [1.5], [[1, 2]], ["a"], [[1, 2], [3]], [10**30], None])
def test_foreign_token_ids_are_refused(model: Model, tokens: list[Any]) -> None:
    for call in (model.logits, model.generate, model.detokenize):
        with pytest.raises(ConfigError, match="token"):
            call(tokens)


def test_logits_need_tokens_that_fit(model: Model) -> None:
    with pytest.raises(ConfigError, match="no tokens"):
        model.logits([])
    with pytest.raises(ContextOverflowError, match="513 tokens"):
        model.logits([4] * 513)


def test_embedding_is_the_normalised_mean_of_the_last_states(
    melt_gguf: Path, melt_checkpoint: Path, model: Model
) -> None:
    vector = model.embed(PROMPT)
    assert vector.shape == (64,)
    assert vector.dtype == np.float32
    assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-6)
    assert model.tokens == []
    rows = model._backend().embed(model.tokenize(PROMPT))
    head = load_model(melt_checkpoint).state_dict()["lm_head.weight"].numpy()
    # The head turns these rows into the logits, so they are the normed output of the last loop.
    assert np.allclose(rows @ head.T, model.logits(model.tokenize(PROMPT)), atol=1e-3)
    mean = rows.mean(axis=0)
    assert np.allclose(vector, mean / np.linalg.norm(mean), atol=1e-6)
    # And the context is back to normal.
    assert len(model.generate(PROMPT, max_tokens=3, temperature=0).tokens) == 3


def test_tokens_and_text_go_both_ways(model: Model) -> None:
    text = "Tom has 3 apples;\n  naïve 漢字 😀\t<|im_end|>"
    tokens = model.tokenize(text)
    assert model.detokenize(tokens, special=True) == text
    assert model.detokenize(tokens) == text.removesuffix("<|im_end|>")
    assert 2 in tokens
    assert 2 not in model.tokenize(text, parse_special=False)
    assert model.tokenize("") == []
    assert model.tokenize(b"a\xff") == model.tokenize("a\ufffd")
    assert model.tokenize("a\ud800") == model.tokenize("a?")  # a lone surrogate has no bytes


# -- life of a model


def test_the_bindings_object_stays_usable(model: Model) -> None:
    llama = model.llama
    done = llama("What is", max_tokens=3, temperature=0)
    assert done["choices"][0]["finish_reason"] in ("length", "stop")
    chat = llama.create_chat_completion([{"role": "user", "content": "hi"}], max_tokens=3)
    assert chat["choices"][0]["message"]["role"] == "assistant"
    assert llama.model_params.check_tensors
    assert not any(key.startswith("tokenizer.chat_template") for key in llama.metadata)
    assert llama.n_batch % model.info.chunk_size == 0
    assert len(model.generate(PROMPT, max_tokens=3, temperature=0).tokens) == 3


def test_reset_empties_the_cache(model: Model) -> None:
    model.generate(PROMPT, max_tokens=1)
    assert model.tokens
    model.reset()
    assert model.tokens == []


def test_a_failed_decode_is_a_typed_error_and_the_model_goes_on(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(batch: object) -> None:
        raise RuntimeError("llama_decode returned -3")

    monkeypatch.setattr(model.llama._ctx, "decode", fail)
    with pytest.raises(BackendError, match="could not evaluate 15 tokens: llama_decode returned -3"):
        model.generate(PROMPT)
    with pytest.raises(BackendError, match="could not evaluate 2 tokens"):
        model.logits([4, 5])
    monkeypatch.undo()
    assert model.generate(PROMPT, max_tokens=2).finish_reason == "length"


def test_use_after_close_is_a_typed_error(melt_gguf: Path, tmp_path: Path) -> None:
    with melt_edge.load(melt_gguf, n_threads=1) as model:
        stream = model.stream(PROMPT, max_tokens=5)
    model.close()
    assert repr(model) == "<Model closed>"
    calls: list[Callable[[], object]] = [
        lambda: model.generate("a"),
        lambda: model.chat([{"role": "user", "content": "a"}]),
        lambda: model.logits([1]),
        lambda: model.embed("a"),
        lambda: model.tokenize("a"),
        lambda: model.detokenize([1]),
        lambda: model.save_state(tmp_path / "s"),
        lambda: model.load_state(tmp_path / "s"),
        lambda: model.memory(),
        lambda: model.info,
        lambda: model.llama,
        model.reset,
    ]
    for call in calls:
        with pytest.raises(BackendError, match="closed"):
            call()
    with pytest.raises(BackendError, match="used by another call"):
        next(stream)


def test_threads_take_turns(model: Model) -> None:
    tokens = model.tokenize(PROMPT)
    expected = model.logits(tokens)
    results: list[Any] = []

    def work() -> None:
        results.extend(np.array_equal(model.logits(tokens), expected) for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 15


def test_build_info_is_json_of_the_pin() -> None:
    info = library.build_info(library.import_llama_cpp())
    assert set(info) >= {"llama_cpp_python", "llama_cpp_commit", "sources_sha256", "sizeof"}
    assert json.loads(json.dumps(info)) == info
