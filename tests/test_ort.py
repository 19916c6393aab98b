"""The onnxruntime backend: the reference's numbers, llama.cpp's text, the cache's rules, early exit, providers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import melt_edge
from melt_edge import Model
from melt_edge.checkpoint import load_model
from melt_edge.errors import (
    BackendError,
    BackendUnavailableError,
    ConfigError,
    ContextOverflowError,
    FormatError,
    MemoryBudgetError,
)
from melt_edge.modeling import LoopLM
from melt_edge.runtime import ort_buffers, ort_session
from melt_edge.runtime.ort import OrtBackend
from tiny import tiny_config

PROMPT = "What is 12 plus 30? The answer is 42."
LIMIT = 1e-3  # of the logits' standard deviation
torch.set_num_threads(1)

MODELS = {
    "melt": tiny_config("melt"),
    "melt-input": tiny_config("melt", kv_gate_init="input"),
    "melt-none": tiny_config("melt", kv_gate="none", tied=True),
    "melt-portable": tiny_config("melt", head_dim=12, num_loops=3),
    "ouro": tiny_config("ouro", n_head_kv=4, head_dim=16),
}


@pytest.fixture(scope="module")
def model(melt_onnx: Path) -> Iterator[Model]:
    with melt_edge.load(melt_onnx, n_threads=1) as model:
        yield model


@pytest.fixture(scope="module", params=["melt", "ouro"])
def pair(
    request: pytest.FixtureRequest, make_onnx: Callable[..., Path], make_gguf: Callable[..., Path]
) -> Iterator[tuple[Model, Model]]:
    """The same weights in onnxruntime and in llama.cpp, both in float32."""
    config = tiny_config(request.param)
    with (
        melt_edge.load(make_onnx(config), n_threads=1) as here,
        melt_edge.load(make_gguf(config), n_threads=1, n_ctx=128, kv_type="f32") as there,
    ):
        yield here, there


def backend_of(model: Model) -> OrtBackend:
    backend = model._backend()
    assert isinstance(backend, OrtBackend)
    return backend


def distance(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    return float(np.abs(found - expected).max() / expected.std())


def reference_logits(model: LoopLM, tokens: list[int], chunks: list[int]) -> np.ndarray[Any, Any]:
    cache = model.new_cache()
    with torch.no_grad():
        parts = [
            model(part, cache, chunk_size=part.shape[1]).logits for part in torch.tensor([tokens]).split(chunks, 1)
        ]
    return torch.cat(parts, dim=1)[0].numpy()


# -- numbers


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_references(
    make_onnx: Callable[..., Path], make_checkpoint: Callable[..., Path], name: str, chunk: int
) -> None:
    """A prompt in chunks by logits and by eval, then one token at a time."""
    config = MODELS[name]
    reference = load_model(make_checkpoint(config))
    folder = make_onnx(config, portable=name == "melt-portable")
    with melt_edge.load(folder, n_threads=1, chunk_size=chunk) as model:
        tokens = model.tokenize(PROMPT)
        n_prompt = len(tokens) - 5
        cuts = [chunk] * (n_prompt // chunk) + ([n_prompt % chunk] if n_prompt % chunk else [])
        expected = reference_logits(reference, tokens, cuts + [1] * 5)
        assert distance(model.logits(tokens[:n_prompt]), expected[:n_prompt]) < LIMIT
        backend = backend_of(model)
        backend.reset()
        backend.eval(tokens[:n_prompt])
        rows = [backend.last_logits().copy()]
        for token in tokens[n_prompt:]:
            backend.eval([token])
            rows.append(backend.last_logits().copy())
        assert distance(np.stack(rows), expected[n_prompt - 1 :]) < LIMIT
        assert model.tokens == tokens


def test_another_weight_gives_other_logits(make_onnx: Callable[..., Path], model: Model) -> None:
    """The twin of the test above: it can fail."""
    tokens = model.tokenize(PROMPT)
    with melt_edge.load(make_onnx(tiny_config("melt"), seed=1), n_threads=1) as other:
        assert distance(other.logits(tokens), model.logits(tokens)) > LIMIT


@pytest.mark.parametrize("loops", [1, 2, 7])
def test_loops_are_chosen_at_run_time(
    make_onnx: Callable[..., Path], make_checkpoint: Callable[..., Path], loops: int
) -> None:
    for arch in ("melt", "ouro"):
        config = tiny_config(arch)
        reference = load_model(make_checkpoint(config))
        reference.config = config.with_loops(loops)
        with melt_edge.load(make_onnx(config), n_threads=1, loops=loops) as model:
            tokens = model.tokenize(PROMPT)[:8]
            assert distance(model.logits(tokens), reference_logits(reference, tokens, [8])) < LIMIT
            assert (model.info.num_loops, model.info.trained_loops) == (loops, 4)


def test_the_files_threshold_chooses_the_loop_that_is_read(
    make_onnx: Callable[..., Path], make_checkpoint: Callable[..., Path]
) -> None:
    for arch in ("melt", "ouro"):
        config = tiny_config(arch, early_exit_threshold=0.6)
        reference = load_model(make_checkpoint(config))
        with melt_edge.load(make_onnx(config), n_threads=1) as model:
            tokens = model.tokenize(PROMPT)[:8]
            assert distance(model.logits(tokens), reference_logits(reference, tokens, [8])) < LIMIT
            assert backend_of(model).raw().counters.loops == 4  # read early, but all run


def test_embeddings_are_the_other_backends(pair: tuple[Model, Model]) -> None:
    here, there = (model.embed(PROMPT) for model in pair)
    assert np.abs(here - there).max() < 1e-5
    assert pair[0].tokens == []


def test_state_bytes_do_not_depend_on_the_loops(melt_onnx: Path, ouro_onnx: Path) -> None:
    def kv_bytes(folder: Path, loops: int) -> int:
        with melt_edge.load(folder, loops=loops, n_threads=1) as model:
            model.generate(PROMPT, max_tokens=4)
            return model.memory().kv_bytes

    expected = 2 * 2 * 2 * 32 * 128 * 4  # layers, K and V, heads, head size, tokens, float32
    assert {kv_bytes(melt_onnx, loops) for loops in (1, 2, 4, 8)} == {expected}
    assert [kv_bytes(ouro_onnx, loops) for loops in (1, 2, 4, 8)] == [expected * loops for loops in (1, 2, 4, 8)]


# -- text


def same_text(pair: tuple[Model, Model], **options: Any) -> str:
    here, there = (model.generate(PROMPT, **options) for model in pair)
    assert here.tokens == there.tokens
    assert (here.text, here.finish_reason) == (there.text, there.finish_reason)
    return here.text


def test_the_same_seed_gives_llama_cpps_text(pair: tuple[Model, Model]) -> None:
    assert pair[0].sampling_defaults == pair[1].sampling_defaults
    texts = {same_text(pair, max_tokens=24, seed=seed) for seed in range(6)}
    assert len(texts) > 3
    same_text(pair, max_tokens=24, temperature=0)
    same_text(pair, max_tokens=24, seed=1, temperature=1.5, top_k=0, top_p=1.0, min_p=0.01, repeat_penalty=1.3)
    same_text(pair, max_tokens=24, temperature=0, repeat_penalty=1.5, stop=["e", "1"])


def test_grammars_and_schemas_hold(pair: tuple[Model, Model]) -> None:
    assert same_text(pair, max_tokens=8, seed=3, grammar='root ::= "yes" | "no"') in ("yes", "no")
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    assert same_text(pair, max_tokens=40, temperature=0, json_schema=schema).replace(" ", "") in ('{"a":1}', '{"a":2}')


def test_chats_and_tokens_are_llama_cpps(pair: tuple[Model, Model]) -> None:
    here, there = pair
    messages = [{"role": "user", "content": "What is 2 + 3?"}]
    assert here.has_chat_template
    assert here.render_chat(messages) == there.render_chat(messages)
    assert (
        here.chat(messages, max_tokens=6, temperature=0).tokens
        == there.chat(messages, max_tokens=6, temperature=0).tokens
    )
    text = "naïve <|im_end|> \U0001f642 x"
    assert here.tokenize(text) == there.tokenize(text)
    assert here.detokenize(here.tokenize(text), special=True) == text
    assert here.token_bytes(77) == there.token_bytes(77)


def test_a_stream_is_the_generation(model: Model) -> None:
    stream = model.stream(PROMPT, max_tokens=12, seed=5)
    pieces = "".join(stream)
    assert pieces == stream.completion.text == model.generate(PROMPT, max_tokens=12, seed=5).text
    timings = stream.completion.timings
    assert timings.decode_tokens == 11
    assert timings.decode_overhead is not None
    assert 0.0 < timings.decode_overhead < 1.0


def test_appended_text_continues_the_cache(model: Model) -> None:
    tokens = model.tokenize(PROMPT)
    whole = model.generate(tokens, max_tokens=0)
    assert whole.tokens == []
    model.generate(tokens[:8], max_tokens=0)
    model.generate(tokens[8:], max_tokens=0, append=True)
    assert model.tokens == tokens
    appended = backend_of(model).last_logits().copy()
    model.generate(tokens, max_tokens=0)
    assert np.array_equal(appended, backend_of(model).last_logits())  # the same cuts: 8 is the chunk


def test_the_context_has_an_end(melt_onnx: Path) -> None:
    with melt_edge.load(melt_onnx, n_ctx=24, n_threads=1) as model:
        done = model.generate(PROMPT[:12], temperature=0, grammar='root ::= "a"{60}')
        assert (done.finish_reason, len(model.tokens)) == ("length", 24)
        with pytest.raises(ContextOverflowError, match="has room for 24"):
            model.generate(PROMPT * 3)
        with pytest.raises(ContextOverflowError):
            backend_of(model).eval([1] * 25)


def test_a_smaller_context_is_a_smaller_state(melt_onnx: Path, model: Model) -> None:
    with melt_edge.load(melt_onnx, n_ctx=32, n_threads=1) as small:
        assert small.memory().kv_bytes * 4 == model.memory().kv_bytes
        tokens = model.tokenize(PROMPT)
        assert np.array_equal(small.logits(tokens), model.logits(tokens))


# -- early exit


def test_decoding_stops_its_loops_at_the_threshold(melt_onnx: Path, make_checkpoint: Callable[..., Path]) -> None:
    """The text and the rows of a loop by loop computation by hand, one token at a time."""
    reference = load_model(make_checkpoint(tiny_config("melt")))
    threshold, counts = 0.7, []
    with melt_edge.load(melt_onnx, n_threads=1, chunk_size=1, exit_threshold=threshold) as model:
        tokens = model.tokenize(PROMPT)
        backend = backend_of(model)
        cache = reference.new_cache()
        for token in tokens:
            before = backend.raw().counters.loops
            backend.eval([token])
            counts.append(backend.raw().counters.loops - before)
            for loops in range(1, 5):
                reference.config = tiny_config("melt", num_loops=loops, early_exit_threshold=1.0)
                with torch.no_grad():
                    states, probs = reference.forward_chunk(torch.tensor([[token]]), trial := _copy(cache))
                if 1 - float(torch.prod(1 - probs)) >= threshold or loops == 4:
                    break
            cache = trial
            assert counts[-1] == loops
            with torch.no_grad():
                assert distance(backend.last_logits(), reference.lm_head(states[-1])[0, 0].numpy()) < LIMIT
    assert len(set(counts)) > 1  # some tokens leave early, some do not


def _copy(cache: Any) -> Any:
    other = type(cache)(cache.config)
    other._kept = dict(cache._kept)
    return other


def test_a_chunk_stops_when_all_its_tokens_have_left(melt_onnx: Path) -> None:
    """Each token's output is that of the loop it left at; the loops end with the last token to leave."""
    with melt_edge.load(melt_onnx, n_threads=1) as model:
        tokens = model.tokenize(PROMPT)[:8]
        by_loop = []
        for loops in range(1, 5):
            with melt_edge.load(melt_onnx, n_threads=1, loops=loops) as fewer:
                by_loop.append(fewer.logits(tokens))
    with melt_edge.load(melt_onnx, n_threads=1, exit_threshold=0.3) as model:
        logits = model.logits(tokens)
        ran = backend_of(model).raw().counters.loops
    left = [next((t for t in range(4) if distance(row, by_loop[t][i]) < 1e-5), None) for i, row in enumerate(logits)]
    assert None not in left
    assert ran == max(t for t in left if t is not None) + 1 < 4
    assert len(set(left)) > 1


def test_a_threshold_saves_no_loop_of_an_ouro(ouro_onnx: Path, make_onnx: Callable[..., Path]) -> None:
    with (
        melt_edge.load(ouro_onnx, n_threads=1, exit_threshold=0.6) as asked,
        melt_edge.load(make_onnx(tiny_config("ouro", early_exit_threshold=0.6)), n_threads=1) as stated,
        melt_edge.load(ouro_onnx, n_threads=1) as plain,
    ):
        tokens = asked.tokenize(PROMPT)
        logits = asked.logits(tokens)
        assert backend_of(asked).raw().counters.loops == 4
        assert np.array_equal(logits, stated.logits(tokens))
        assert distance(logits, plain.logits(tokens)) > LIMIT


@pytest.mark.parametrize("threshold", [0, 1.5, -1, float("nan"), "0.5", True])
def test_a_threshold_is_a_probability(melt_onnx: Path, threshold: Any) -> None:
    with pytest.raises(ConfigError, match=r"exit_threshold is .*, expected a number from 1e-05 to 1"):
        melt_edge.load(melt_onnx, exit_threshold=threshold)


def test_a_threshold_of_one_never_stops(melt_onnx: Path, model: Model) -> None:
    with melt_edge.load(melt_onnx, n_threads=1, exit_threshold=1.0) as other:
        tokens = model.tokenize(PROMPT)
        assert np.array_equal(other.logits(tokens), model.logits(tokens))
        assert other.info.exit_threshold == 1.0


# -- loading


def test_info_tells_what_was_loaded(model: Model, melt_onnx: Path) -> None:
    info = model.info
    assert (info.architecture, info.path, info.backend, info.provider) == ("melt", melt_onnx, "onnx", "cpu")
    assert (info.num_loops, info.trained_loops, info.chunk_size, info.trained_chunk_size) == (4, 4, 8, 8)
    assert (info.n_ctx, info.n_ctx_train, info.n_layer, info.n_vocab) == (128, 512, 2, 301)
    assert (info.quantisation, info.kv_type, info.kv_gate, info.n_threads) == ("fp32", "f32", "elementwise", 1)
    assert info.n_params == 153_985
    assert info.file_bytes == sum(file.stat().st_size for file in melt_onnx.iterdir() if file.suffix != ".json") + sum(
        (melt_onnx / name).stat().st_size
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    )
    memory = model.memory()
    assert memory.weights_bytes == 4 * (info.n_params + 2 * 128 * 16)  # and the rotary tables
    assert memory.compute_bytes > 0
    with pytest.raises(ConfigError, match="runs on onnx, only a GGUF file has a Llama"):
        _ = model.llama


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_ctx": 129}, r"n_ctx is 129, .* was exported for 128 tokens; export it again with --n-ctx 129"),
        ({"chunk_size": 0}, "chunk_size is 0, expected a whole number from 1 to n_ctx = 128"),
        ({"loops": 65}, "loops is 65, expected a whole number from 1 to 64"),
        ({"kv_type": "f16"}, r"kv_type is 'f16', .* stores its cache in f32"),
        ({"n_gpu_layers": 1}, "n_gpu_layers is 1, but only a GGUF file has that choice"),
        ({"flash_attn": True}, "flash_attn is True, but only a GGUF file has that choice"),
        ({"n_threads": 0}, "n_threads is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_arguments_out_of_range(melt_onnx: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        melt_edge.load(melt_onnx, **options)


@pytest.mark.parametrize("options", [{"exit_threshold": 0.5}, {"provider": "cpu"}])
def test_a_file_has_no_onnx_options(melt_gguf: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"but llama.cpp runs every loop .*; leave it out, or load an ONNX folder"):
        melt_edge.load(melt_gguf, **options)


def test_a_backend_is_chosen_by_what_is_there(
    melt_onnx: Path, melt_gguf: Path, melt_checkpoint: Path, tmp_path: Path
) -> None:
    with melt_edge.load(melt_onnx, backend="onnx", n_threads=1) as model:
        assert model.info.backend == "onnx"
    with pytest.raises(FormatError, match=r"is a folder, expected a .gguf file"):
        melt_edge.load(melt_onnx, backend="llama")
    with pytest.raises(FormatError, match="is no folder, expected one that melt-edge export onnx wrote"):
        melt_edge.load(melt_gguf, backend="onnx")
    with pytest.raises(FormatError, match=r"is a checkpoint, which does not run as it is; export it first: melt-edge"):
        melt_edge.load(melt_checkpoint)
    with pytest.raises(FormatError, match=r"is a folder without melt_edge.json"):
        melt_edge.load(tmp_path, backend="onnx")


@pytest.mark.parametrize("missing", ["onnxruntime", "onnx"])
def test_a_missing_package_names_the_extra(melt_onnx: Path, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(BackendUnavailableError, match=rf'needs the package {missing}.*pip install "melt-edge\[onnx\]"'):
        melt_edge.load(melt_onnx)


@pytest.mark.parametrize("provider", ["cuda", "coreml", "dml", "qnn", "tpu", 5])
def test_a_provider_that_is_not_there_is_named(melt_onnx: Path, provider: Any) -> None:
    with pytest.raises(BackendUnavailableError, match=rf"provider is {provider!r}.*the installed onnxruntime has cpu:"):
        melt_edge.load(melt_onnx, provider=provider)


def test_providers_are_asked_for_by_onnxruntimes_names(melt_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def session(data: bytes, options: Any, *, providers: list[str]) -> Any:
        asked.append((providers, options.enable_mem_pattern))
        raise RuntimeError("no such device")

    real = ort_session.import_onnxruntime()
    fake = SimpleNamespace(
        get_available_providers=lambda: ["DmlExecutionProvider", "CPUExecutionProvider"],
        SessionOptions=real.SessionOptions,
        InferenceSession=session,
        OrtValue=real.OrtValue,
    )
    monkeypatch.setattr(ort_session, "import_onnxruntime", lambda: fake)
    with pytest.raises(BackendError, match=r"onnxruntime cannot load embed.onnx: no such device"):
        melt_edge.load(melt_onnx, provider="dml")
    assert asked == [(["DmlExecutionProvider"], False)]


def test_tensors_on_a_device_compute_the_same(
    melt_onnx: Path, model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """State and latents in memory that only onnxruntime sees, as on a GPU."""
    monkeypatch.setattr(ort_buffers.Memory, "is_host", property(lambda self: False))
    with melt_edge.load(melt_onnx, n_threads=1) as other:
        tokens = model.tokenize(PROMPT)
        assert np.array_equal(other.logits(tokens), model.logits(tokens))
        expected = model.generate(PROMPT, max_tokens=12, seed=1).tokens
        assert other.generate(PROMPT, max_tokens=12, seed=1).tokens == expected
        other.save_state(tmp_path / "a.state")
        model.load_state(tmp_path / "a.state")
        other.reset()
        other.load_state(tmp_path / "a.state")
        assert (
            other.generate("so", append=True, seed=2, max_tokens=6).tokens
            == model.generate("so", append=True, seed=2, max_tokens=6).tokens
        )


def test_what_does_not_fit_is_told_before_it_is_loaded(melt_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("melt_edge.runtime.memory.available_bytes", lambda: 10 * 2**20)
    with pytest.raises(MemoryBudgetError, match=r"needs about .* MiB \(weights 1 MiB, cache of 128 tokens in f32"):
        melt_edge.load(melt_onnx)


def test_a_closed_model_says_so(melt_onnx: Path) -> None:
    model = melt_edge.load(melt_onnx, n_threads=1)
    model.close()
    model.close()
    with pytest.raises(BackendError, match="the model is closed"):
        model.generate(PROMPT)


def test_loading_and_generating_say_nothing(melt_onnx: Path) -> None:
    code = (
        "import sys, melt_edge\n"
        f"with melt_edge.load({str(melt_onnx)!r}, loops=2) as model:\n"
        "    model.generate('hi', max_tokens=2)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


# -- states


@pytest.mark.parametrize("arch", ["melt", "ouro"])
def test_a_state_comes_back_exactly(request: pytest.FixtureRequest, tmp_path: Path, arch: str) -> None:
    path = tmp_path / "a.state"
    folder = request.getfixturevalue(f"{arch}_onnx")
    with melt_edge.load(folder, n_threads=1) as model:
        model.generate(PROMPT, max_tokens=3, temperature=0)
        tokens = model.tokens
        model.save_state(path)
        expected = model.generate(" so", append=True, max_tokens=8, temperature=0).tokens
        model.generate("something else", max_tokens=2)
        model.load_state(path)
        assert model.tokens == tokens
        with pytest.raises(BackendError, match="nothing was evaluated since"):
            backend_of(model).last_logits()
        assert model.generate(" so", append=True, max_tokens=8, temperature=0).tokens == expected
    with melt_edge.load(folder, n_threads=1, n_ctx=100) as other:
        other.load_state(path)
        assert other.generate(" so", append=True, max_tokens=8, temperature=0).tokens == expected


def test_a_state_of_something_else_is_refused(
    model: Model, melt_onnx: Path, melt_gguf: Path, make_onnx: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "a.state"
    model.generate(PROMPT, max_tokens=0)
    model.save_state(path)

    def refused(folder: Path, message: str, error: type[Exception] = FormatError, **options: Any) -> None:
        with melt_edge.load(folder, n_threads=1, **options) as other:
            other.generate("live", max_tokens=0)
            tokens = other.tokens
            with pytest.raises(error, match=message):
                other.load_state(path)
            assert other.tokens == tokens

    refused(make_onnx(tiny_config("melt"), seed=1), "was saved with model file")
    refused(melt_gguf, "was saved with model file", kv_type="f32")
    refused(melt_onnx, "was saved with number of loops 4, the loaded model has 2", loops=2)
    refused(melt_onnx, "was saved with chunk size 8", chunk_size=4)
    refused(melt_onnx, "the context has room for 8", ContextOverflowError, n_ctx=8)
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    refused(melt_onnx, "its digest does not fit")


def test_rows_that_are_not_finite_are_refused(model: Model, tmp_path: Path) -> None:
    model.generate(PROMPT, max_tokens=0)
    key, _ = backend_of(model).raw().slots[0]
    key.read()[0, 0, 2, 3] = np.nan
    model.save_state(tmp_path / "a.state")
    key.read()[0, 0, 2, 3] = 0.0
    with pytest.raises(FormatError, match="cache rows that are not finite"):
        model.load_state(tmp_path / "a.state")


# -- the runtime's own work


def test_decoding_allocates_no_tensor_and_binds_nothing_anew(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backend_of(model)
    backend.reset()
    backend.eval(model.tokenize(PROMPT))
    runner = backend.raw()
    addresses = [tensor.value.data_ptr() for pair in runner.slots for tensor in pair]

    def never(*args: Any) -> None:
        raise AssertionError("made anew")

    for name in ("_make_step", "_loop_binding", "_head_binding"):
        monkeypatch.setattr(runner, name, never)
    for name in ("zeros", "view", "array"):
        monkeypatch.setattr(ort_buffers.Memory, name, never)
    for token in (5, 6, 7):
        backend.eval([token])
    assert addresses == [tensor.value.data_ptr() for pair in runner.slots for tensor in pair]
    assert addresses == [tensor.read().ctypes.data for pair in runner.slots for tensor in pair]


def test_the_ends_of_prompts_share_a_few_bindings(model: Model) -> None:
    backend = backend_of(model)
    for length in (1, 2, 3, 4, 5, 6, 7, 8, 9, 3):
        backend.reset()
        backend.eval([5] * length)
    assert list(backend.raw()._kept) == [5, 6, 7, 3]


_GENERATE = """
import sys
import melt_edge
from melt_edge.runtime.machine import rss_bytes
folder, loops = sys.argv[1], int(sys.argv[2])
with melt_edge.load(folder, loops=loops, n_threads=1) as model:
    backend = model._backend()
    backend.eval(list(range(40)))
    highest = 0
    for token in range(256):
        backend.eval([token])
        highest = max(highest, rss_bytes())
    print(highest)
"""


@pytest.mark.slow
def test_the_resident_set_does_not_grow_with_the_loops(make_onnx: Callable[..., Path]) -> None:
    """256 tokens in a process of its own; an Ouro of the same shape, which grows, shows that this would be seen."""
    shape: dict[str, Any] = {
        "layers": 4,
        "n_head": 4,
        "n_head_kv": 4,
        "hidden_size": 128,
        "max_position_embeddings": 4096,
    }

    def resident(arch: str, loops: int) -> int:
        folder = make_onnx(tiny_config(arch, **shape), n_ctx=4096)
        command = [sys.executable, "-c", _GENERATE, str(folder), str(loops)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    melt = [resident("melt", loops) for loops in (1, 2, 4, 8)]
    assert max(melt) < 1.02 * min(melt)
    assert resident("ouro", 8) > 1.5 * resident("ouro", 1)
