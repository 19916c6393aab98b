"""The guard in front of llama.cpp: every rule has a file that breaks it, and arbitrary damage stays typed."""

from __future__ import annotations

import contextlib
import math
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.draft import TENSOR_TYPES, Draft, Key, Row
from melt_edge.config import LoopConfig
from melt_edge.errors import ConfigError, FormatError, MeltError, SpecError
from melt_edge.runtime.gguf_check import check_gguf, config_from_gguf, inspect_gguf
from melt_edge.runtime.gguf_file import GGML_TYPES, MAX_HEADER_BYTES, read_gguf
from melt_edge.runtime.gguf_keys import MATRIX_TYPES, PRE_TOKENIZERS
from melt_edge.runtime.gguf_vocab import BYTE_ALPHABET
from tiny import tiny_config

Edit = Callable[[Draft], object]
NAN, INF = float("nan"), float("inf")
TOKENS, TYPES, MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"


@pytest.fixture
def melt(melt_gguf: Path) -> Draft:
    return Draft.read(melt_gguf)


@pytest.fixture
def ouro(ouro_gguf: Path) -> Draft:
    return Draft.read(ouro_gguf)


def test_draft_gives_the_same_bytes(melt_gguf: Path) -> None:
    # Otherwise the tests below would test the draft.
    assert Draft.read(melt_gguf).encode() == melt_gguf.read_bytes()


@pytest.mark.parametrize(
    "config",
    [
        tiny_config("melt"),
        tiny_config("melt", kv_gate="none", tied=True),
        tiny_config("melt", kv_gate_init="input", num_loops=7, chunk_size=3),
        tiny_config("ouro", n_head_kv=4, vocab=300),
        tiny_config("ouro", tied=True, num_loops=1, n_head_kv=1),
    ],
    ids=lambda config: f"{config.model_type}-{config.kv_gate}-{config.num_loops}-{config.tie_word_embeddings}",
)
def test_exported_file_passes_and_tells_its_config(config: LoopConfig, make_gguf: Callable[..., Path]) -> None:
    info = check_gguf(make_gguf(config))
    assert config_from_gguf(info) == config


@pytest.mark.parametrize("type", ["f16", "bf16", "q8_0", "q4_0"])
def test_other_types_and_no_exit_gate_pass(type: str, make_gguf: Callable[..., Path]) -> None:
    info = check_gguf(make_gguf(tiny_config("melt"), type=type, exit_gate=False))
    assert "exit_gate.weight" not in {tensor.name for tensor in info.tensors}


def test_info_agrees_with_the_gguf_package(melt_gguf: Path) -> None:
    info, reader = inspect_gguf(melt_gguf), gguf.GGUFReader(melt_gguf)
    assert info.n_params == sum(int(np.prod(tensor.shape)) for tensor in reader.tensors)
    assert info.data_offset == reader.data_offset
    for mine, theirs in zip(info.tensors, reader.tensors, strict=True):
        assert (mine.name, mine.type, mine.nbytes) == (theirs.name, theirs.tensor_type.name, theirs.n_bytes)
        assert info.data_offset + mine.offset == theirs.data_offset
    for key, value in info.metadata.items():
        assert reader.get_field(key).contents() == value  # type: ignore[union-attr]


def test_type_table_is_ggmls() -> None:
    ours = {number: (block, size) for number, (_, block, size) in GGML_TYPES.items()}
    assert ours == {int(number): sizes for number, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert all(gguf.GGMLQuantizationType(number).name == name for number, (name, _, _) in GGML_TYPES.items())


def _set(name: str, value: object, type: str | int | None = None) -> Edit:
    return lambda draft: draft.set(name, value, type)


def _drop(name: str) -> Edit:
    return lambda draft: draft.drop(name)


def _row(name: str, **changes: object) -> Edit:
    def edit(draft: Draft) -> None:
        for key, value in changes.items():
            setattr(draft.row(name), key, value)

    return edit


def _stored_as(name: str, type_name: str) -> Edit:
    """The tensor in another type, with as many bytes as that takes."""

    def edit(draft: Draft) -> None:
        row = draft.row(name)
        _, block, size = GGML_TYPES[TENSOR_TYPES[type_name]]
        row.type, row.data = TENSOR_TYPES[type_name], bytes(math.prod(row.ne) // block * size)

    return edit


def _items(name: str, change: Callable[[list], list]) -> Edit:  # type: ignore[type-arg]
    return lambda draft: draft.set(name, change(list(draft.key(name).value)))


def _twice(name: str) -> Edit:
    return lambda draft: draft.keys.append(draft.key(name))


def _add_row(name: str, ne: list[int]) -> Edit:
    return lambda draft: draft.rows.append(Row(name, ne, 0, bytes(4 * math.prod(ne))))


CONTAINER = {
    "magic": (lambda d: setattr(d, "magic", b"GGML"), "GGML"),
    "pickle": (lambda d: setattr(d, "magic", b"PK\x03\x04"), "no GGUF file"),
    "version 1": (lambda d: setattr(d, "version", 1), "version 1"),
    "version 4": (lambda d: setattr(d, "version", 4), "version 4"),
    "big endian": (lambda d: setattr(d, "version", 3 << 24), "big-endian"),
    "too many keys": (lambda d: d.counts.update(keys=2**63), "keys"),
    "too many tensors": (lambda d: d.counts.update(tensors=2**64 - 1), "tensors"),
    "one key less": (lambda d: d.counts.update(keys=len(d.keys) - 1), "dimensions"),
    "one tensor less": (lambda d: d.counts.update(tensors=len(d.rows) - 1), "after its last tensor"),
    "one tensor more": (lambda d: d.counts.update(tensors=len(d.rows) + 1), "tensor"),
    "key twice": (_twice("melt.num_loops"), "melt.num_loops"),
    "key without a name": (lambda d: d.keys.append(Key("", "u32", 1)), "printable"),
    "key too long": (lambda d: d.keys.append(Key("a" * 300, "u32", 1)), "300"),
    "key not UTF-8": (lambda d: d.keys.append(Key("a\udcff", "u32", 1)), "UTF-8"),
    "key with a control character": (lambda d: d.keys.append(Key("a\n", "u32", 1)), "printable"),
    "text not UTF-8": (_set("general.name", "a\udcff"), "general.name"),
    "text with a zero byte": (_set("general.name", "a\0b"), "general.name"),
    "array text with a zero byte": (_items(TOKENS, lambda t: [*t[:-1], "a\0"]), TOKENS),
    "array text not UTF-8": (_items(TOKENS, lambda t: [*t[:-1], "\udcff"]), TOKENS),
    "value type 13": (_set("melt.num_loops", 0, 13), "melt.num_loops"),
    "bool of 2": (_set("tokenizer.ggml.add_bos_token", 2), "add_bos_token"),
    "array of bools of 2": (_set("general.flags", [0, 2], "arr[bool]"), "general.flags"),
    "alignment 16": (_set("general.alignment", 16, "u32"), "general.alignment"),
    "alignment 33": (_set("general.alignment", 33, "u32"), "general.alignment"),
    "alignment as u64": (_set("general.alignment", 32, "u64"), "general.alignment"),
    "alignment 0": (_set("general.alignment", 0, "u32"), "general.alignment"),
    "alignment that the offsets do not have": (_set("general.alignment", 1024, "u32"), "offset"),
    "tensor twice": (lambda d: d.rows.append(d.rows[0]), "twice"),
    "tensor name too long": (_add_row("a" * 64, [32]), "64"),
    "no dimension": (_row("output_norm.weight", n_dims=0), "output_norm.weight"),
    "five dimensions": (_row("output_norm.weight", n_dims=5), "output_norm.weight"),
    "size 0": (_row("output_norm.weight", ne=[0]), "output_norm.weight"),
    "product of sizes overflows": (_row("token_embd.weight", ne=[2**32, 2**32]), "token_embd.weight"),
    "size beyond i64": (_row("token_embd.weight", ne=[2**64 - 1, 1]), "token_embd.weight"),
    "removed ggml type": (_row("token_embd.weight", type=4), "type 4"),
    "unknown ggml type": (_row("token_embd.weight", type=2**31), "token_embd.weight"),
    "row no multiple of the block": (_row("token_embd.weight", type=12), "256"),
    "offset not aligned": (_row("output_norm.weight", offset=8), "output_norm.weight"),
    "offsets overlap": (_row("output_norm.weight", offset=0), "output_norm.weight"),
    "offset beyond the file": (_row("output_norm.weight", offset=2**62), "output_norm.weight"),
    "tensor beyond the file": (_row("output_norm.weight", ne=[2**40]), "output_norm.weight"),
}


@pytest.mark.parametrize(("edit", "word"), CONTAINER.values(), ids=CONTAINER)
def test_damaged_container_is_refused(edit: Edit, word: str, melt: Draft, tmp_path: Path) -> None:
    edit(melt)
    path = melt.write(tmp_path / "bad.gguf")
    with pytest.raises(FormatError, match=word) as caught:
        check_gguf(path)
    assert str(path) in str(caught.value)


KEYS: dict[str, tuple[Edit, type[MeltError], str]] = {
    "another architecture": (_set("general.architecture", "qwen3"), FormatError, "'qwen3'.*llama.cpp"),
    "no architecture": (_drop("general.architecture"), FormatError, "general.architecture"),
    "architecture as number": (_set("general.architecture", 1, "u32"), FormatError, "general.architecture"),
    "a split": (_set("split.count", 3, "u16"), FormatError, "split.count.*gguf-split"),
    "a mistyped split": (_set("split.count", "2", "str"), FormatError, "split.count"),
    "an adapter": (_set("general.type", "adapter", "str"), ConfigError, "general.type"),
    "adapter keys": (_set("adapter.type", "lora", "str"), FormatError, "adapter.type"),
    "foreign section": (_set("clip.has_vision_encoder", True, "bool"), FormatError, "clip.has_vision_encoder"),
    "activation precision list": (_set("general.tensor_extra.name", ["a"], "arr[str]"), FormatError, "tensor_extra"),
    "list of numbers": (_set("general.numbers", [1], "arr[u8]"), FormatError, "general.numbers"),
    "name of another tokenizer": (_set("general.name", "My Phi-3 loop"), ConfigError, "general.name"),
    "temperature NaN": (_set("general.sampling.temp", NAN, "f32"), ConfigError, "general.sampling.temp"),
    "top_p 2": (_set("general.sampling.top_p", 2.0, "f32"), ConfigError, "general.sampling.top_p"),
    "loops 0": (_set("melt.num_loops", 0), ConfigError, "melt.num_loops"),
    "loops 65": (_set("melt.num_loops", 65), ConfigError, "melt.num_loops"),
    "loops 2^32-1": (_set("melt.num_loops", 2**32 - 1), ConfigError, "melt.num_loops"),
    "loops i32": (_set("melt.num_loops", 4, "i32"), FormatError, "melt.num_loops"),
    "loops missing": (_drop("melt.num_loops"), FormatError, "melt.num_loops"),
    "blocks 0": (_set("melt.block_count", 0), ConfigError, "melt.block_count"),
    "blocks 513": (_set("melt.block_count", 513), ConfigError, "melt.block_count"),
    "blocks 3 of 2": (_set("melt.block_count", 3), SpecError, "blk.2"),
    "blocks 1 of 2": (_set("melt.block_count", 1), SpecError, "blk.1"),
    "context 0": (_set("melt.context_length", 0), ConfigError, "melt.context_length"),
    "context 2^31": (_set("melt.context_length", 2**31), ConfigError, "melt.context_length"),
    "embedding size 0": (_set("melt.embedding_length", 0), ConfigError, "melt.embedding_length"),
    "embedding size wrong": (_set("melt.embedding_length", 96), SpecError, "token_embd.weight"),
    "feed-forward wrong": (_set("melt.feed_forward_length", 96), SpecError, "ffn_up"),
    "feed-forward as list": (_set("melt.feed_forward_length", [128, 128], "arr[u32]"), FormatError, "feed_forward"),
    "heads 0": (_set("melt.attention.head_count", 0), ConfigError, "melt.attention.head_count"),
    "heads not divisible": (_set("melt.attention.head_count_kv", 3), ConfigError, "melt.attention.head_count_kv"),
    "kv heads 0": (_set("melt.attention.head_count_kv", 0), ConfigError, "melt.attention.head_count_kv"),
    "kv heads wrong": (_set("melt.attention.head_count_kv", 1), SpecError, "attn_k.weight"),
    "key size wrong": (_set("melt.attention.key_length", 64), ConfigError, "melt.attention.value_length"),
    "value size wrong": (_set("melt.attention.value_length", 64), ConfigError, "melt.attention.value_length"),
    "rope 0": (_set("melt.rope.dimension_count", 0), ConfigError, "melt.rope.dimension_count"),
    "rope odd": (_set("melt.rope.dimension_count", 31), ConfigError, "melt.rope.dimension_count"),
    "rope too large": (_set("melt.rope.dimension_count", 2**31), ConfigError, "melt.rope.dimension_count"),
    "rope half": (_set("melt.rope.dimension_count", 16), ConfigError, "melt.rope.dimension_count"),
    "eps 0": (_set("melt.attention.layer_norm_rms_epsilon", 0.0), ConfigError, "layer_norm_rms_epsilon"),
    "eps negative": (_set("melt.attention.layer_norm_rms_epsilon", -1e-6), ConfigError, "layer_norm_rms_epsilon"),
    "eps NaN": (_set("melt.attention.layer_norm_rms_epsilon", NAN), ConfigError, "layer_norm_rms_epsilon"),
    "rope base NaN": (_set("melt.rope.freq_base", NAN), ConfigError, "melt.rope.freq_base"),
    "rope base infinite": (_set("melt.rope.freq_base", INF), ConfigError, "melt.rope.freq_base"),
    "rope base 1": (_set("melt.rope.freq_base", 1.0), ConfigError, "melt.rope.freq_base"),
    "rope base missing": (_drop("melt.rope.freq_base"), FormatError, "melt.rope.freq_base"),
    "rope scaling yarn": (_set("melt.rope.scaling.type", "yarn", "str"), ConfigError, "melt.rope.scaling.type"),
    "rope scaling factor": (_set("melt.rope.scaling.factor", 8.0, "f32"), ConfigError, "melt.rope.scaling.factor"),
    "rope scale, old key": (_set("melt.rope.scale_linear", 8.0, "f32"), FormatError, "melt.rope.scale_linear"),
    "exit threshold 2": (_set("melt.exit_threshold", 2.0), ConfigError, "melt.exit_threshold"),
    "chunk 0": (_set("melt.chunk_size", 0), ConfigError, "melt.chunk_size"),
    "chunk 2^32-1": (_set("melt.chunk_size", 2**32 - 1), ConfigError, "melt.chunk_size"),
    "chunk missing": (_drop("melt.chunk_size"), FormatError, "melt.chunk_size"),
    "gate unknown": (_set("melt.kv_gate", "scalar"), ConfigError, "melt.kv_gate"),
    "gate missing": (_drop("melt.kv_gate"), FormatError, "melt.kv_gate"),
    "gate none, with tensors": (_set("melt.kv_gate", "none"), SpecError, "kv_gate_x.weight"),
    "gate start missing": (_drop("melt.kv_gate_init"), FormatError, "melt.kv_gate_init"),
    "gate start unknown": (_set("melt.kv_gate_init", "ones"), ConfigError, "melt.kv_gate_init"),
    "experts": (_set("melt.expert_count", 4, "u32"), FormatError, "melt.expert_count"),
    "not causal": (_set("melt.attention.causal", False, "bool"), ConfigError, "melt.attention.causal"),
    "pooling": (_set("melt.pooling_type", 1, "u32"), ConfigError, "melt.pooling_type"),
    "sliding window": (_set("melt.attention.sliding_window", 64, "u32"), FormatError, "sliding_window"),
    "next-token layers": (_set("melt.nextn_predict_layers", 1, "u32"), FormatError, "nextn_predict_layers"),
    "classifier": (_set("melt.classifier.output_labels", ["a"], "arr[str]"), FormatError, "output_labels"),
    "vocabulary size wrong": (_set("melt.vocab_size", 300), ConfigError, "melt.vocab_size"),
    "tokenizer model": (_set("tokenizer.ggml.model", "llama"), ConfigError, "tokenizer.ggml.model"),
    "no tokenizer": (_set("tokenizer.ggml.model", "none"), ConfigError, "tokenizer.ggml.model"),
    "unknown splitting": (_set("tokenizer.ggml.pre", "mine"), ConfigError, "tokenizer.ggml.pre"),
    "character map": (_set("tokenizer.ggml.precompiled_charsmap", [1], "arr[u8]"), FormatError, "precompiled_charsmap"),
    "tokens missing": (_drop(TOKENS), FormatError, TOKENS),
    "tokens as numbers": (_set(TOKENS, [1, 2], "arr[u32]"), FormatError, TOKENS),
    "token twice": (_items(TOKENS, lambda t: [*t[:-1], t[5]]), FormatError, f"{TOKENS}.*twice"),
    "token empty": (_items(TOKENS, lambda t: [*t[:-1], ""]), FormatError, f"{TOKENS}.*empty"),
    "token too long": (_items(TOKENS, lambda t: [*t[:-1], "x" * 2000]), FormatError, f"{TOKENS}.*2000"),
    "token outside the bytes": (_items(TOKENS, lambda t: [*t[:-1], "a b"]), FormatError, f"{TOKENS}.*'a b'"),
    "a token more than rows": (_items(TOKENS, lambda t: [*t, "xyz"]), ConfigError, "vocab_size"),
    "types too few": (_items(TYPES, lambda t: t[:-1]), FormatError, TYPES),
    "type unknown": (_items(TYPES, lambda t: [*t[:-1], 7]), FormatError, TYPES),
    "type byte": (_items(TYPES, lambda t: [*t[:-1], 6]), FormatError, TYPES),
    "types missing": (_drop(TYPES), FormatError, TYPES),
    "scores too few": (_set("tokenizer.ggml.scores", [1.0], "arr[f32]"), FormatError, "tokenizer.ggml.scores"),
    "scores NaN": (_set("tokenizer.ggml.scores", [NAN] * 301, "arr[f32]"), FormatError, "tokenizer.ggml.scores"),
    "merges missing": (_drop(MERGES), FormatError, MERGES),
    "merge without a space": (_items(MERGES, lambda m: [*m, "ab"]), FormatError, MERGES),
    "merge of unknown tokens": (_items(MERGES, lambda m: [*m, "zq zq"]), FormatError, MERGES),
    "bos beyond": (_set("tokenizer.ggml.bos_token_id", 301), ConfigError, "tokenizer.ggml.bos_token_id"),
    "eos beyond": (_set("tokenizer.ggml.eos_token_id", 2**31), ConfigError, "tokenizer.ggml.eos_token_id"),
    "eot beyond": (_set("tokenizer.ggml.eot_token_id", 999, "u32"), ConfigError, "tokenizer.ggml.eot_token_id"),
    "eos missing": (_drop("tokenizer.ggml.eos_token_id"), FormatError, "tokenizer.ggml.eos_token_id"),
    "bos missing, but added": (
        lambda d: d.set("tokenizer.ggml.add_bos_token", True).drop("tokenizer.ggml.bos_token_id"),
        FormatError,
        "tokenizer.ggml.bos_token_id",
    ),
    "template too long": (_set("tokenizer.chat_template", "x" * 2**21), FormatError, "tokenizer.chat_template"),
    "named template too long": (
        _set("tokenizer.chat_template.rag", "x" * 2**21, "str"),
        FormatError,
        "tokenizer.chat_template.rag",
    ),
}


@pytest.mark.parametrize(("edit", "error", "words"), KEYS.values(), ids=KEYS)
def test_wrong_value_is_refused(edit: Edit, error: type[MeltError], words: str, melt: Draft, tmp_path: Path) -> None:
    edit(melt)
    path = melt.write(tmp_path / "bad.gguf")
    with pytest.raises(error, match=words) as caught:
        check_gguf(path)
    assert str(path) in str(caught.value)


def test_ouro_slots_are_counted_over_the_loops(ouro: Draft, tmp_path: Path) -> None:
    # num_loops * block_count > 512 writes past llama.cpp's per-layer arrays; each alone is in range.
    ouro.set("ouro.num_loops", 64).set("ouro.block_count", 9)
    with pytest.raises(ConfigError, match=r"ouro\.block_count.*512"):
        check_gguf(ouro.write(tmp_path / "bad.gguf"))


def test_melt_keys_do_not_belong_into_an_ouro(ouro: Draft, tmp_path: Path) -> None:
    ouro.set("ouro.chunk_size", 8, "u32")
    with pytest.raises(FormatError, match=r"ouro\.chunk_size"):
        check_gguf(ouro.write(tmp_path / "bad.gguf"))


TENSORS = {
    "gate half there": (_drop("blk.0.kv_gate_h.weight"), "blk.0.kv_gate_h.weight: missing"),
    "gate bias missing": (_drop("blk.1.kv_gate_x.bias"), "blk.1.kv_gate_x.bias: missing"),
    "exit gate half there": (_drop("exit_gate.bias"), "exit_gate.bias: missing"),
    "norm missing": (_drop("blk.1.post_ffw_norm.weight"), "blk.1.post_ffw_norm.weight: missing"),
    "head of another size": (_row("output.weight", ne=[301, 64]), "output.weight: shape"),
    "rope factors": (_add_row("rope_freqs.weight", [16]), "rope_freqs.weight: not a tensor"),
    "bias of attention": (_add_row("blk.0.attn_q.bias", [128]), "blk.0.attn_q.bias: not a tensor"),
    "layer beyond": (_add_row("blk.7.attn_norm.weight", [64]), "blk.7.attn_norm.weight: not a tensor"),
    "norm in f16": (_stored_as("blk.0.attn_norm.weight", "F16"), "attn_norm.weight: type F16"),
    "bias in f16": (_stored_as("blk.0.kv_gate_x.bias", "F16"), "kv_gate_x.bias: type F16"),
    "exit gate in bf16": (_stored_as("exit_gate.weight", "BF16"), "exit_gate.weight: type BF16"),
    **{
        f"matrix in {name}": (_stored_as("blk.0.attn_q.weight", name), f"attn_q.weight: type {name}")
        for name in ("I8", "I16", "I32", "I64", "F64", "Q8_1", "MXFP4", "NVFP4")
    },
    "embedding in i32": (_stored_as("token_embd.weight", "I32"), "token_embd.weight: type I32"),
}


@pytest.mark.parametrize(("edit", "words"), TENSORS.values(), ids=TENSORS)
def test_wrong_tensor_is_refused(edit: Edit, words: str, melt: Draft, tmp_path: Path) -> None:
    edit(melt)
    with pytest.raises(SpecError, match=words):
        check_gguf(melt.write(tmp_path / "bad.gguf"))


def test_all_gaps_are_reported_at_once(melt: Draft, tmp_path: Path) -> None:
    melt.drop("blk.0.attn_q.weight").drop("blk.1.ffn_up.weight")
    with pytest.raises(SpecError, match=r"(?s)blk\.0\.attn_q\.weight.*blk\.1\.ffn_up\.weight"):
        check_gguf(melt.write(tmp_path / "bad.gguf"))


@pytest.mark.parametrize("name", [name for name in MATRIX_TYPES if GGML_TYPES[TENSOR_TYPES[name]][1] <= 64])
def test_matrix_types_pass(name: str, melt: Draft, tmp_path: Path) -> None:
    for row in ("token_embd.weight", "output.weight", "blk.0.attn_q.weight", "blk.1.kv_gate_h.weight"):
        _stored_as(row, name)(melt)
    check_gguf(melt.write(tmp_path / "good.gguf"))


GOOD: dict[str, Edit] = {
    "version 2": lambda d: setattr(d, "version", 2),
    "alignment 64": lambda d: (d.set("general.alignment", 64, "u32"), setattr(d, "alignment", 64)),
    "free text": _set("general.author", "somebody", "str"),
    "tags": _set("general.tags", ["looped", "text-generation"], "arr[str]"),
    "what llama-quantize writes": _set("quantize.imatrix.chunks_count", 12, "i32"),
    "own keys": _set("melt_edge.anything", 1.5, "f64"),
    "a feature that is off": _set("melt.expert_count", 0, "u32"),
    "split of one": _set("split.count", 1, "u16"),
    "named template": _set("tokenizer.chat_template.rag", "x", "str"),
    "no rope scaling": _set("melt.rope.scaling.type", "none", "str"),
    "tied": _drop("output.weight"),
    "head size by default": lambda d: d.drop("melt.rope.dimension_count").drop("melt.exit_threshold"),
    "user-defined token outside the bytes": lambda d: (
        _items(TOKENS, lambda t: [*t[:-1], "a b ☃"])(d),
        _items(TYPES, lambda t: [*t[:-1], 4])(d),
        _items(MERGES, lambda m: m[:-1])(d),
    ),
}


@pytest.mark.parametrize("edit", GOOD.values(), ids=GOOD)
def test_harmless_variety_passes(edit: Edit, melt: Draft, tmp_path: Path) -> None:
    edit(melt)
    check_gguf(melt.write(tmp_path / "good.gguf"))


@pytest.mark.parametrize("arch", ["ouro", "melt"])
def test_what_the_model_saver_writes_passes(arch: str, make_gguf: Callable[..., Path], tmp_path: Path) -> None:
    # It writes every key llama.cpp knows, at other architectures' defaults.
    import melt_edge
    from melt_edge.runtime.library import import_llama_cpp

    source, saved = make_gguf(tiny_config(arch)), tmp_path / "saved.gguf"
    with melt_edge.load(source) as model:
        import_llama_cpp().llama_model_save_to_file(model.llama.model, str(saved).encode())
    assert config_from_gguf(check_gguf(saved)) == config_from_gguf(check_gguf(source))


@pytest.mark.parametrize("type", ["q2_k", "q4_k_m", "q6_k", "iq4_xs"])
def test_what_the_quantizer_writes_passes(type: str, make_gguf: Callable[..., Path]) -> None:
    # It drops leading ones from shapes and mixes types; rows of 256 values, the K-quants' block.
    info = check_gguf(make_gguf(tiny_config("melt", hidden_size=256, head_dim=64), type=type))
    assert len({tensor.type for tensor in info.tensors}) > 1


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_pre_tokenizers_pass(pre: str, melt: Draft, tmp_path: Path) -> None:
    check_gguf(melt.set("tokenizer.ggml.pre", pre).write(tmp_path / "good.gguf"))


def test_byte_alphabet_is_gpt2s() -> None:
    assert len(BYTE_ALPHABET) == 256
    assert {"Ġ", "Ċ", "!", "~", "¡", "ÿ", "Ń"} <= BYTE_ALPHABET
    assert not {" ", "\n", "\u00ad", "ń"} & BYTE_ALPHABET


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(FormatError, match="cannot be read"):
            check_gguf(path)


@pytest.mark.parametrize("size", [0, 3, 4, 23])
def test_tiny_files(size: int, melt_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(melt_gguf.read_bytes()[:size])
    with pytest.raises(FormatError, match="truncated"):
        check_gguf(path)


def test_every_cut_in_the_header_is_refused(melt: Draft, tmp_path: Path) -> None:
    raw, path = melt.encode(), tmp_path / "cut.gguf"
    for size in range(0, len(melt.header()), 37):
        path.write_bytes(raw[:size])
        with pytest.raises(FormatError):
            check_gguf(path)


def _header(*, keys: int = 0, tensors: int = 0, body: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + body


@pytest.mark.parametrize(
    "raw",
    [
        _header(keys=4096),
        _header(tensors=65536),
        _header(keys=1, body=struct.pack("<Q", 2**63)),
        _header(keys=1, body=struct.pack("<Q1sIQ", 1, b"a", 8, 2**40)),
        _header(keys=1, body=struct.pack("<Q1sIIQ", 1, b"a", 9, 8, 2**22)),
        _header(keys=1, body=struct.pack("<Q1sIIQ", 1, b"a", 9, 8, 2**60)),
        _header(keys=1, body=struct.pack("<Q1sIIQ", 1, b"a", 9, 12, 2**61)),
        _header(keys=1, body=struct.pack("<Q1sIIQ", 1, b"a", 9, 9, 1)),
        _header(tensors=1, body=struct.pack("<Q1sI", 1, b"a", 2**32 - 1)),
    ],
    ids=range(9),
)
def test_lengths_are_not_believed(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "liar.gguf"
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


def test_metadata_of_gigabytes_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    size = 4 * MAX_HEADER_BYTES
    with path.open("wb") as file:
        file.write(_header(keys=1, body=struct.pack("<Q1sIQ", 1, b"a", 8, size)))
        file.truncate(size + 100)
    start = time.perf_counter()
    with pytest.raises(FormatError, match=str(MAX_HEADER_BYTES)):
        read_gguf(path)
    assert time.perf_counter() - start < 0.5


def test_49k_vocabulary_is_checked_within_a_second(melt: Draft, tmp_path: Path) -> None:
    letters = sorted(BYTE_ALPHABET)
    words = [(a, b) for a in letters for b in letters][: 49152 - 256]
    tokens = letters + [a + b for a, b in words]
    melt.set(TOKENS, tokens).set(TYPES, [1] * len(tokens)).set(MERGES, [f"{a} {b}" for a, b in words])
    melt.set("melt.vocab_size", len(tokens))
    for name in ("token_embd.weight", "output.weight"):
        row = melt.row(name)
        row.ne, row.data = [64, len(tokens)], bytes(4 * 64 * len(tokens))
    path = melt.write(tmp_path / "large.gguf")
    best = math.inf
    for _ in range(3):  # the best of three: other work on the machine is not the check's
        start = time.perf_counter()
        check_gguf(path)
        best = min(best, time.perf_counter() - start)
    assert best < 1.0


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=20),
    cut=st.floats(0, 1),
    header_only=st.booleans(),
)
def test_any_damage_is_a_typed_error_or_a_valid_file(
    flips: list[tuple[float, int]], cut: float, header_only: bool, melt_gguf: Path, tmp_path: Path
) -> None:
    raw = bytearray(melt_gguf.read_bytes())
    span = inspect_gguf(melt_gguf).data_offset if header_only else len(raw)
    for where, mask in flips:
        raw[int(where * span)] ^= mask
    path = tmp_path / "damaged.gguf"
    path.write_bytes(raw if cut > 0.5 else raw[: int(2 * cut * span)])
    start = time.perf_counter()
    tracemalloc.start()
    try:
        with contextlib.suppress(FormatError, ConfigError, SpecError):
            check_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 200 * 2**20
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - start < 1.0
