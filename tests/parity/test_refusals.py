"""The C++ refuses by exception what it cannot run, also without the Python check before it."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from melt_edge.errors import MeltError
from melt_edge.runtime.gguf_check import check_gguf
from melt_edge.runtime.gguf_keys import ARCH_KEYS
from parity.native import context, llama
from tiny import tiny_config

NAN, INF = float("nan"), float("inf")
TYPES = gguf.GGUFValueType


def rewrite(source, target, keys=None, tensors=None, more=()) -> None:
    """Copy a GGUF file with other values for some keys, other data or None (left out) for some tensors.

    more: (key, value, type) of keys to add.
    """
    keys, tensors = keys or {}, tensors or {}
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        value = keys.get(field.name, field.contents())
        writer.add_key_value(field.name, value, kind, sub_type=field.types[-1] if len(field.types) > 1 else None)
    for key, value, kind in more:
        if isinstance(value, list):
            writer.add_key_value(key, value, TYPES.ARRAY, sub_type=kind)
        else:
            writer.add_key_value(key, value, kind)
    for tensor in reader.tensors:
        data = tensors.get(tensor.name, tensor.data)
        if data is not None:
            writer.add_tensor(tensor.name, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assert_refused(path) -> None:
    """By the C++ alone, and by the Python check before it."""
    with pytest.raises(RuntimeError, match="refused"), context(path):
        pass
    with pytest.raises(MeltError):
        check_gguf(path)


KEYS = {
    "num_loops": [0, 65, 2**31, 2**32 - 1],
    "chunk_size": [0, 2**31],
    "kv_gate": ["scalar"],
    "kv_gate_init": ["ones"],
    "exit_threshold": [0.0, 1.5, NAN],
    "block_count": [0, 513],
    "attention.layer_norm_rms_epsilon": [0.0, -1.0, NAN, INF],
    "rope.freq_base": [0.0, 1.0, NAN, INF],
    "rope.dimension_count": [0, 31, 64, 2**31],
    "attention.head_count": [0, 3],
    "attention.head_count_kv": [0, 3],
    "attention.key_length": [0, 31],
    "attention.value_length": [16],
    "feed_forward_length": [0],
    "embedding_length": [0],
    "context_length": [0],
}


# Keys that the file does not have: of other architectures, or that change what the graph computes.
FOREIGN = [
    ("rope.scaling.type", "yarn", TYPES.STRING),
    ("rope.scaling.type", "longrope", TYPES.STRING),
    ("rope.scaling.type", "no such type", TYPES.STRING),
    ("rope.scaling.factor", 2.0, TYPES.FLOAT32),
    ("rope.scaling.factor", 0.5, TYPES.FLOAT32),
    ("rope.scaling.factor", NAN, TYPES.FLOAT32),
    ("rope.scaling.attn_factor", 2.0, TYPES.FLOAT32),
    ("rope.scaling.attn_factor", NAN, TYPES.FLOAT32),
    ("rope.scaling.alpha", 2.0, TYPES.FLOAT32),
    ("rope.scaling.finetuned", True, TYPES.BOOL),
    ("rope.scaling.original_context_length", 0, TYPES.UINT32),
    ("rope.scaling.yarn_log_multiplier", 1.0, TYPES.FLOAT32),
    ("rope.scaling.yarn_ext_factor", 1.0, TYPES.FLOAT32),
    ("rope.scaling.yarn_attn_factor", NAN, TYPES.FLOAT32),
    ("rope.scaling.yarn_beta_fast", 16.0, TYPES.FLOAT32),
    ("rope.scaling.yarn_beta_slow", 2.0, TYPES.FLOAT32),
    ("rope.scale_linear", 2.0, TYPES.FLOAT32),
    ("rope.dimension_sections", [16, 16, 0, 0], TYPES.UINT32),
    ("attention.sliding_window", 32, TYPES.UINT32),
    ("attention.sliding_window_pattern", 2, TYPES.UINT32),
    ("attention.clamp_kqv", 1.0, TYPES.FLOAT32),
    ("attention.clamp_kqv", NAN, TYPES.FLOAT32),
    ("attention.max_alibi_bias", 8.0, TYPES.FLOAT32),
    ("attention.causal", False, TYPES.BOOL),
    ("attention.scale", 0.5, TYPES.FLOAT32),
    ("attn_logit_softcapping", 20.0, TYPES.FLOAT32),
    ("final_logit_softcapping", 20.0, TYPES.FLOAT32),
    ("logit_scale", 0.5, TYPES.FLOAT32),
    ("embedding_scale", 2.0, TYPES.FLOAT32),
    ("residual_scale", 2.0, TYPES.FLOAT32),
    ("pooling_type", 1, TYPES.UINT32),
    ("pooling_type", 3, TYPES.UINT32),
    ("classifier.output_labels", ["yes", "no"], TYPES.STRING),
    ("embedding_length_out", 32, TYPES.UINT32),
    ("expert_count", 4, TYPES.UINT32),
    ("expert_count", 2**31, TYPES.UINT32),
    ("expert_used_count", 2, TYPES.UINT32),
    ("expert_group_count", 2, TYPES.UINT32),
    ("nextn_predict_layers", 1, TYPES.UINT32),
    ("nextn_predict_layers", 2**31, TYPES.UINT32),
    ("swiglu_clamp_exp", [0.0, 1.0], TYPES.FLOAT32),
    ("decoder_start_token_id", 3, TYPES.INT32),
    ("deepstack_mapping", [0] + [-1] * 511, TYPES.INT32),
    ("vocab_size", 300, TYPES.UINT32),
    ("no_such_key", 1, TYPES.UINT32),
    ("no_such_key", "text", TYPES.STRING),
    ("no_such_key", [0, 1], TYPES.UINT32),
]


def test_the_copy_itself_loads(melt_gguf, tmp_path) -> None:
    """Else every refusal below would be the copy's fault."""
    rewrite(melt_gguf, tmp_path / "melt-copy.gguf")
    with context(tmp_path / "melt-copy.gguf"):
        pass


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in KEYS.items() for value in values])
def test_a_bad_key_is_refused(melt_gguf, tmp_path, key: str, value: object) -> None:
    """Every value that upstream would meet with an abort, an endless loop or a NaN."""
    rewrite(melt_gguf, tmp_path / "melt-bad.gguf", keys={f"melt.{key}": value})
    assert_refused(tmp_path / "melt-bad.gguf")


@pytest.mark.parametrize(("key", "value", "kind"), FOREIGN)
def test_a_foreign_key_is_refused(ouro_gguf, tmp_path, key: str, value: object, kind: TYPES) -> None:
    """What these architectures do not have: some of these aborted, one gave NaN, most loaded and meant nothing."""
    keys = {f"ouro.{key}": value}
    is_there = f"ouro.{key}" in gguf.GGUFReader(ouro_gguf).fields
    more = [] if is_there else [(f"ouro.{key}", value, kind)]
    rewrite(ouro_gguf, tmp_path / "ouro-bad.gguf", keys=keys, more=more)
    assert_refused(tmp_path / "ouro-bad.gguf")


def test_a_key_of_melt_is_foreign_to_ouro(ouro_gguf, tmp_path) -> None:
    """Ouro has no chunks: a file that names them is another architecture's."""
    rewrite(ouro_gguf, tmp_path / "ouro-bad.gguf", more=[("ouro.chunk_size", 8, TYPES.UINT32)])
    assert_refused(tmp_path / "ouro-bad.gguf")


def test_the_activation_of_another_architecture_is_refused(melt_gguf, tmp_path) -> None:
    """Its keys have no architecture in their name."""
    rewrite(melt_gguf, tmp_path / "melt-bad.gguf", more=[("xielu.eps", 1.0, TYPES.FLOAT32)])
    assert_refused(tmp_path / "melt-bad.gguf")


@pytest.mark.parametrize("value", [0, False, 0.0, [0, 0]], ids=repr)
def test_a_feature_that_is_off_loads(melt_gguf, tmp_path, value: object) -> None:
    """llama.cpp's model saver writes every key it knows."""
    item = value[0] if isinstance(value, list) else value
    kind = {bool: TYPES.BOOL, int: TYPES.UINT32, float: TYPES.FLOAT32}[type(item)]
    rewrite(melt_gguf, tmp_path / "melt-off.gguf", more=[("melt.no_such_key", value, kind)])
    with context(tmp_path / "melt-off.gguf"):
        pass
    check_gguf(tmp_path / "melt-off.gguf")


KINDS = {"bool": TYPES.BOOL, "f32": TYPES.FLOAT32, "i32": TYPES.INT32, "str": TYPES.STRING, "u32": TYPES.UINT32}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, rule in ARCH_KEYS.items() for value in rule.choices or ()]
)
def test_what_the_python_check_allows_loads(ouro_gguf, tmp_path, key: str, value: object) -> None:
    """The two tables of keys say the same: these are what llama.cpp's model saver writes where it is not 0."""
    kind = KINDS[ARCH_KEYS[key].type.removeprefix("arr[").removesuffix("]")]
    rewrite(ouro_gguf, tmp_path / "ouro-saved.gguf", more=[(f"ouro.{key}", value, kind)])
    check_gguf(tmp_path / "ouro-saved.gguf")
    with context(tmp_path / "ouro-saved.gguf"):
        pass


def test_two_equal_tokens_are_refused(melt_gguf, tmp_path) -> None:
    """One flipped bit in a token's text aborted."""
    tokens = gguf.GGUFReader(melt_gguf).fields["tokenizer.ggml.tokens"].contents()
    rewrite(melt_gguf, tmp_path / "melt-bad.gguf", keys={"tokenizer.ggml.tokens": [*tokens[:-1], tokens[0]]})
    assert_refused(tmp_path / "melt-bad.gguf")


@pytest.mark.parametrize("model", ["llama", "rwkv", "t5", "no such tokenizer"])
def test_another_tokenizer_is_refused(melt_gguf, tmp_path, model: str) -> None:
    """Those without a token for every byte threw through the C API."""
    rewrite(melt_gguf, tmp_path / "melt-bad.gguf", keys={"tokenizer.ggml.model": model})
    assert_refused(tmp_path / "melt-bad.gguf")


def test_a_narrow_alignment_is_refused(melt_gguf, tmp_path) -> None:
    """Tensor data at odd places aborted."""
    rewrite(melt_gguf, tmp_path / "melt-bad.gguf", more=[("general.alignment", 8, TYPES.UINT32)])
    assert_refused(tmp_path / "melt-bad.gguf")


@pytest.mark.parametrize(
    "name",
    ["blk.1.kv_gate_x.weight", "blk.0.kv_gate_x.bias", "blk.1.kv_gate_h.weight", "exit_gate.weight", "exit_gate.bias"],
)
def test_a_missing_gate_tensor_is_refused(melt_gguf, tmp_path, name: str) -> None:
    """All or none, in every layer."""
    rewrite(melt_gguf, tmp_path / "melt-bad.gguf", tensors={name: None})
    with pytest.raises(RuntimeError, match="refused"), context(tmp_path / "melt-bad.gguf"):
        pass


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("blk.0.attn_norm.weight", np.float16),
        ("blk.0.kv_gate_x.bias", np.float16),
        ("exit_gate.weight", np.float16),
        ("blk.0.attn_q.weight", np.float64),
        ("token_embd.weight", np.int32),
        ("blk.1.kv_gate_h.weight", np.int8),
    ],
)
def test_a_bad_type_is_refused(melt_gguf, tmp_path, name: str, dtype: type) -> None:
    """Types that the kernels of a tensor's role do not have."""
    data = next(tensor.data for tensor in gguf.GGUFReader(melt_gguf).tensors if tensor.name == name)
    rewrite(melt_gguf, tmp_path / "melt-bad.gguf", tensors={name: data.astype(dtype)})
    with pytest.raises(RuntimeError, match="refused"), context(tmp_path / "melt-bad.gguf"):
        pass


@pytest.mark.parametrize("loops", [0, 65, -1, 2**31, 2**32 + 1, 2**63 - 1])
@pytest.mark.parametrize("model_type", ["ouro", "melt"])
def test_a_bad_override_is_refused(make_gguf, model_type: str, loops: int) -> None:
    """An override is an int64: it must not be narrowed before it is checked."""
    with pytest.raises(RuntimeError, match="refused"), context(make_gguf(tiny_config(model_type)), loops=loops):
        pass


def test_ouro_has_at_most_512_cache_slots(make_gguf) -> None:
    """9 layers times 64 loops would write past the tables of llama.cpp."""
    with (
        pytest.raises(RuntimeError, match="refused"),
        context(make_gguf(tiny_config("ouro", layers=9)), loops=64),
    ):
        pass


@pytest.mark.parametrize(
    ("key", "tag", "field", "value"),
    [
        ("rope.scaling.attn_factor", 1, "val_f64", NAN),
        ("attention.sliding_window", 0, "val_i64", 32),
        ("attention.causal", 2, "val_bool", False),
        ("rope.scaling.type", 3, "val_str", b"yarn"),
    ],
)
def test_an_override_is_checked_like_the_file(melt_gguf, key: str, tag: int, field: str, value: object) -> None:
    """llama-server's --override-kv reaches the model without any file."""
    overrides = (llama.llama_model_kv_override * 2)()
    overrides[0].tag, overrides[0].key = tag, f"melt.{key}".encode()
    setattr(overrides[0].value, field, value)
    params = llama.llama_model_default_params()
    params.kv_overrides = overrides
    assert not llama.llama_model_load_from_file(str(melt_gguf).encode(), params)
