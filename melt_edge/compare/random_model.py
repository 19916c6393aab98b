"""GGUF files with random weights at given sizes: for measuring memory and speed, never for text.

Written once into a cache folder and found there again.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

from melt_edge.config import LoopConfig
from melt_edge.errors import ConfigError, MeltError
from melt_edge.export.metadata import add_config
from melt_edge.export.tensors import DIRECT_TYPES
from melt_edge.files import atomic_output
from melt_edge.names import gguf_name
from melt_edge.runtime.gguf_check import check_gguf
from melt_edge.spec import TensorSpec, tensor_specs

Progress = Callable[[int, int, str], None]

RANDOM_TYPES = ("q4_0", "q8_0", "f16")
# Raised when the same configuration would be written as other bytes: files in the cache are told apart by it.
_VERSION = 1
_BLOCK_VALUES = 4 * 2**20
# The standard deviation of a block's whole numbers: uniform nibbles, uniform bytes.
_BLOCK_STD = {"q4_0": 4.6, "q8_0": 73.9}


def random_model(
    name: str, config: LoopConfig, folder: Path, *, type: str = "q4_0", progress: Progress | None = None
) -> Path:
    """The file of these sizes in a cache folder, written if it is not there yet.

    name: begins the file's name. progress: called with bytes done, bytes in all, file name.
    Raises: ConfigError for a folder that cannot be written or has no room.
    """
    about = f"{_VERSION} {type} {sorted(config.to_dict().items())}"
    digest = hashlib.sha256(about.encode()).hexdigest()[:8]
    path = folder / f"{config.model_type}-random-{name}-{type}-{digest}.gguf"
    if path.is_file():
        with suppress(MeltError):  # damaged after it was written: write it again
            check_gguf(path)
            return path
    make_folder(folder)
    with atomic_output(path, force=True) as temporary:
        write_random_gguf(temporary, config, type=type, progress=progress, name=path.name)
    return path


def write_random_gguf(
    path: Path, config: LoopConfig, *, type: str = "q4_0", progress: Progress | None = None, name: str = ""
) -> None:
    """A file with random matrices; its vocabulary is the 256 bytes and numbered fillers.

    Quantised blocks are drawn as they are stored: a constant scale and random bits, which takes seconds for
    1.6 B parameters. Raises: ConfigError for another type, or if the disk has no room.
    """
    if type not in RANDOM_TYPES:
        raise ConfigError(f"type is {type!r}, expected one of {', '.join(RANDOM_TYPES)}")
    matrix_type, file_type = DIRECT_TYPES[type]
    specs = tensor_specs(config)
    writer = GGUFWriter(None, config.model_type)
    add_config(writer, config, exit_gate=True)
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    _add_vocabulary(writer, config.vocab_size)
    total = 0
    for spec in specs.values():
        stored = GGMLQuantizationType.F32 if _is_plain(spec) else matrix_type
        block, block_bytes = GGML_QUANT_SIZES[stored]
        n_bytes = math.prod(spec.shape) // block * block_bytes
        writer.add_tensor_info(gguf_name(spec.name), spec.shape, np.dtype(np.float32), n_bytes, raw_dtype=stored)
        total += n_bytes
    check_disk(path.parent, total + 16 * 2**20)

    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    (stream,) = writer.fout
    writer.write_padding(stream, stream.tell())
    rng = np.random.default_rng(0)
    done = 0
    for spec in specs.values():
        n_bytes = 0
        for piece in _values(spec, type, rng):
            stream.write(piece.data)
            n_bytes += piece.nbytes
        writer.write_padding(stream, n_bytes)
        done += n_bytes
        if progress is not None:
            progress(done, total, name)
    writer.close()


def make_folder(folder: Path) -> None:
    """Make a cache folder if it is not there yet. Raises: ConfigError if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise ConfigError(f"{folder}: cannot be made ({err.strerror or err}); choose another --cache-dir") from err


def check_disk(folder: Path, n_bytes: int) -> None:
    """Raises: ConfigError if the folder's disk has no room for so many bytes."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise ConfigError(
            f"{folder}: {free / 2**20:,.0f} MiB free, {n_bytes / 2**20:,.0f} MiB are needed; "
            "choose another --cache-dir or a smaller model"
        )


def _add_vocabulary(writer: GGUFWriter, vocab_size: int) -> None:
    alphabet = [chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))]
    alphabet += [chr(256 + i) for i in range(256 - len(alphabet))]
    fillers = [f"<filler{i}>" for i in range(vocab_size - 258)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<end>", *alphabet, *fillers, "aa"])
    writer.add_token_types([3, *[1] * 256, *[5] * len(fillers), 1])
    writer.add_token_merges(["a a"])
    writer.add_eos_token_id(0)


def _is_plain(spec: TensorSpec) -> bool:
    """True for what is stored in float32: norms are ones, biases and the exit gate zeros."""
    return spec.role in ("norm", "bias", "exit")


def _values(spec: TensorSpec, type: str, rng: np.random.Generator) -> Iterator[npt.NDArray[Any]]:
    """The tensor's bytes in file order, some rows at a time."""
    if _is_plain(spec):
        yield np.full(spec.shape, 1.0 if spec.role == "norm" else 0.0, np.float32)
        return
    n_rows, columns = spec.shape
    std = 0.92 / columns**0.5  # keeps states near length 1
    step = max(1, _BLOCK_VALUES // columns)
    for start in range(0, n_rows, step):
        rows = min(step, n_rows - start)
        if type == "f16":
            yield (std * rng.standard_normal((rows, columns), np.float32)).astype(np.float16)
            continue
        block, block_bytes = GGML_QUANT_SIZES[DIRECT_TYPES[type][0]]
        blocks = rng.integers(0, 256, (rows, columns // block, block_bytes), np.uint8)  # a float16 scale, then values
        blocks[:, :, :2] = np.float16(std / _BLOCK_STD[type]).reshape(1).view(np.uint8)
        yield blocks
