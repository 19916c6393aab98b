"""The file a conversation is saved in: a checked container around a backend's cache rows.

    magic 8 | version u32 | header bytes u32 | header JSON | tokens i32[n] | payload | sha256 32

Little-endian; the digest covers everything before it. The payload is llama.cpp's sequence state, or the
onnx backend's rows (ort_state). llama.cpp itself reads short files in silence, accepts states of other
weights, and destroys the live conversation before it fails, so nothing reaches it that has not been
compared with the loaded model first.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from melt_edge.errors import ConfigError, ContextOverflowError, FormatError
from melt_edge.files import atomic_output
from melt_edge.runtime.base import ModelInfo
from melt_edge.runtime.gguf_check import GGUFInfo
from melt_edge.runtime.memory import KV_TYPES

ByteArray = npt.NDArray[np.uint8]

MAGIC = b"MELTSTAT"
VERSION = 1
MAX_HEADER_BYTES = 64 * 1024
_PREFIX = struct.Struct("<8sII")
_DIGEST_BYTES = 32
_PIECE_BYTES = 4 * 2**20
_SAMPLE_BYTES = 4096
# llama-context.cpp's io_magic at the pinned commit.
SEQUENCE_MAGIC = 0xAF143CD8


@dataclass(frozen=True)
class StateHeader:
    """What a state belongs to: everything that changes the computation must equal the loaded model's.

    model: model_digest of the file. chunk_size: as asked for, not limited to n_ctx; compared for melt only.
    n_ctx is for the reader of the file: any context with room will do.
    """

    model: str
    architecture: str
    num_loops: int
    chunk_size: int
    kv_type: str
    n_ctx: int
    n_tokens: int
    payload_bytes: int

    @classmethod
    def of(cls, info: ModelInfo, digest: str, *, chunk_size: int, n_tokens: int, n_payload: int) -> StateHeader:
        """The header of a loaded model. A context shorter than a chunk cuts nothing that fits into it."""
        return cls(
            model=digest,
            architecture=info.architecture,
            num_loops=info.num_loops,
            chunk_size=chunk_size,
            kv_type=info.kv_type,
            n_ctx=info.n_ctx,
            n_tokens=n_tokens,
            payload_bytes=n_payload,
        )


class PayloadLayout(Protocol):
    """What a backend knows of its cache: the size and the contents a payload must have."""

    def payload_bytes(self, n_tokens: int) -> int:
        """The exact size of a payload of n_tokens tokens."""

    def check(self, payload: ByteArray, n_tokens: int, *, source: str) -> None:
        """Raises: FormatError unless the payload is one of this cache, with finite rows."""


@dataclass(frozen=True)
class CacheLayout:
    """Shape of the loaded model's cache in llama.cpp, to check a payload against.

    v_transposed: llama.cpp keeps V transposed where flash attention is off.
    """

    n_slots: int
    row_values: int
    kv_type: str
    v_transposed: bool

    @property
    def row_bytes(self) -> int:
        """Bytes of one K or V row of one token in one slot."""
        _, block, block_bytes = KV_TYPES[self.kv_type]
        return self.row_values // block * block_bytes

    def payload_bytes(self, n_tokens: int) -> int:
        """The exact size of llama.cpp's sequence state for n_tokens cells."""
        return payload_bytes(self, n_tokens)

    def check(self, payload: ByteArray, n_tokens: int, *, source: str) -> None:
        """As check_payload."""
        check_payload(payload, n_tokens, self, source=source)


def model_digest(info: GGUFInfo) -> str:
    """sha256 of a model file's header and tensor table and of both ends of every tensor's data.

    A second, not the minutes that hashing tens of gigabytes takes; training or quantising changes every
    tensor, so two models with the same digest are the same for this purpose.
    Raises: FormatError if the file cannot be read any more.
    """
    digest = hashlib.sha256(struct.pack("<Q", info.file_bytes))
    try:
        with info.path.open("rb") as file:
            digest.update(_read_exactly(file, info.data_offset, info.path))
            for tensor in info.tensors:
                sample = min(_SAMPLE_BYTES, tensor.nbytes)
                for offset in (0, tensor.nbytes - sample):
                    file.seek(info.data_offset + tensor.offset + offset)
                    digest.update(_read_exactly(file, sample, info.path))
    except OSError as err:
        raise FormatError(
            f"{info.path}: cannot be read any more ({err.strerror or err}); load the model again"
        ) from err
    return digest.hexdigest()


def write_state(path: Path, header: StateHeader, tokens: Sequence[int], payload: ByteArray, *, force: bool) -> None:
    """Write the container beside ``path``, read it back, and only then let it take the name.

    Raises: ConfigError if the file exists without ``force`` or the disk refuses it; the old file stays.
    """
    header_bytes = json.dumps(asdict(header), sort_keys=True).encode("ascii")
    ids = np.asarray(tokens, dtype="<i4").tobytes()
    try:
        with atomic_output(path, force=force) as temporary:
            digest = hashlib.sha256()
            with temporary.open("wb") as file:
                for part in (_PREFIX.pack(MAGIC, VERSION, len(header_bytes)), header_bytes, ids, payload.data):
                    for start in range(0, len(part), _PIECE_BYTES):
                        piece = part[start : start + _PIECE_BYTES]
                        file.write(piece)
                        digest.update(piece)
                file.write(digest.digest())
                file.flush()
                os.fsync(file.fileno())
            with temporary.open("rb") as file:
                if _digest_of(file, path)[1] != digest.digest():
                    raise FormatError(f"{path}: what was written does not read back; check the disk")
    except OSError as err:
        raise ConfigError(
            f"{path}: the state cannot be written ({err.strerror or err}); free some space or choose another path"
        ) from err


def read_state(path: Path, expected: StateHeader, layout: PayloadLayout) -> tuple[list[int], ByteArray]:
    """Tokens and payload of a state file, every byte of it checked against the loaded model.

    expected: the loaded model's header; its n_tokens and payload_bytes are not compared.
    Raises: FormatError if the file is damaged or belongs to another model or setting;
        ContextOverflowError if its tokens do not fit into this context.
    """
    try:
        with path.open("rb") as file:
            header, tokens_at = _read_header(file, path)
            _check_same(path, header, expected)
            expected_rows = layout.payload_bytes(header.n_tokens)
            if header.payload_bytes != expected_rows:
                raise FormatError(
                    f"{path}: has {header.payload_bytes} bytes of cache rows, expected {expected_rows} for this "
                    "model; save the state again with the same settings (flash_attn, for a GGUF file)"
                )
            expected_bytes = tokens_at + 4 * header.n_tokens + header.payload_bytes + _DIGEST_BYTES
            found_bytes = os.fstat(file.fileno()).st_size
            if found_bytes != expected_bytes:
                raise FormatError(
                    f"{path}: has {found_bytes} bytes, expected {expected_bytes}: the file is cut off or has "
                    "something appended; save the state again"
                )
            stored, computed = _digest_of(file, path)
            if stored != computed:
                raise FormatError(f"{path}: its digest does not fit its contents: the file is damaged; save it again")
            file.seek(tokens_at)
            tokens = np.frombuffer(_read_exactly(file, 4 * header.n_tokens, path), dtype="<i4").tolist()
            payload = np.empty(header.payload_bytes, dtype=np.uint8)
            if file.readinto(payload.data) != header.payload_bytes:
                raise FormatError(f"{path}: became shorter while it was read; save the state again")
    except OSError as err:
        raise FormatError(f"{path}: cannot be read ({err.strerror or err})") from err
    layout.check(payload, header.n_tokens, source=str(path))
    return tokens, payload


def payload_bytes(layout: CacheLayout, n_tokens: int) -> int:
    """The exact size of llama.cpp's sequence state for n_tokens cells."""
    start = 16  # magic, sequence, streams, cells
    if n_tokens == 0:
        return start
    # Each K and V block has 12 bytes of head: type and row size, or type, value size and width.
    return start + 12 * n_tokens + 8 + layout.n_slots * 2 * (12 + n_tokens * layout.row_bytes)


def check_payload(payload: ByteArray, n_tokens: int, layout: CacheLayout, *, source: str) -> None:
    """Walk llama.cpp's sequence state and compare every count, type and size with the cache it goes into.

    Raises: FormatError naming the first field that differs, or rows that are not finite.
    """
    walk = _Walk(payload, source)
    walk.expect("<I", "magic", SEQUENCE_MAGIC)
    walk.skip(4)  # the sequence it came from
    walk.expect("<I", "stream count", 1)
    walk.expect("<I", "cell count", n_tokens)
    if n_tokens:
        cells = walk.take(12 * n_tokens).view("<i4").reshape(n_tokens, 3)
        if not np.array_equal(cells[:, 0], np.arange(n_tokens)) or not (cells[:, 1] == 1).all():
            raise FormatError(f"{source}: the positions of its cache rows are not 0 to {n_tokens - 1}; save it again")
        walk.expect("<I", "V layout (flash attention)", int(layout.v_transposed))
        walk.expect("<I", "slot count", layout.n_slots)
        type_id = KV_TYPES[layout.kv_type][0]
        for _ in range(layout.n_slots):
            walk.expect("<i", "K type", type_id)
            walk.expect("<Q", "K row size", layout.row_bytes)
            walk.rows(n_tokens, layout)
        for _ in range(layout.n_slots):
            walk.expect("<i", "V type", type_id)
            if layout.v_transposed:
                walk.expect("<I", "V value size", layout.row_bytes // layout.row_values)
                walk.expect("<I", "V width", layout.row_values)
            else:
                walk.expect("<Q", "V row size", layout.row_bytes)
            walk.rows(n_tokens, layout)
    walk.end()


class _Walk:
    """A cursor over the payload that refuses what it does not expect."""

    def __init__(self, payload: ByteArray, source: str) -> None:
        self._payload, self._source, self._at = payload, source, 0

    def take(self, n_bytes: int) -> ByteArray:
        if self._at + n_bytes > len(self._payload):
            raise FormatError(f"{self._source}: its cache rows end after {len(self._payload)} bytes; save it again")
        self._at += n_bytes
        return self._payload[self._at - n_bytes : self._at]

    def skip(self, n_bytes: int) -> None:
        self.take(n_bytes)

    def expect(self, form: str, what: str, expected: int) -> None:
        (found,) = struct.unpack(form, self.take(struct.calcsize(form)).tobytes())
        if found != expected:
            raise FormatError(
                f"{self._source}: its cache has {what} {found}, expected {expected}: "
                "it was saved with other settings; load the model as it was then"
            )

    def rows(self, n_tokens: int, layout: CacheLayout) -> None:
        values = self.take(n_tokens * layout.row_bytes)
        # One NaN row would turn every later token into noise; block types keep theirs in the scales.
        if layout.kv_type in ("f32", "f16"):
            finite = np.isfinite(values.view("<f4" if layout.kv_type == "f32" else "<f2")).all()
        else:
            block_bytes = KV_TYPES[layout.kv_type][2]
            scales = np.ascontiguousarray(values.reshape(-1, block_bytes)[:, :2]).view("<f2")
            finite = np.isfinite(scales).all()
        if not finite:
            raise FormatError(f"{self._source}: has cache rows that are not finite; save the state again")

    def end(self) -> None:
        if self._at != len(self._payload):
            raise FormatError(f"{self._source}: has {len(self._payload) - self._at} bytes after its cache rows")


def _read_header(file: BinaryIO, path: Path) -> tuple[StateHeader, int]:
    magic, version, n_header = _PREFIX.unpack(_read_exactly(file, _PREFIX.size, path))
    if magic != MAGIC:
        raise FormatError(f"{path}: is not a melt-edge state (starts with {magic!r}, expected {MAGIC!r})")
    if version != VERSION:
        raise FormatError(f"{path}: has state version {version}, expected {VERSION}; save it again with this version")
    if n_header > MAX_HEADER_BYTES:
        raise FormatError(f"{path}: its header has {n_header} bytes, expected at most {MAX_HEADER_BYTES}")
    try:
        keys: Any = json.loads(_read_exactly(file, n_header, path))
    except (ValueError, RecursionError) as err:
        raise FormatError(f"{path}: its header is damaged ({type(err).__name__}); save the state again") from err
    kinds = {field.name: str if field.type == "str" else int for field in fields(StateHeader)}
    if not isinstance(keys, dict) or {key: type(value) for key, value in keys.items()} != kinds:
        raise FormatError(f"{path}: its header is damaged (other keys than {', '.join(kinds)}); save the state again")
    header = StateHeader(**keys)
    if header.n_tokens < 0 or header.payload_bytes < 0:
        raise FormatError(f"{path}: its header is damaged (negative sizes); save the state again")
    return header, _PREFIX.size + n_header


def _check_same(path: Path, found: StateHeader, expected: StateHeader) -> None:
    names = {
        "architecture": "architecture",
        "model": "model file",
        "num_loops": "number of loops",
        "chunk_size": "chunk size",
        "kv_type": "cache type",
    }
    for key, what in names.items():
        is_, should = getattr(found, key), getattr(expected, key)
        if key == "chunk_size" and expected.architecture != "melt":
            continue  # ouro computes the same with any
        if is_ != should:
            if key == "model":
                is_, should = f"with digest {is_[:12]}...", f"{should[:12]}..."
            raise FormatError(
                f"{path}: was saved with {what} {is_}, the loaded model has {should}; load the model as it was then"
            )
    if found.n_tokens > expected.n_ctx:
        raise ContextOverflowError(
            f"{path}: holds {found.n_tokens} tokens, the context has room for {expected.n_ctx}; "
            f"load the model with n_ctx={found.n_ctx}"
        )


def _digest_of(file: BinaryIO, path: Path) -> tuple[bytes, bytes]:
    """(stored, computed) digest of a whole container."""
    left = os.fstat(file.fileno()).st_size - _DIGEST_BYTES
    file.seek(0)
    digest = hashlib.sha256()
    while left > 0:
        piece = _read_exactly(file, min(left, _PIECE_BYTES), path)
        digest.update(piece)
        left -= len(piece)
    return _read_exactly(file, _DIGEST_BYTES, path), digest.digest()


def _read_exactly(file: BinaryIO, n_bytes: int, path: Path) -> bytes:
    piece = file.read(n_bytes)
    if len(piece) != n_bytes:
        raise FormatError(f"{path}: ends too early ({n_bytes} bytes expected, {len(piece)} found); the file is cut off")
    return piece
