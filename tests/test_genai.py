"""The layout for onnxruntime-genai: the graphs against the reference, and the folders in stock onnxruntime-genai."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import melt_edge
from melt_edge.checkpoint import load_model, save_checkpoint
from melt_edge.config import LoopConfig
from melt_edge.errors import ConfigError
from melt_edge.export.from_gguf import checkpoint_from_gguf
from melt_edge.export.genai import export_genai
from melt_edge.export.genai_verify import Decoder, decoder_logits
from melt_edge.models import SHIPPED_MODEL, SHIPPED_TEACHER, shipped_model_path
from melt_edge.models.demo_questions import DEMO_QUESTIONS
from melt_edge.tasks.greedy import greedy
from parity.reference import distance, kl_divergence, random_tokens, reference_logits, reference_model
from parity.test_logits import LIMIT, MODELS, N_DECODE, N_TOKENS, WHOLE
from parity.test_onnx import SHIPPED_KL_LIMITS
from tiny import tiny_config, tiny_tensors

ORT_VERSION = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
pytestmark = pytest.mark.skipif(
    ORT_VERSION < (1, 31), reason=f"onnxruntime {onnxruntime.__version__} cannot read a cache without writing it"
)
EXAMPLE = Path(__file__).parent.parent / "examples" / "genai" / "run.py"
N_CTX = 128
FUSED = [name for name, config in MODELS.items() if config.head_dim % 16 == 0]


def graph_path(folder: Path, config: LoopConfig) -> Path:
    return folder / f"loops-{config.num_loops}.onnx"


# --- the graphs


@pytest.mark.parametrize("chunk_size", [1, 3, 8, WHOLE])
@pytest.mark.parametrize("name", FUSED)
def test_logits_equal_the_reference(make_checkpoint, make_genai, name: str, chunk_size: int) -> None:
    """A prompt in chunks, then one token at a time."""
    config = MODELS[name]
    tokens = random_tokens(N_TOKENS, config.vocab_size)
    expected = reference_logits(reference_model(make_checkpoint(config)), tokens, chunk_size, N_DECODE)
    n_prompt = N_TOKENS - N_DECODE
    path = graph_path(make_genai(config), config)
    assert distance(decoder_logits(path, config, tokens[:n_prompt], tokens[n_prompt:], chunk_size), expected) < LIMIT


@pytest.mark.parametrize("model_type", ["melt", "ouro"])
def test_a_chunk_longer_than_what_came_before(make_checkpoint, make_genai, model_type: str) -> None:
    """A short chunk, then one that has more tokens than the cache has rows, as in a conversation's second turn."""
    config = tiny_config(model_type)
    tokens = np.array([random_tokens(14, config.vocab_size)])
    decoder = Decoder(graph_path(make_genai(config), config), config, 64)
    model, cache = load_model(make_checkpoint(config)), None
    with torch.no_grad():
        cache = model.new_cache()
        for start, end in ((0, 2), (2, 10), (10, 11), (11, 14)):
            expected = model(torch.tensor(tokens[:, start:end]), cache, chunk_size=end - start).logits.numpy()
            assert distance(decoder.chunk(tokens[:, start:end])[0], expected[0]) < LIMIT


@pytest.mark.parametrize("model_type", ["melt", "ouro"])
def test_sequences_of_a_batch_do_not_disturb_each_other(make_checkpoint, make_genai, model_type: str) -> None:
    """A first chunk of each, then token by token: more than one later token at once is the operator's limit."""
    config = tiny_config(model_type)
    rows = [random_tokens(12, config.vocab_size, seed) for seed in (0, 1)]
    decoder = Decoder(graph_path(make_genai(config), config), config, 64, batch=2)
    chunks = [slice(0, 8), *(slice(i, i + 1) for i in range(8, 12))]
    got = np.concatenate([decoder.chunk(np.array(rows)[:, chunk]) for chunk in chunks], axis=1)
    model = reference_model(make_checkpoint(config))
    for row, found in zip(rows, got, strict=True):
        assert distance(found, reference_logits(model, row, 8, 4)) < LIMIT


def test_a_wrong_tensor_is_seen(make_genai, tmp_path) -> None:
    """The twin of the parity tests: each tensor, changed a little, must fail them."""
    config = tiny_config("melt", layers=1, early_exit_threshold=0.6)
    tokens = random_tokens(N_TOKENS, config.vocab_size)
    got = decoder_logits(graph_path(make_genai(config), config), config, tokens, [], 8)
    missed = []
    for name, tensor in tiny_tensors(config).items():
        noise = 0.05 * np.random.default_rng(1).standard_normal(tensor.shape) + (2.0 if "early_exit" in name else 0.0)
        folder = save_checkpoint(
            tmp_path / name, config, {**tiny_tensors(config), name: (tensor + noise).astype(np.float32)}
        )
        if distance(got, reference_logits(reference_model(folder), tokens, 8)) < LIMIT:
            missed.append(name)
    assert missed == []


def test_only_what_follows_the_last_loop_writes_the_cache(make_genai) -> None:
    """MELT's loops are given no place for a cache; without one, the operator can neither write nor copy it."""
    config = tiny_config("melt")
    graph = onnx.load(graph_path(make_genai(config), config), load_external_data=False).graph
    makers = {output: node.op_type for node in graph.node for output in node.output}
    assert {makers[f"present.{i}.{kind}"] for i in range(2) for kind in ("key", "value")} == {"TensorScatter"}
    (loop,) = [node for node in graph.node if node.op_type == "Loop"]
    body = loop.attribute[0].g
    readers = [node for node in body.node if any(name.startswith("past_key_values") for name in node.input)]
    assert len(readers) == config.num_hidden_layers
    for node in readers:
        assert (node.op_type, list(node.output[1:3])) == ("GroupQueryAttention", ["", ""])


def test_graphs_of_all_loop_counts_share_one_weights_file(make_genai) -> None:
    folder = make_genai(tiny_config("melt"), loops=[1, 2])
    assert [file.name for file in sorted(folder.glob("loops-*.onnx"))] == [
        "loops-1.onnx",
        "loops-2.onnx",
        "loops-4.onnx",
    ]
    assert [file.name for file in folder.glob("*.bin")] == ["weights.bin"]
    places: dict[str, Any] = {}
    for file in folder.glob("loops-*.onnx"):
        for tensor in onnx.load(file, load_external_data=False).graph.initializer:
            if tensor.external_data:
                place = sorted((entry.key, entry.value) for entry in tensor.external_data)
                assert places.setdefault(tensor.name, place) == place
    assert len(places) > 20


def test_bad_arguments_are_named(make_checkpoint, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"loops has 65, expected numbers from 1 to 64"):
        export_genai(make_checkpoint(tiny_config("melt")), tmp_path / "out", loops=[65])
    with pytest.raises(ConfigError, match=r"head_dim is 8, expected a multiple of 16 for the layout genai"):
        export_genai(make_checkpoint(tiny_config("melt", head_dim=8)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- stock onnxruntime-genai


def genai_model(folder: Path, loops: int | None = None) -> Any:
    """The folder in stock onnxruntime-genai, another number of loops chosen by its overlay."""
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai has no wheel for this Python")
    config = og.Config(str(folder))
    # A tiny model: a second thread only waits.
    config.overlay('{"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}')
    if loops is not None:
        config.overlay((folder / f"loops-{loops}.json").read_text(encoding="utf-8"))
    return og.Model(config)


def genai_greedy(model: Any, prompt: list[int], n_tokens: int, **search: Any) -> list[int]:
    """The tokens after a prompt, without the end token."""
    import onnxruntime_genai as og

    params = og.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=len(prompt) + n_tokens, **search)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array(prompt, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    tokens = [int(token) for token in generator.get_sequence(0)[len(prompt) :]]
    return tokens[:-1] if tokens[-1] == 2 else tokens


@pytest.mark.parametrize("name", [SHIPPED_TEACHER, SHIPPED_MODEL])
def test_the_shipped_model_says_the_same(name: str, tmp_path) -> None:
    """Its own tokenizer and 1, 2 and 4 loops, against llama.cpp."""
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai has no wheel for this Python")
    gguf = shipped_model_path(name)
    folder = tmp_path / "genai"
    export_genai(checkpoint_from_gguf(gguf, tmp_path / "checkpoint"), folder, n_ctx=N_CTX, verify=False)
    answers = set()
    for loops in (1, 2, 4):
        model = genai_model(folder, loops)
        tokenizer = og.Tokenizer(model)
        with melt_edge.load(gguf, kv_type="f32", n_ctx=N_CTX, n_threads=1, loops=loops) as expected:
            for question in DEMO_QUESTIONS:
                text = expected.render_chat([{"role": "user", "content": question}])
                prompt = [int(token) for token in tokenizer.encode(text)]
                found = genai_greedy(model, prompt, 40)
                assert found == expected.generate(prompt, temperature=0.0, repeat_penalty=1.0, max_tokens=40).tokens
                answers.add(tokenizer.decode(np.array(found, np.int32)))
    assert set(DEMO_QUESTIONS.values()) <= answers


@pytest.mark.parametrize("name", [SHIPPED_TEACHER, SHIPPED_MODEL])
def test_smaller_precisions_stay_close(name: str, tmp_path) -> None:
    """The bound on what a precision costs a trained model is that of the other layout."""
    gguf = shipped_model_path(name)
    with melt_edge.load(gguf, n_threads=1) as model:
        texts = [
            model.tokenize(model.render_chat([{"role": "user", "content": question}]) + answer + "<|im_end|>")
            for question, answer in DEMO_QUESTIONS.items()
        ]
    checkpoint = checkpoint_from_gguf(gguf, tmp_path / "checkpoint")
    config = load_model(checkpoint).config
    logits = {}
    for precision in ("fp32", *SHIPPED_KL_LIMITS):
        folder = tmp_path / precision
        export_genai(checkpoint, folder, precision=precision, n_ctx=N_CTX, verify=False, loops=[])
        path = graph_path(folder, config)
        logits[precision] = np.concatenate([decoder_logits(path, config, text, [], 1) for text in texts])
    for precision, limit in SHIPPED_KL_LIMITS.items():
        assert 0 < kl_divergence(logits[precision], logits["fp32"]) < limit


@pytest.mark.parametrize("chunk_size", [1, 8, WHOLE])
@pytest.mark.parametrize("gate", ["zeros", "input", "none"])
def test_a_prompt_is_cut_as_the_folder_says(make_checkpoint, make_genai, gate: str, chunk_size: int) -> None:
    """search.chunk_size is the trained one unless the caller gives another."""
    gated = {"kv_gate": "none"} if gate == "none" else {"kv_gate_init": gate}
    config = tiny_config("melt", **gated)
    folder = make_genai(config)
    prompt = random_tokens(19, config.vocab_size)
    assert json.loads((folder / "genai_config.json").read_text())["search"]["chunk_size"] == config.chunk_size == 8
    given = {} if chunk_size == config.chunk_size else {"chunk_size": chunk_size}
    found = genai_greedy(genai_model(folder), prompt, 30, **given)
    ((_, expected),) = greedy(
        load_model(make_checkpoint(config)), [prompt], end_tokens={2}, max_tokens=30, chunk_size=chunk_size
    )
    assert found == expected
    ((_, other),) = greedy(load_model(make_checkpoint(config)), [prompt], end_tokens={2}, max_tokens=30, chunk_size=4)
    assert found != other  # another cut gives another text, so this test can fail


def test_the_example_runs(tmp_path) -> None:
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai has no wheel for this Python")
    folder = tmp_path / "genai"
    export_genai(checkpoint_from_gguf(shipped_model_path(), tmp_path / "checkpoint"), folder, n_ctx=N_CTX, verify=False)
    done = subprocess.run([sys.executable, EXAMPLE, folder, "24+18="], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "24+18=42.\n"), done.stderr
