"""A GGUF file taken apart so that any piece of it can be made wrong, and put together again.

Writes what it is told, valid or not; offsets and counts are right unless a test sets them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from melt_edge.runtime.gguf_file import GGML_TYPES, read_gguf

SCALAR_TYPES = {
    "u8": (0, "B"),
    "i8": (1, "b"),
    "u16": (2, "H"),
    "i16": (3, "h"),
    "u32": (4, "I"),
    "i32": (5, "i"),
    "f32": (6, "f"),
    "bool": (7, "B"),
    "u64": (10, "Q"),
    "i64": (11, "q"),
    "f64": (12, "d"),
}
TENSOR_TYPES = {name: number for number, (name, _, _) in GGML_TYPES.items()}


@dataclass
class Key:
    """One metadata entry; type as GGUFInfo.types has it, or a number that is written as it stands."""

    name: str
    type: str | int
    value: Any


@dataclass
class Row:
    """One tensor: ne in the file's order, data as stored. offset None: where it belongs."""

    name: str
    ne: list[int]
    type: int
    data: bytes
    offset: int | None = None
    n_dims: int | None = None


@dataclass
class Draft:
    """A whole file in pieces."""

    keys: list[Key]
    rows: list[Row]
    version: int = 3
    magic: bytes = b"GGUF"
    alignment: int = 32
    counts: dict[str, int] = field(default_factory=dict)  # "keys" or "tensors": a number to write instead

    @classmethod
    def read(cls, path: Path) -> Draft:
        """Take a valid file apart."""
        info = read_gguf(path)
        raw = path.read_bytes()
        rows = []
        for tensor in info.tensors:
            start = info.data_offset + tensor.offset
            data = raw[start : start + tensor.nbytes]
            rows.append(Row(tensor.name, list(tensor.shape[::-1]), TENSOR_TYPES[tensor.type], data))
        keys = [Key(name, info.types[name], value) for name, value in info.metadata.items()]
        return cls(keys, rows, alignment=info.alignment)

    def key(self, name: str) -> Key:
        """The entry of this name."""
        return next(key for key in self.keys if key.name == name)

    def row(self, name: str) -> Row:
        """The tensor of this name."""
        return next(row for row in self.rows if row.name == name)

    def set(self, name: str, value: Any, type: str | int | None = None) -> Draft:
        """Change a key's value (and type), or append it; returns itself."""
        for key in self.keys:
            if key.name == name:
                key.value, key.type = value, key.type if type is None else type
                return self
        assert type is not None, f"a new key {name} needs a type"
        self.keys.append(Key(name, type, value))
        return self

    def drop(self, name: str) -> Draft:
        """Remove the key or tensor of this name; returns itself."""
        self.keys = [key for key in self.keys if key.name != name]
        self.rows = [row for row in self.rows if row.name != name]
        return self

    def header(self) -> bytes:
        """Everything before the tensor data, without the padding."""
        out = [self.magic, struct.pack("<I", self.version)]
        n_tensors, n_keys = self.counts.get("tensors", len(self.rows)), self.counts.get("keys", len(self.keys))
        out.append(struct.pack("<QQ", n_tensors, n_keys))
        for key in self.keys:
            out += [_text(key.name), _value(key.type, key.value)]
        offset = 0
        for row in self.rows:
            n_dims = len(row.ne) if row.n_dims is None else row.n_dims
            out += [_text(row.name), struct.pack("<I", n_dims), struct.pack(f"<{len(row.ne)}Q", *row.ne)]
            out.append(struct.pack("<IQ", row.type, offset if row.offset is None else row.offset))
            offset += -(-len(row.data) // self.alignment) * self.alignment
        return b"".join(out)

    def encode(self) -> bytes:
        """The file's bytes."""
        out = bytearray(self.header())
        for row in self.rows:
            out += bytes(-len(out) % self.alignment)
            out += row.data
        return bytes(out + bytes(-len(out) % self.alignment))

    def write(self, path: Path) -> Path:
        """Write the file; returns the path."""
        path.write_bytes(self.encode())
        return path


def _text(text: str | bytes) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _value(type: str | int, value: Any) -> bytes:
    if isinstance(type, int):
        return struct.pack("<I", type) + bytes(8)
    if type == "str":
        return struct.pack("<I", 8) + _text(value)
    if type == "arr[str]":
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))
    if type.startswith("arr["):
        number, code = SCALAR_TYPES[type[4:-1]]
        return struct.pack("<IIQ", 9, number, len(value)) + struct.pack(f"<{len(value)}{code}", *value)
    number, code = SCALAR_TYPES[type]
    return struct.pack("<I", number) + struct.pack(f"<{code}", value)
