"""A bounded reader of a GGUF file's header, metadata and tensor table.

Trusts nothing in the file: every count and length is compared with the bytes that are left before
anything is allocated for it. Knows the container only; what the values mean is gguf_check's part.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from melt_edge.errors import FormatError

Scalar = int | float | bool | str
MetaValue = Scalar | list[int] | list[float] | list[bool] | list[str]

# Far above any model of these architectures (a 262k vocabulary has some 1.5 million array items in
# 20 MB); they keep a hostile file from costing minutes or gigabytes while it is only being looked at.
MAX_KEYS = 4096
MAX_TENSORS = 65536
MAX_ARRAY_ITEMS = 2**22
MAX_HEADER_BYTES = 256 * 2**20
MAX_KEY_BYTES = 256
MAX_NAME_BYTES = 63  # ggml's GGML_MAX_NAME with its closing zero
MAX_ALIGNMENT = 65536
DEFAULT_ALIGNMENT = 32

# GGUF value types: number -> (name, struct format, bytes). 8 is a string, 9 an array.
_SCALARS = {
    0: ("u8", "B", 1),
    1: ("i8", "b", 1),
    2: ("u16", "H", 2),
    3: ("i16", "h", 2),
    4: ("u32", "I", 4),
    5: ("i32", "i", 4),
    6: ("f32", "f", 4),
    7: ("bool", "B", 1),
    10: ("u64", "Q", 8),
    11: ("i64", "q", 8),
    12: ("f64", "d", 8),
}
_STRING, _ARRAY = 8, 9

# ggml's tensor types: number -> (name, values per block, bytes per block).
GGML_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}


@dataclass(frozen=True)
class TensorEntry:
    """One row of the tensor table.

    Shapes: as numpy and torch show them, [out, in]; the file's ne order is the reverse.
    Units: offset counts from the start of the file's data section; nbytes without padding.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int

    @property
    def n_values(self) -> int:
        """Number of weights in the tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GGUFInfo:
    """Header, metadata and tensor table of a GGUF file; the tensor data is not read.

    types: metadata key -> "u32", "f32", "str", "arr[str]", ...   data_offset: start of the data section.
    """

    path: Path
    version: int
    metadata: Mapping[str, MetaValue]
    types: Mapping[str, str]
    tensors: list[TensorEntry]
    alignment: int
    data_offset: int
    file_bytes: int

    @property
    def arch(self) -> str:
        """general.architecture, or "" if the file does not say."""
        value = self.metadata.get("general.architecture")
        return value if isinstance(value, str) else ""

    @property
    def n_params(self) -> int:
        """Weights in the file: each physical tensor counts once, however often it is run."""
        return sum(tensor.n_values for tensor in self.tensors)


def read_gguf(path: str | Path) -> GGUFInfo:
    """Header, metadata and tensor table of any little-endian GGUF v2 or v3 file.

    Raises: FormatError naming the file and the place if it is missing, truncated or damaged.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _read(_Reader(path, file, os.fstat(file.fileno()).st_size))
    except OSError as err:
        raise FormatError(f"{path}: cannot be read ({err.strerror or err})") from err


class _Reader:
    """Reads forward through the header, never past the file's end or MAX_HEADER_BYTES."""

    def __init__(self, path: Path, file: BinaryIO, file_bytes: int) -> None:
        self.path = path
        self.file_bytes = file_bytes
        self.pos = 0
        self.items_left = MAX_ARRAY_ITEMS
        self._file = file
        self._buffer = bytearray()

    def fail(self, message: str) -> FormatError:
        return FormatError(f"{self.path}: {message}")

    def need(self, count: int, what: str) -> bytearray:
        """The buffer, which holds at least `count` more bytes from self.pos on."""
        end = self.pos + count
        if end > self.file_bytes:
            left = self.file_bytes - self.pos
            raise self.fail(
                f"{what} needs {count} bytes at byte {self.pos}, {left} are left; "
                "the file is truncated or damaged, fetch or export it again"
            )
        if end > MAX_HEADER_BYTES:
            raise self.fail(f"{what} ends beyond {MAX_HEADER_BYTES} bytes of metadata, which no such model has")
        while len(self._buffer) < end:
            piece = self._file.read(max(2**20, end - len(self._buffer)))
            if not piece:
                raise self.fail(f"{what}: the file became shorter while it was read")
            self._buffer += piece
        return self._buffer

    def unpack(self, code: str, size: int, what: str) -> int | float:
        buffer = self.need(size, what)
        (value,) = struct.unpack_from("<" + code, buffer, self.pos)
        self.pos += size
        return value  # type: ignore[no-any-return]

    def u32(self, what: str) -> int:
        return int(self.unpack("I", 4, what))

    def u64(self, what: str) -> int:
        return int(self.unpack("Q", 8, what))

    def text(self, what: str, max_bytes: int | None = None) -> str:
        """A length-prefixed UTF-8 string without NUL, which C code would cut it at."""
        size = self.u64(what)
        if max_bytes is not None and size > max_bytes:
            raise self.fail(f"{what} is {size} bytes long, expected at most {max_bytes}")
        buffer = self.need(size, what)
        raw = buffer[self.pos : self.pos + size]
        self.pos += size
        return self.decode(raw, what)

    def decode(self, raw: bytearray, what: str) -> str:
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as err:
            raise self.fail(f"{what} is not UTF-8 ({err.reason} at byte {err.start}); the file is damaged") from None
        if "\0" in text:
            raise self.fail(f"{what} contains a zero byte; the file is damaged")
        return text

    def texts(self, count: int, what: str) -> list[str]:
        """`count` strings: the inner loop of a 49k vocabulary, hence without a call per item."""
        found: list[str] = []
        unpack_from, pos = struct.Struct("<Q").unpack_from, self.pos
        buffer = self.need(8 * count, what)  # each string takes 8 bytes at least
        for i in range(count):
            if pos + 8 > len(buffer):
                self.pos = pos
                buffer = self.need(8, f"{what}[{i}]")
            (size,) = unpack_from(buffer, pos)
            end = pos + 8 + size
            if end > len(buffer):
                self.pos = pos + 8
                buffer = self.need(size, f"{what}[{i}]")
            try:
                found.append(buffer[pos + 8 : end].decode("utf-8"))
            except UnicodeDecodeError:
                self.decode(buffer[pos + 8 : end], f"{what}[{i}]")
            pos = end
        self.pos = pos
        for i, text in enumerate(found):
            if "\0" in text:
                raise self.fail(f"{what}[{i}] contains a zero byte; the file is damaged")
        return found


def _read(reader: _Reader) -> GGUFInfo:
    magic = bytes(reader.need(24, "the GGUF header")[:4])
    if magic != b"GGUF":
        raise reader.fail(f"starts with {magic!r}, expected b'GGUF': this is no GGUF file")
    reader.pos = 4
    version = reader.u32("the version")
    if version & 0xFFFF == 0:
        raise reader.fail("is a big-endian GGUF file, expected little-endian; export it again on this machine")
    if version not in (2, 3):
        raise reader.fail(f"is GGUF version {version}, expected 2 or 3; export it again")
    n_tensors = reader.u64("the number of tensors")
    n_keys = reader.u64("the number of keys")
    if n_tensors > MAX_TENSORS:
        raise reader.fail(f"says it has {n_tensors} tensors, expected at most {MAX_TENSORS}; the header is damaged")
    if n_keys > MAX_KEYS:
        raise reader.fail(f"says it has {n_keys} keys, expected at most {MAX_KEYS}; the header is damaged")
    metadata: dict[str, MetaValue] = {}
    types: dict[str, str] = {}
    for i in range(n_keys):
        key = _read_name(reader, f"key {i}", MAX_KEY_BYTES)
        if key in metadata:
            raise reader.fail(f"key {key!r} stands twice in the metadata; the file is damaged")
        types[key], metadata[key] = _read_value(reader, key)
    alignment = _alignment(reader, metadata, types)
    rows = [_read_row(reader, i) for i in range(n_tensors)]
    data_offset = -(-reader.pos // alignment) * alignment
    return GGUFInfo(
        path=reader.path,
        version=version,
        metadata=metadata,
        types=types,
        tensors=_place(reader, rows, alignment, data_offset),
        alignment=alignment,
        data_offset=data_offset,
        file_bytes=reader.file_bytes,
    )


def _read_name(reader: _Reader, what: str, max_bytes: int) -> str:
    name = reader.text(f"the name of {what}", max_bytes)
    if not name or not name.isascii() or not name.isprintable() or " " in name:
        raise reader.fail(f"the name of {what} is {name!r}, expected printable ASCII; the file is damaged")
    return name


def _read_value(reader: _Reader, key: str) -> tuple[str, MetaValue]:
    what = f"key {key!r}"
    number = reader.u32(f"the type of {what}")
    if number == _STRING:
        return "str", reader.text(what)
    if number == _ARRAY:
        return _read_array(reader, key)
    if number not in _SCALARS:
        raise reader.fail(f"{what} has the value type {number}, which GGUF does not define; the file is damaged")
    name, code, size = _SCALARS[number]
    value = reader.unpack(code, size, what)
    if name == "bool":
        if value not in (0, 1):
            raise reader.fail(f"{what} is a bool of value {value}, expected 0 or 1; the file is damaged")
        return name, bool(value)
    return name, value


def _read_array(reader: _Reader, key: str) -> tuple[str, MetaValue]:
    what = f"key {key!r}"
    number = reader.u32(f"the item type of {what}")
    count = reader.u64(f"the length of {what}")
    if number == _ARRAY:
        raise reader.fail(f"{what} is an array of arrays, which no model file uses")
    if number != _STRING and number not in _SCALARS:
        raise reader.fail(f"{what} has the item type {number}, which GGUF does not define; the file is damaged")
    if count > reader.items_left:
        raise reader.fail(f"{what} has {count} items; a file may have {MAX_ARRAY_ITEMS} in all its arrays")
    reader.items_left -= count
    if number == _STRING:
        return "arr[str]", reader.texts(count, what)
    name, code, size = _SCALARS[number]
    buffer = reader.need(count * size, what)
    values = list(struct.unpack_from(f"<{count}{code}", buffer, reader.pos))
    reader.pos += count * size
    if name == "bool":
        if not set(values) <= {0, 1}:
            raise reader.fail(f"{what} has a bool that is neither 0 nor 1; the file is damaged")
        values = [value == 1 for value in values]
    return f"arr[{name}]", values


def _alignment(reader: _Reader, metadata: Mapping[str, MetaValue], types: Mapping[str, str]) -> int:
    key = "general.alignment"
    if key not in metadata:
        return DEFAULT_ALIGNMENT
    value = metadata[key]
    ok = types[key] == "u32" and isinstance(value, int) and value.bit_count() == 1
    if not ok or not DEFAULT_ALIGNMENT <= value <= MAX_ALIGNMENT:  # type: ignore[operator]
        raise reader.fail(
            f"key {key!r} is {types[key]} {value!r}, expected a u32 power of two "
            f"from {DEFAULT_ALIGNMENT} to {MAX_ALIGNMENT}"
        )
    return int(value)  # type: ignore[arg-type]


def _read_row(reader: _Reader, i: int) -> TensorEntry:
    name = _read_name(reader, f"tensor {i}", MAX_NAME_BYTES)
    what = f"tensor {name!r}"
    n_dims = reader.u32(f"the number of dimensions of {what}")
    if not 1 <= n_dims <= 4:
        raise reader.fail(f"{what} has {n_dims} dimensions, expected 1 to 4")
    ne = [reader.u64(f"the shape of {what}") for _ in range(n_dims)]
    number = reader.u32(f"the type of {what}")
    offset = reader.u64(f"the offset of {what}")
    if number not in GGML_TYPES:
        raise reader.fail(f"{what} has the type {number}, which ggml does not define or no longer reads")
    type_name, block, block_bytes = GGML_TYPES[number]
    if min(ne) < 1 or math.prod(ne) >= 2**62:
        raise reader.fail(f"{what} has the shape {ne[::-1]}, expected sizes of at least 1 that fit into the file")
    if ne[0] % block:
        raise reader.fail(f"{what} has rows of {ne[0]} values, expected a multiple of {type_name}'s block of {block}")
    return TensorEntry(name, tuple(ne[::-1]), type_name, offset, math.prod(ne) // block * block_bytes)


def _place(reader: _Reader, rows: list[TensorEntry], alignment: int, data_offset: int) -> list[TensorEntry]:
    """The rows, if each begins where the one before it ends (padded) and all lie inside the file."""
    seen: set[str] = set()
    expected = 0
    for row in rows:
        if row.name in seen:
            raise reader.fail(f"tensor {row.name!r} stands twice in the tensor table; the file is damaged")
        seen.add(row.name)
        if row.offset != expected:
            raise reader.fail(
                f"tensor {row.name!r} has the offset {row.offset}, expected {expected} "
                f"(right after the tensor before it, aligned to {alignment}); the file is damaged"
            )
        end = data_offset + row.offset + row.nbytes
        if end > reader.file_bytes:
            raise reader.fail(
                f"tensor {row.name!r} ends at byte {end}, the file has {reader.file_bytes}; "
                "the file is truncated or damaged, fetch or export it again"
            )
        expected += -(-row.nbytes // alignment) * alignment
    surplus = reader.file_bytes - data_offset - expected
    if surplus > 0:
        raise reader.fail(
            f"has {surplus} bytes after its last tensor {rows[-1].name if rows else ''!r}, expected none; "
            "the tensor table is damaged or the file is two files in one"
        )
    return rows
