"""Reading and writing checkpoints: folders in the Hugging Face layout with safetensors weights.

Tensors are read a block of rows at a time, by offset and without a memory map, so that a reader's memory
is what it asked for. Knows no output format; never opens a pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from melt_edge.config import LoopConfig, read_json_object
from melt_edge.errors import ConfigError, FormatError, SpecError
from melt_edge.files import atomic_folder
from melt_edge.spec import tensor_specs, validate

if TYPE_CHECKING:
    import torch

    from melt_edge.modeling import LoopLM

FloatArray = npt.NDArray[np.float32]
# done bytes, total bytes
ScanProgress = Callable[[int, int], None]

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# The raw integer a value is stored as, and the bits of its exponent: all set means NaN or Inf.
_STORAGE = {
    "F32": (np.dtype("<u4"), 0x7F800000),
    "F16": (np.dtype("<u2"), 0x7C00),
    "BF16": (np.dtype("<u2"), 0x7F80),
}
_TORCH_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_BLOCK_BYTES = 16 * 2**20
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
        return self.n_elements * _STORAGE[self.dtype][0].itemsize


class Checkpoint:
    """A checkpoint folder whose tensors have been checked against its config.json, read lazily.

    ``notes`` tells what was found and put right while opening.
    """

    def __init__(self, path: Path, config: LoopConfig, tensors: dict[str, TensorInfo], notes: list[str]) -> None:
        self.path = path
        self.config = config
        self.tensors = tensors
        self.notes = notes
        self.generation_config = _optional_json(path / "generation_config.json")
        self.tokenizer_config = _optional_json(path / "tokenizer_config.json")
        tokenizer_path = path / "tokenizer.json"
        self.tokenizer_path: Path | None = tokenizer_path if tokenizer_path.is_file() else None
        self._sha256: str | None = None

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """The checkpoint in a folder, every tensor's name, shape and dtype checked.

        Raises: FormatError for a damaged, unsafe or pickled file; ConfigError for config.json;
        SpecError that lists every tensor that is missing, surplus or misshapen.
        """
        path = Path(path)
        if not path.is_dir():
            found = "a file" if path.exists() else "nothing"
            raise FormatError(f"{path}: expected a checkpoint folder with config.json, found {found}")
        config = LoopConfig.from_file(path / "config.json")
        notes: list[str] = []
        tensors = _read_tables(path)
        if config.tie_word_embeddings and "lm_head.weight" in tensors:
            _drop_tied_head(tensors)
            notes.append("lm_head.weight equals the embedding it is tied to and was left out")
        found_tensors = {name: (info.dtype, info.shape) for name, info in tensors.items()}
        validate(config, found_tensors, source=str(path))
        return cls(path, config, {name: tensors[name] for name in tensor_specs(config)}, notes)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing stays open between reads."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str) -> FloatArray:
        """A whole tensor as float32. Raises: FormatError if it holds NaN or Inf, or was cut short."""
        info = self.tensors[name]
        if not info.shape:
            return self.read_rows(name, 0, 1)[0]
        return self.read_rows(name, 0, info.shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> FloatArray:
        """Rows start..stop-1 along the first axis as float32.

        Shapes: (rows, *rest). Raises: FormatError if they hold NaN or Inf, or were cut short.
        """
        info = self.tensors[name]
        row_shape = info.shape[1:]
        row_elements = math.prod(row_shape)
        raw = _read_raw(info, start * row_elements, (stop - start) * row_elements)
        if _has_nonfinite(raw, info.dtype):
            raise FormatError(_nonfinite_message([info]))
        return _to_float32(raw, info.dtype).reshape(stop - start, *row_shape)

    def scan(self, progress: ScanProgress | None = None) -> str:
        """Read every byte once: returns the sha256 of the weights.

        One file: what ``sha256sum model.safetensors`` prints. Shards: the sha256 of the lines that
        ``sha256sum *.safetensors`` prints for them.
        Raises: FormatError naming every tensor that holds NaN or Inf.
        """
        files: dict[Path, list[TensorInfo]] = {}
        for info in self.tensors.values():
            files.setdefault(info.file, []).append(info)
        total = sum(file.stat().st_size for file in files)
        done = 0
        digests: list[tuple[str, str]] = []
        bad: list[TensorInfo] = []
        for file, infos in sorted(files.items()):
            digest = hashlib.sha256()
            with file.open("rb") as stream:
                for info, raw in _blocks_in_file_order(stream.fileno(), infos, file.stat().st_size):
                    digest.update(raw)
                    done += raw.nbytes
                    if info is not None and info not in bad:
                        if _has_nonfinite(raw.view(_STORAGE[info.dtype][0]), info.dtype):
                            bad.append(info)
                    if progress is not None:
                        progress(done, total)
            digests.append((file.name, digest.hexdigest()))
        if bad:
            raise FormatError(_nonfinite_message(bad))
        if len(digests) == 1:
            self._sha256 = digests[0][1]
        else:
            lines = "".join(f"{digest}  {name}\n" for name, digest in digests)
            self._sha256 = hashlib.sha256(lines.encode()).hexdigest()
        return self._sha256

    def sha256(self) -> str:
        """The sha256 of the weights (see ``scan``), computed once."""
        return self._sha256 or self.scan()


def load_model(path: str | Path) -> LoopLM:
    """The reference model with a checkpoint's weights, float32, in eval mode.

    Raises: as Checkpoint.open and Checkpoint.read; BackendUnavailableError without torch.
    """
    try:
        import torch
    except ImportError as err:
        from melt_edge.errors import BackendUnavailableError

        raise BackendUnavailableError("the reference model needs torch; install melt-edge[export]") from err
    from melt_edge.modeling import LoopLM

    with Checkpoint.open(path) as checkpoint:
        with torch.device("meta"):
            model = LoopLM(checkpoint.config)
        state = {name: torch.from_numpy(checkpoint.read(name)) for name in checkpoint.tensors}
    if checkpoint.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    if checkpoint.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def save_checkpoint(
    path: str | Path,
    config: LoopConfig,
    tensors: Mapping[str, np.ndarray[Any, Any] | torch.Tensor],
    *,
    tokenizer_json: str | None = None,
    tokenizer_config: Mapping[str, Any] | None = None,
    generation_config: Mapping[str, Any] | None = None,
    shard_bytes: int | None = None,
    force: bool = False,
) -> Path:
    """Write a checkpoint folder in one step; values are stored as ``config.torch_dtype`` says.

    tensors: torch shapes; read once, a shard at a time, so a lazy mapping bounds the memory. The head of
    a tied model may be among them. shard_bytes: largest file; None writes one file.
    Raises: SpecError if the tensors are not the configuration's, FormatError for NaN or Inf, ConfigError
    if the folder exists and ``force`` is false.
    """
    if config.torch_dtype not in _TORCH_DTYPES:
        raise ConfigError(f"key 'torch_dtype' is {config.torch_dtype!r}, expected one of {', '.join(_TORCH_DTYPES)}")
    dtype = _TORCH_DTYPES[config.torch_dtype]
    specs = tensor_specs(config)
    surplus = set(tensors) - set(specs) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    if surplus or set(specs) - set(tensors):
        validate(
            config,
            {n: (dtype, specs[n].shape if n in specs else ()) for n in set(tensors) & set(specs) | surplus},
            source=str(path),
        )
    itemsize = _STORAGE[dtype][0].itemsize
    sizes = {name: math.prod(spec.shape) * itemsize for name, spec in specs.items()}
    shards = _plan_shards(sizes, shard_bytes)
    with atomic_folder(path, force=force) as folder:
        index: dict[str, str] = {}
        for shard_idx, names in enumerate(shards):
            file = WEIGHTS_FILE
            if len(shards) > 1:
                file = f"model-{shard_idx + 1:05d}-of-{len(shards):05d}.safetensors"
            index.update(dict.fromkeys(names, file))
            _write_weights(folder / file, dtype, {name: specs[name].shape for name in names}, tensors)
        if len(shards) > 1:
            _write_json(folder / INDEX_FILE, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index})
        _write_json(folder / "config.json", config.to_dict())
        if tokenizer_json is not None:
            (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        if tokenizer_config is not None:
            _write_json(folder / "tokenizer_config.json", tokenizer_config)
        if generation_config is not None:
            _write_json(folder / "generation_config.json", generation_config)
    return Path(path)


# --- reading -------------------------------------------------------------------------------------------


def _read_tables(folder: Path) -> dict[str, TensorInfo]:
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
        shown = gaps[:_MAX_BAD_SHOWN] + ([f"... and {len(gaps) - _MAX_BAD_SHOWN} more"] if len(gaps) > 40 else [])
        raise FormatError(f"{index_path}: {len(gaps)} entries disagree with the files:\n  " + "\n  ".join(shown))


def _drop_tied_head(tensors: dict[str, TensorInfo]) -> None:
    """Remove a head that is stored although it is tied; it must be the embedding, value for value."""
    head, embedding = tensors["lm_head.weight"], tensors.get("model.embed_tokens.weight")
    if embedding is None:
        return  # validate() reports both
    same = head.shape == embedding.shape and head.dtype in _STORAGE and embedding.dtype in _STORAGE
    step = _BLOCK_BYTES // 4
    for start in range(0, head.n_elements if same else 0, step):
        count = min(step, head.n_elements - start)
        a = _to_float32(_read_raw(head, start, count), head.dtype)
        b = _to_float32(_read_raw(embedding, start, count), embedding.dtype)
        if not np.array_equal(a, b, equal_nan=True):
            same = False
            break
    if not same:
        raise SpecError(
            f"{head.file}: tie_word_embeddings is true, but lm_head.weight differs from model.embed_tokens.weight; "
            "set tie_word_embeddings to false to keep both"
        )
    del tensors["lm_head.weight"]


def _blocks_in_file_order(
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
        for offset in range(start, stop, _BLOCK_BYTES):
            yield owner, _pread(descriptor, offset, min(_BLOCK_BYTES, stop - offset), infos[0].file)


def _read_raw(info: TensorInfo, start: int, count: int) -> npt.NDArray[Any]:
    """Values start..start+count-1 of a tensor, as stored."""
    storage, _ = _STORAGE[info.dtype]
    try:
        with info.file.open("rb") as stream:
            raw = _pread(stream.fileno(), info.offset + start * storage.itemsize, count * storage.itemsize, info.file)
    except OSError as err:
        raise FormatError(f"{info.file}: tensor {info.name} cannot be read ({err.strerror or err})") from err
    return raw.view(storage)


def _pread(descriptor: int, offset: int, count: int, file: Path) -> npt.NDArray[np.uint8]:
    buffer = np.empty(count, dtype=np.uint8)
    view = memoryview(buffer)
    os.lseek(descriptor, offset, os.SEEK_SET)
    done = 0
    while done < count:
        part = os.read(descriptor, min(count - done, _BLOCK_BYTES))
        if not part:
            raise FormatError(f"{file}: cut short while it was being read; download it again")
        view[done : done + len(part)] = part
        done += len(part)
    return buffer


def _has_nonfinite(raw: npt.NDArray[Any], dtype: str) -> bool:
    _, exponent = _STORAGE[dtype]
    for start in range(0, raw.size, _BLOCK_BYTES // 4):
        block = raw[start : start + _BLOCK_BYTES // 4]
        if bool(np.any((block & block.dtype.type(exponent)) == exponent)):
            return True
    return False


def _nonfinite_message(infos: list[TensorInfo]) -> str:
    names = "".join(f"\n  {info.file.name}: {info.name}" for info in infos[:_MAX_BAD_SHOWN])
    more = f"\n  ... and {len(infos) - _MAX_BAD_SHOWN} more" if len(infos) > _MAX_BAD_SHOWN else ""
    return (
        f"{infos[0].file.parent}: {len(infos)} tensor(s) hold NaN or Inf, expected finite weights "
        f"(a diverged or damaged checkpoint):{names}{more}"
    )


def _to_float32(raw: npt.NDArray[Any], dtype: str) -> FloatArray:
    if dtype == "F32":
        return raw.view(np.dtype("<f4")).astype(np.float32, copy=False)
    if dtype == "F16":
        return raw.view(np.dtype("<f2")).astype(np.float32)
    wide = raw.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


# --- writing -------------------------------------------------------------------------------------------


def bfloat16_bits(values: FloatArray) -> npt.NDArray[np.uint16]:
    """Float32 values rounded to bfloat16 (nearest, ties to even), as their 16 bits."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype(np.uint16)


def _write_weights(
    file: Path,
    dtype: str,
    shapes: dict[str, tuple[int, ...]],
    tensors: Mapping[str, np.ndarray[Any, Any] | torch.Tensor],
) -> None:
    """One safetensors file: header length, JSON header padded to 8 bytes, then the values."""
    itemsize = _STORAGE[dtype][0].itemsize
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
            raw = _from_float32(values, dtype)
            if _has_nonfinite(raw.reshape(-1), dtype):  # after rounding: 70000 is Inf as float16
                raise FormatError(f"{name}: holds NaN or Inf as {dtype}, expected finite values")
            stream.write(raw.tobytes())


def _as_numpy(tensor: np.ndarray[Any, Any] | torch.Tensor) -> FloatArray:
    if not isinstance(tensor, np.ndarray):
        tensor = tensor.detach().cpu().float().numpy()
    return np.asarray(tensor, dtype=np.float32)


def _from_float32(values: FloatArray, dtype: str) -> npt.NDArray[Any]:
    """The values as stored, in their raw integer type."""
    if dtype == "BF16":
        return bfloat16_bits(values).astype("<u2", copy=False)
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(values, dtype="<f4" if dtype == "F32" else "<f2")
    return stored.view(_STORAGE[dtype][0])


def _plan_shards(sizes: dict[str, int], shard_bytes: int | None) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shard_bytes is not None and shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_json(path: Path, keys: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(keys, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
