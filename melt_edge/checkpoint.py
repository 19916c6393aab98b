"""Reading and writing checkpoints: folders in the Hugging Face layout with safetensors weights.

Checks everything against the configuration before a value is used. Knows no output format.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from melt_edge.config import LoopConfig, read_json_object
from melt_edge.errors import BackendUnavailableError, ConfigError, FormatError, SpecError
from melt_edge.files import atomic_folder
from melt_edge.spec import tensor_specs, validate
from melt_edge.weights import (
    BLOCK_BYTES,
    INDEX_FILE,
    STORAGE,
    WEIGHTS_FILE,
    FloatArray,
    TensorInfo,
    blocks_in_file_order,
    has_nonfinite,
    nonfinite_message,
    read_raw,
    read_tables,
    to_float32,
    write_weights,
)

if TYPE_CHECKING:
    import torch

    from melt_edge.modeling import LoopLM

# done bytes, total bytes
ScanProgress = Callable[[int, int], None]

_TORCH_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


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
        tensors = read_tables(path)
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
        return self.read_rows(name, 0, info.shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> FloatArray:
        """Rows start..stop-1 along the first axis as float32.

        Shapes: (rows, *rest). Raises: FormatError if they hold NaN or Inf, or were cut short.
        """
        info = self.tensors[name]
        row_shape = info.shape[1:]
        row_elements = math.prod(row_shape)
        raw = read_raw(info, start * row_elements, (stop - start) * row_elements)
        if has_nonfinite(raw, info.dtype):
            raise FormatError(nonfinite_message([info]))
        return to_float32(raw, info.dtype).reshape(stop - start, *row_shape)

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
                for owner, raw in blocks_in_file_order(stream.fileno(), infos, file.stat().st_size):
                    digest.update(raw.data)
                    done += raw.nbytes
                    if owner is not None and owner not in bad and _holds_nonfinite(raw, owner):
                        bad.append(owner)
                    if progress is not None:
                        progress(done, total)
            digests.append((file.name, digest.hexdigest()))
        if bad:
            raise FormatError(nonfinite_message(bad))
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
    with Checkpoint.open(path) as checkpoint:
        return reference_model(checkpoint, checkpoint.config)


def reference_model(checkpoint: Checkpoint, config: LoopConfig) -> LoopLM:
    """The reference model of a configuration that has the checkpoint's tensors, as ``share_kv`` gives one.

    Raises: FormatError if a tensor holds NaN or Inf; BackendUnavailableError without torch.
    """
    try:
        import torch
    except ImportError as err:
        raise BackendUnavailableError("the reference model needs torch; install melt-edge[export]") from err
    from melt_edge.modeling import LoopLM

    with torch.device("meta"):  # no memory and no time for weights that are replaced at once
        model = LoopLM(config)
    state = {name: torch.from_numpy(checkpoint.read(name)) for name in checkpoint.tensors}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    if config.tie_word_embeddings:
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
    itemsize = STORAGE[dtype][0].itemsize
    sizes = {name: math.prod(spec.shape) * itemsize for name, spec in specs.items()}
    shards = plan_shards(sizes, shard_bytes)
    with atomic_folder(path, force=force) as folder:
        index: dict[str, str] = {}
        for shard_idx, names in enumerate(shards):
            file = WEIGHTS_FILE
            if len(shards) > 1:
                file = f"model-{shard_idx + 1:05d}-of-{len(shards):05d}.safetensors"
            index.update(dict.fromkeys(names, file))
            write_weights(folder / file, dtype, {name: specs[name].shape for name in names}, tensors)
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


def _holds_nonfinite(raw: npt.NDArray[np.uint8], info: TensorInfo) -> bool:
    return has_nonfinite(raw.view(STORAGE[info.dtype][0]), info.dtype)


def _drop_tied_head(tensors: dict[str, TensorInfo]) -> None:
    """Remove a head that is stored although it is tied; it must be the embedding, value for value."""
    head, embedding = tensors["lm_head.weight"], tensors.get("model.embed_tokens.weight")
    if embedding is None:
        return  # validate() reports both
    same = head.shape == embedding.shape and head.dtype in STORAGE and embedding.dtype in STORAGE
    step = BLOCK_BYTES // 4
    for start in range(0, head.n_elements if same else 0, step):
        count = min(step, head.n_elements - start)
        a = to_float32(read_raw(head, start, count), head.dtype)
        b = to_float32(read_raw(embedding, start, count), embedding.dtype)
        if not np.array_equal(a, b, equal_nan=True):
            same = False
            break
    if not same:
        raise SpecError(
            f"{head.file}: tie_word_embeddings is true, but lm_head.weight differs from model.embed_tokens.weight; "
            "set tie_word_embeddings to false to keep both"
        )
    del tensors["lm_head.weight"]


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


def plan_shards(sizes: Mapping[str, int], shard_bytes: int | None) -> list[list[str]]:
    """Tensor names file by file, in order; a file goes above shard_bytes only for a single larger tensor."""
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
