"""An Ouro GGUF file -> the same weights as a MELT without a gate, so that all loops share one cache row.

Copies the tensors' bytes as they are; only the architecture's keys change. Loads nothing into llama.cpp.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

from melt_edge.errors import ConfigError, FormatError
from melt_edge.files import atomic_output
from melt_edge.runtime.gguf_check import GGUFInfo, check_gguf, config_from_gguf

_VALUE_TYPES = {
    "u8": GGUFValueType.UINT8,
    "i8": GGUFValueType.INT8,
    "u16": GGUFValueType.UINT16,
    "i16": GGUFValueType.INT16,
    "u32": GGUFValueType.UINT32,
    "i32": GGUFValueType.INT32,
    "f32": GGUFValueType.FLOAT32,
    "bool": GGUFValueType.BOOL,
    "u64": GGUFValueType.UINT64,
    "i64": GGUFValueType.INT64,
    "f64": GGUFValueType.FLOAT64,
    "str": GGUFValueType.STRING,
}
# The writer puts these in itself.
_WRITERS_OWN = ("general.architecture", "general.alignment")


def share_kv_gguf(source: str | Path, out: str | Path, *, chunk_size: int | None = None, force: bool = False) -> Path:
    """Write an Ouro GGUF file again as a MELT with kv_gate "none": 1/T of its cache, with some loss.

    chunk_size: prompt tokens per chunk, default that of LoopConfig. Returns ``out``.
    Raises: FormatError or SpecError for a source that does not load; ConfigError if its cache is shared
    already, or if ``out`` exists and ``force`` is false.
    """
    info = check_gguf(source)
    config = config_from_gguf(info)
    if config.shares_kv:
        raise ConfigError(f"{source}: key 'general.architecture' is {info.arch!r}, expected 'ouro'; use it as it is")
    config = config.share_kv(chunk_size)
    with atomic_output(out, force=force) as temporary:
        writer = GGUFWriter(None, config.model_type)
        if info.alignment != writer.data_alignment:
            writer.add_custom_alignment(info.alignment)
        for key, value in info.metadata.items():
            if key in _WRITERS_OWN:
                continue
            own = key.startswith(f"{info.arch}.")
            name = config.model_type + key.removeprefix(info.arch) if own else key
            _add(writer, name, value, info.types[key])
        writer.add_uint32("melt.chunk_size", config.chunk_size)
        writer.add_string("melt.kv_gate", config.kv_gate)
        writer.add_string("melt.kv_gate_init", config.kv_gate_init)
        _write(writer, info, temporary)
    return Path(out)


def _add(writer: GGUFWriter, key: str, value: Any, type_name: str) -> None:
    if type_name.startswith("arr["):
        item = _VALUE_TYPES[type_name[4:-1]]
        if value:  # GGUF readers agree on a missing array, not on an empty one
            writer.add_key_value(key, value, GGUFValueType.ARRAY, sub_type=item)
    else:
        writer.add_key_value(key, value, _VALUE_TYPES[type_name])


def _write(writer: GGUFWriter, info: GGUFInfo, path: Path) -> None:
    for tensor in info.tensors:
        kind = GGMLQuantizationType[tensor.type]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    (stream,) = writer.fout
    writer.write_padding(stream, stream.tell())
    with info.path.open("rb") as file:
        for tensor in info.tensors:
            file.seek(info.data_offset + tensor.offset)
            left = tensor.nbytes
            while left:
                block = file.read(min(left, 16 * 2**20))
                if not block:
                    raise FormatError(f"{info.path}: became shorter while it was read; fetch it again")
                stream.write(block)
                left -= len(block)
            writer.write_padding(stream, tensor.nbytes)
    writer.close()
