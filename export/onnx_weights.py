"""The one file of weights that all graphs of an ONNX folder share: what lies where, and writing it block by block.

Graphs ask for tensors by their checkpoint names; each is given a place at its first use and written once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from melt_edge.checkpoint import Checkpoint
from melt_edge.errors import FormatError
from melt_edge.export.onnx_quantize import BlockFormat, quantize_rows
from melt_edge.export.quantize import Progress
from melt_edge.weights import FloatArray

WEIGHTS_NAME = "weights.bin"
# Large tensors begin on a page, so that onnxruntime maps them from the file instead of reading them.
_PAGE_BYTES, _ALIGN_BYTES, _LARGE_BYTES = 4096, 64, 2**20
_BLOCK_ELEMENTS = 4 * 2**20
_LARGEST = {np.dtype(np.float16): 65504.0, np.dtype(np.float32): math.inf}

# which tensor of a job, offset in bytes from its first one, values
Pieces = Iterator[tuple[int, int, npt.NDArray[Any]]]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the weights file, as graphs refer to it. offset: of its first byte."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class _Job:
    """Tensors that are written together."""

    tensors: tuple[StoredTensor, ...]
    pieces: Callable[[], Pieces]


@dataclass
class WeightsFile:
    """Places tensors as graphs ask for them; ``write`` then streams the checkpoint into them."""

    source: Checkpoint
    nbytes: int = 0
    used: set[str] = field(default_factory=set)
    _jobs: dict[str, _Job] = field(default_factory=dict)

    def plain(self, name: str, dtype: npt.DTypeLike) -> StoredTensor:
        """A checkpoint tensor in its own layout. Shapes: as stored by torch."""
        kind = np.dtype(dtype)
        shape = self.source.tensors[name].shape

        def pieces() -> Pieces:
            row_bytes = math.prod(shape[1:]) * kind.itemsize
            for start, values in self._rows(name):
                yield 0, start * row_bytes, self._cast(name, values, kind)

        return self._place(name, (name,), [("", kind, shape)], pieces)[0]

    def transposed(self, names: tuple[str, ...], dtype: npt.DTypeLike) -> StoredTensor:
        """Matrices side by side, as MatMul wants its right side. Shapes: [out, in] each -> [in, sum of out]."""
        kind = np.dtype(dtype)
        n_in = self.source.tensors[names[0]].shape[1]
        n_out = sum(self.source.tensors[name].shape[0] for name in names)

        def pieces() -> Pieces:
            whole = [self._cast(name, self.source.read(name), kind) for name in names]
            step = max(1, _BLOCK_ELEMENTS // n_out)
            for start in range(0, n_in, step):
                columns = [values[:, start : start + step].T for values in whole]
                yield 0, start * n_out * kind.itemsize, np.concatenate(columns, axis=1)

        return self._place("+".join(names) + ".T", names, [("", kind, (n_in, n_out))], pieces)[0]

    def blocks(
        self, names: tuple[str, ...], fmt: BlockFormat, dtype: npt.DTypeLike
    ) -> tuple[StoredTensor, StoredTensor, StoredTensor | None]:
        """Matrices one above the other, quantised: data, scales, zero points of the format's shapes."""
        kind = np.dtype(dtype)
        n_in = self.source.tensors[names[0]].shape[1]
        n_out = sum(self.source.tensors[name].shape[0] for name in names)
        parts = [
            (".data", np.dtype(np.uint8), fmt.data_shape(n_out, n_in)),
            (".scales", kind, fmt.scales_shape(n_out, n_in)),
        ]
        if not fmt.symmetric:
            parts.append((".zeros", np.dtype(np.uint8), fmt.zeros_shape(n_out, n_in)))

        def pieces() -> Pieces:
            above = 0
            for name in names:
                for start, values in self._rows(name):
                    quantised = quantize_rows(values, fmt)
                    scales = self._cast(name, quantised.scales, kind)
                    for index, piece in enumerate((quantised.data, scales, quantised.zeros)):
                        if piece is not None:
                            yield index, (above + start) * piece[0].nbytes, piece
                above += self.source.tensors[name].shape[0]

        placed = self._place("+".join(names), names, parts, pieces)
        return placed[0], placed[1], placed[2] if len(placed) > 2 else None

    def generated(
        self, name: str, dtype: npt.DTypeLike, shape: tuple[int, ...], make: Callable[[], npt.NDArray[Any]]
    ) -> StoredTensor:
        """A tensor that no checkpoint has, such as rotary tables; ``make`` is called when it is written."""
        kind = np.dtype(dtype)

        def pieces() -> Pieces:
            yield 0, 0, make().astype(kind)

        return self._place(name, (), [("", kind, shape)], pieces)[0]

    def tensors(self) -> list[StoredTensor]:
        """Every placed tensor, in the order of the file."""
        return [tensor for job in self._jobs.values() for tensor in job.tensors]

    def write(self, path: Path, progress: Progress | None) -> None:
        """Stream every placed tensor into a new file.

        Raises: FormatError if a value is NaN or Inf, or becomes so in the stored type.
        """
        total = sum(tensor.nbytes for tensor in self.tensors())
        done = 0
        with path.open("wb") as stream:
            for job in self._jobs.values():
                written = 0
                for index, offset, values in job.pieces():
                    _write_at(stream, job.tensors[index].offset + offset, values)
                    written += values.nbytes
                    if progress is not None:
                        progress(done + written, total, "writing")
                assert written == sum(tensor.nbytes for tensor in job.tensors), job.tensors
                done += written
            stream.truncate(self.nbytes)

    def _place(
        self,
        key: str,
        sources: tuple[str, ...],
        parts: list[tuple[str, np.dtype[Any], tuple[int, ...]]],
        pieces: Callable[[], Pieces],
    ) -> tuple[StoredTensor, ...]:
        """The places of a tensor's parts (suffix of the name, dtype, shape), given at its first use."""
        if key in self._jobs:
            return self._jobs[key].tensors
        tensors = []
        for suffix, dtype, shape in parts:
            nbytes = math.prod(shape) * dtype.itemsize
            align = _PAGE_BYTES if nbytes >= _LARGE_BYTES else _ALIGN_BYTES
            offset = -(-self.nbytes // align) * align
            tensors.append(StoredTensor(key + suffix, dtype, shape, offset))
            self.nbytes = offset + nbytes
        self.used.update(sources)
        self._jobs[key] = _Job(tuple(tensors), pieces)
        return self._jobs[key].tensors

    def _rows(self, name: str) -> Iterator[tuple[int, FloatArray]]:
        shape = self.source.tensors[name].shape
        step = max(1, _BLOCK_ELEMENTS // math.prod(shape[1:]))
        for start in range(0, shape[0], step):
            yield start, self.source.read_rows(name, start, min(shape[0], start + step))

    def _cast(self, name: str, values: FloatArray, kind: np.dtype[Any]) -> npt.NDArray[Any]:
        largest = float(max(values.max(), -values.min()))
        if largest > _LARGEST[kind]:
            raise FormatError(
                f"{self.source.tensors[name].file}: tensor {name} holds {largest:g}, more than float16 can store "
                f"({_LARGEST[kind]:g}); export as fp32"
            )
        return values.astype(kind, copy=False)


def _write_at(stream: BinaryIO, offset: int, values: npt.NDArray[Any]) -> None:
    stream.seek(offset)
    stream.write(np.ascontiguousarray(values).data)
