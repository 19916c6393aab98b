"""Safetensors files on the byte level: which ones a folder has, their headers, raw values in and out.

Reads by offset and without a memory map, so that a reader's memory is what it asked for. Never opens a
pickle, never leaves the folder.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from melt_edge.config import read_json_object
from melt_edge.errors import FormatError, SpecError

if TYPE_CHECKING:
    import torch

FloatArray = npt.NDArray[np.float32]

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
BLOCK_BYTES = 16 * 2**20
# dtype -> the raw integer a value is stored as, and the bits of its exponent: all set means NaN or Inf.
STORAGE: dict[str, tuple[np.dtype[Any], int]] = {
    "F32": (np.dtype("<u4"), 0x7F800000),
    "F16": (np.dtype("<u2"), 0x7C00),
    "BF16": (np.dtype("<u2"), 0x7F80),
}
_MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
_MAX_BAD_SHOWN = 40


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. shape: as stored by torch; offset: of its first byte in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def n_elements(self) -> int:
        """Values in the tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.n_elements * STORAGE[self.dtype][0].itemsize


def read_tables(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a folder's weight files, from their headers."""
    files, weight_map = _weight_files(folder)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for info in _read_header(file):
            if info.name in tensors:
                raise FormatError(
                    f"{file}: tensor {info.name} is also in {tensors[info.name].file.name}; "
                    "download the checkpoint again"
                )
            tensors[info.name] = info
    if weight_map is not None:
        _check_index(folder / INDEX_FILE, weight_map, tensors)
    return tensors


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    present = sorted(file.name for file in folder.glob("*.safetensors"))
    shards = {name for name in present if name.startswith("model-")}
    index_path = folder / INDEX_FILE
    if not index_path.exists():
        if WEIGHTS_FILE in present:
            present = [WEIGHTS_FILE, *sorted(shards)]
        if len(present) == 1:
            return [_inside(folder, present[0])], None
        if present:
            raise FormatError(
                f"{folder}: {len(present)} weight files but no {INDEX_FILE}; download the index as well, "
                f"or keep {WEIGHTS_FILE} alone"
            )
        pickles = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
        if pickles:
            raise FormatError(
                f"{folder}: the weights are pickle files ({', '.join(pickles)}), which can run code when read; "
                f"convert them to {WEIGHTS_FILE} first"
            )
        raise FormatError(f"{folder}: no {WEIGHTS_FILE} and no {INDEX_FILE}; expected a checkpoint with weights")
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index_path}: key 'weight_map' is missing or empty, expected tensor name -> file name")
    named = set()
    for tensor, file_name in weight_map.items():
        if not isinstance(file_name, str):
            raise FormatError(f"{index_path}: tensor {tensor} has file {file_name!r}, expected a file name")
        named.add(file_name)
    surplus = sorted((shards | ({WEIGHTS_FILE} & set(present))) - named)
    if surplus:
        raise FormatError(
            f"{folder}: {', '.join(surplus)} not named in {INDEX_FILE}; remove what belongs to another checkpoint"
        )
    files = [_inside(folder, name) for name in sorted(named)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FormatError(f"{folder}: {', '.join(missing)} named in {INDEX_FILE} but not there; download it again")
    return files, weight_map


def _inside(folder: Path, name: str) -> Path:
    """The path of a weight file, which must be a plain name and lie in the folder."""
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name or ":" in name:
        raise FormatError(f"{folder / INDEX_FILE}: file name {name!r} is not a plain name inside the folder")
    file = folder / name
    real, root = file.resolve(), folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":  # the Hugging Face cache: snapshots/<revision>/x -> ../../blobs/<hash>
        allowed.append(root.parent.parent / "blobs")
    if real.parent not in allowed:
        raise FormatError(f"{file}: links to {real}, outside the checkpoint folder; copy the file there instead")
    return file


def _read_header(file: Path) -> list[TensorInfo]:
    import safetensors

    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(16)
            kind = _pickle_kind(head)
            if kind:
                raise FormatError(
                    f"{file}: holds a {kind}, not safetensors; pickles can run code when read, convert it first"
                )
            header_bytes = int.from_bytes(head[:8], "little")
            if len(head) < 10 or header_bytes > min(size - 8, _MAX_HEADER_BYTES):
                raise FormatError(f"{file}: broken safetensors header or file cut short; download it again")
            # The library checks what we then rely on: JSON, dtypes, offsets without gaps or overlaps, file size.
            with safetensors.safe_open(file, framework="numpy"):
                pass
            stream.seek(8)
            header = json.loads(stream.read(header_bytes))
    except OSError as err:
        raise FormatError(f"{file}: cannot be read ({err.strerror or err})") from err
    except (safetensors.SafetensorError, ValueError, RecursionError) as err:
        if isinstance(err, FormatError):
            raise
        raise FormatError(f"{file}: broken safetensors file or cut short ({err}); download it again") from err
    header.pop("__metadata__", None)
    return [
        TensorInfo(name, entry["dtype"], tuple(entry["shape"]), file, 8 + header_bytes + entry["data_offsets"][0])
        for name, entry in header.items()
    ]


def _pickle_kind(head: bytes) -> str | None:
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return "zip archive (a torch pickle)"
    # Protocol 2 and later open with PROTO; a safetensors header of that length would be followed by '{'.
    if len(head) >= 2 and head[0] == 0x80 and 2 <= head[1] <= 5 and head[8:9] != b"{":
        return "pickle"
    if head[:2] == b"\x1f\x8b" and head[8:9] != b"{":
        return "gzip archive"
    return None


def _check_index(index_path: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    gaps = [
        f"{name}: in {file_name} by the index, not found there"
        for name, file_name in weight_map.items()
        if name not in tensors or tensors[name].file.name != file_name
    ]
    gaps += [
        f"{name}: in {info.file.name}, not in the index" for name, info in tensors.items() if name not in weight_map
    ]
    if gaps:
        shown = gaps[:_MAX_BAD_SHOWN] + (
            [f"... and {len(gaps) - _MAX_BAD_SHOWN} more"] if len(gaps) > _MAX_BAD_SHOWN else []
        )
        raise FormatError(f"{index_path}: {len(gaps)} entries disagree with the files:\n  " + "\n  ".join(shown))


def blocks_in_file_order(
    descriptor: int, infos: list[TensorInfo], size: int
) -> Iterator[tuple[TensorInfo | None, npt.NDArray[np.uint8]]]:
    """All bytes of a file in order, cut at tensors; a tensor's blocks hold whole values."""
    stops: list[tuple[TensorInfo | None, int, int]] = []
    at = 0
    for info in sorted(infos, key=lambda info: info.offset):
        if info.offset > at:
            stops.append((None, at, info.offset))
        stops.append((info, info.offset, info.offset + info.nbytes))
        at = info.offset + info.nbytes
    if at < size:
        stops.append((None, at, size))
    for owner, start, stop in stops:
        for offset in range(start, stop, BLOCK_BYTES):
            yield owner, _pread(descriptor, offset, min(BLOCK_BYTES, stop - offset), infos[0].file)


def read_raw(info: TensorInfo, start: int, count: int) -> npt.NDArray[Any]:
    """Values start..start+count-1 of a tensor, as stored."""
    storage, _ = STORAGE[info.dtype]
    try:
        with info.file.open("rb") as stream:
            raw = _pread(stream.fileno(), info.offset + start * storage.itemsize, count * storage.itemsize, info.file)
    except OSError as err:
        raise FormatError(f"{info.file}: tensor {info.name} cannot be read ({err.strerror or err})") from err
    return raw.view(storage)


def _pread(descriptor: int, offset: int, count: int, file: Path) -> npt.NDArray[np.uint8]:
    buffer = np.empty(count, dtype=np.uint8)
    view = buffer.data
    os.lseek(descriptor, offset, os.SEEK_SET)
    done = 0
    while done < count:
        part = os.read(descriptor, min(count - done, BLOCK_BYTES))
        if not part:
            raise FormatError(f"{file}: cut short while it was being read; download it again")
        view[done : done + len(part)] = part
        done += len(part)
    return buffer


def has_nonfinite(raw: npt.NDArray[Any], dtype: str) -> bool:
    """Whether any stored value is NaN or Inf."""
    _, exponent = STORAGE[dtype]
    for start in range(0, raw.size, BLOCK_BYTES // 4):
        block = raw[start : start + BLOCK_BYTES // 4]
        if bool(np.any((block & block.dtype.type(exponent)) == exponent)):
            return True
    return False


def nonfinite_message(infos: list[TensorInfo]) -> str:
    """The error that names every tensor in ``infos``, up to a limit."""
    names = "".join(f"\n  {info.file.name}: {info.name}" for info in infos[:_MAX_BAD_SHOWN])
    more = f"\n  ... and {len(infos) - _MAX_BAD_SHOWN} more" if len(infos) > _MAX_BAD_SHOWN else ""
    return (
        f"{infos[0].file.parent}: {len(infos)} tensor(s) hold NaN or Inf, expected finite weights "
        f"(a diverged or damaged checkpoint):{names}{more}"
    )


def to_float32(raw: npt.NDArray[Any], dtype: str) -> FloatArray:
    """The stored values as float32, exactly."""
    if dtype == "F32":
        return raw.view(np.dtype("<f4")).astype(np.float32, copy=False)
    if dtype == "F16":
        return raw.view(np.dtype("<f2")).astype(np.float32)
    wide = raw.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def bfloat16_bits(values: FloatArray) -> npt.NDArray[np.uint16]:
    """Float32 values rounded to bfloat16 (nearest, ties to even), as their 16 bits."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    bits16: npt.NDArray[np.uint16] = (rounded >> np.uint32(16)).astype(np.uint16)
    return bits16


def write_weights(
    file: Path,
    dtype: str,
    shapes: dict[str, tuple[int, ...]],
    tensors: Mapping[str, np.ndarray[Any, Any] | torch.Tensor],
) -> None:
    """One safetensors file: header length, JSON header padded to 8 bytes, then the values."""
    itemsize = STORAGE[dtype][0].itemsize
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            values = _as_numpy(tensors[name])
            if values.shape != shape:
                raise SpecError(f"{name}: shape {list(values.shape)}, expected {list(shape)}")
            raw = from_float32(values, dtype)
            if has_nonfinite(raw.reshape(-1), dtype):  # after rounding: 70000 is Inf as float16
                raise FormatError(f"{name}: holds NaN or Inf as {dtype}, expected finite values")
            stream.write(raw.tobytes())


def _as_numpy(tensor: np.ndarray[Any, Any] | torch.Tensor) -> FloatArray:
    if not isinstance(tensor, np.ndarray):
        tensor = tensor.detach().cpu().float().numpy()
    return np.asarray(tensor, dtype=np.float32)


def from_float32(values: FloatArray, dtype: str) -> npt.NDArray[Any]:
    """The values as stored, in their raw integer type."""
    if dtype == "BF16":
        return bfloat16_bits(values).astype("<u2", copy=False)
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(values, dtype="<f4" if dtype == "F32" else "<f2")
    return stored.view(STORAGE[dtype][0])
