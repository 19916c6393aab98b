"""The C++ refuses by exception what it cannot run, also without the Python check before it."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from parity.native import context
from tiny import tiny_config


def rewrite(source, target, keys=None, tensors=None) -> None:
    """Copy a GGUF file with other values for some keys, other data or None (left out) for some tensors."""
    keys, tensors = keys or {}, tensors or {}
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        value = keys.get(field.name, field.contents())
        writer.add_key_value(field.name, value, kind, sub_type=field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        data = tensors.get(tensor.name, tensor.data)
        if data is not None:
            writer.add_tensor(tensor.name, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


KEYS = {
    "num_loops": [0, 65, 2**31, 2**32 - 1],
    "chunk_size": [0, 2**31],
    "kv_gate": ["scalar"],
    "kv_gate_init": ["ones"],
    "exit_threshold": [0.0, 1.5, float("nan")],
    "attention.layer_norm_rms_epsilon": [0.0, -1.0, float("nan"), float("inf")],
    "rope.freq_base": [0.0, 1.0, float("nan"), float("inf")],
    "rope.dimension_count": [0, 31, 64, 2**31],
    "attention.head_count": [0, 3],
    "attention.head_count_kv": [0, 3],
    "attention.key_length": [0, 31],
    "attention.value_length": [16],
    "feed_forward_length": [0],
    "embedding_length": [0],
    "context_length": [0],
}


def test_the_copy_itself_loads(melt_gguf, tmp_path) -> None:
    """Else every refusal below would be the copy's fault."""
    rewrite(melt_gguf, tmp_path / "melt-copy.gguf")
    with context(tmp_path / "melt-copy.gguf"):
        pass


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in KEYS.items() for value in values])
def test_a_bad_key_is_refused(melt_gguf, tmp_path, key: str, value: object) -> None:
    """Every value that upstream would meet with an abort, an endless loop or a NaN."""
    rewrite(melt_gguf, tmp_path / "melt-bad.gguf", keys={f"melt.{key}": value})
    with pytest.raises(RuntimeError, match="refused"), context(tmp_path / "melt-bad.gguf"):
        pass


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
