"""Block quantisation as MatMulNBits and GatherBlockQuantized read it: each row in blocks, a scale for each block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from melt_edge.weights import FloatArray


@dataclass(frozen=True)
class BlockFormat:
    """How matrices are quantised. symmetric: the zero point is the middle of the range and not stored."""

    bits: int
    block_size: int
    symmetric: bool

    def n_blocks(self, columns: int) -> int:
        """Blocks in a row; the last one is filled up with zeros."""
        return -(-columns // self.block_size)

    def data_shape(self, rows: int, columns: int) -> tuple[int, int, int]:
        """Shape of the packed values, uint8."""
        return rows, self.n_blocks(columns), self.block_size * self.bits // 8

    def scales_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the scales."""
        return rows, self.n_blocks(columns)

    def zeros_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the packed zero points, uint8."""
        return rows, -(-self.n_blocks(columns) * self.bits // 8)


@dataclass(frozen=True)
class Blocks:
    """Quantised rows. Shapes: as the format's; zeros is None if it is symmetric."""

    data: npt.NDArray[np.uint8]
    scales: FloatArray
    zeros: npt.NDArray[np.uint8] | None


def quantize_rows(values: FloatArray, fmt: BlockFormat) -> Blocks:
    """Round each block to its nearest steps; a value is (data - zero) * scale. Shapes: values (rows, columns)."""
    rows, columns = values.shape
    n_blocks, half, top = fmt.n_blocks(columns), 1 << (fmt.bits - 1), (1 << fmt.bits) - 1
    padded = np.zeros((rows, n_blocks * fmt.block_size), np.float32)
    padded[:, :columns] = values
    blocks = padded.reshape(rows, n_blocks, fmt.block_size)
    low, high = blocks.min(axis=2), blocks.max(axis=2)
    if fmt.symmetric:
        # The value farthest from zero becomes the range's longer end, -half: one more step than +-(half - 1).
        scales = np.where(-low > high, low, high) / -half
        zeros = np.full((rows, n_blocks), half, np.float32)
    else:
        low, high = np.minimum(low, 0), np.maximum(high, 0)  # zero itself stays exact
        scales = (high - low) / top
        zeros = np.clip(np.rint(-low * _inverse(scales)), 0, top)
    steps = np.rint(blocks * _inverse(scales)[:, :, None]) + zeros[:, :, None]
    data = np.clip(steps, 0, top).astype(np.uint8)
    packed_zeros = None if fmt.symmetric else _pack(zeros.astype(np.uint8), fmt.bits)
    return Blocks(_pack(data, fmt.bits), scales.astype(np.float32), packed_zeros)


def dequantize_rows(blocks: Blocks, fmt: BlockFormat, columns: int) -> FloatArray:
    """The values that quantised rows stand for. Shapes: (rows, columns)."""
    rows, n_blocks, _ = blocks.data.shape
    data = _unpack(blocks.data, fmt.bits, fmt.block_size).astype(np.float32)
    zeros: Any = 1 << (fmt.bits - 1)
    if blocks.zeros is not None:
        zeros = _unpack(blocks.zeros, fmt.bits, n_blocks).astype(np.float32)[:, :, None]
    values: FloatArray = ((data - zeros) * blocks.scales[:, :, None]).reshape(rows, -1)[:, :columns]
    return values


def _inverse(scales: FloatArray) -> FloatArray:
    """1 / scales; 0 where the whole block is zero or so small that the division overflows."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = 1 / scales
    return np.where(np.isfinite(inverse), inverse, 0).astype(np.float32)


def _pack(values: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Pairs of 4-bit values in a byte along the last axis, the first in the low half."""
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros((*values.shape[:-1], 1), np.uint8)], axis=-1)
    low, high = values[..., ::2], values[..., 1::2]
    return np.bitwise_or(low, np.left_shift(high, 4, dtype=np.uint8))


def _unpack(packed: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.uint8]:
    if bits == 8:
        return packed
    both: npt.NDArray[np.uint8] = np.stack([packed % 16, packed // 16], axis=-1).astype(np.uint8)
    return both.reshape(*packed.shape[:-1], -1)[..., :count]
