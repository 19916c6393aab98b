"""The onnx backend's cache rows as a state's payload: for each slot the keys, then the values, of every token.

slot 0 keys [Hkv, n, Dh] | slot 0 values | slot 1 keys | ...      in the cache's own type
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from melt_edge.errors import FormatError
from melt_edge.runtime.ort_buffers import Array, Tensor
from melt_edge.runtime.state import ByteArray

Slots = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class RowLayout:
    """Shape of the loaded model's cache. dtype: numpy's name."""

    n_slots: int
    n_head_kv: int
    head_dim: int
    dtype: str

    def payload_bytes(self, n_tokens: int) -> int:
        """The exact size of the rows of n_tokens tokens."""
        return 2 * self.n_slots * self.n_head_kv * n_tokens * self.head_dim * np.dtype(self.dtype).itemsize

    def check(self, payload: ByteArray, n_tokens: int, *, source: str) -> None:
        """Raises: FormatError if a row is not finite: it would turn every later token into noise."""
        for rows in self._rows(payload, n_tokens):
            if not np.isfinite(rows).all():
                raise FormatError(f"{source}: has cache rows that are not finite; save the state again")

    def copy_out(self, slots: Slots, n_tokens: int) -> ByteArray:
        """The rows of the first n_tokens tokens."""
        payload = np.empty(self.payload_bytes(n_tokens), dtype=np.uint8)
        tensors = [tensor for pair in slots for tensor in pair]
        for rows, tensor in zip(self._rows(payload, n_tokens), tensors, strict=True):
            rows[...] = tensor.read()[0, :, :n_tokens]
        return payload

    def copy_in(self, slots: Slots, payload: ByteArray, n_tokens: int) -> None:
        """Put checked rows back in their places."""
        tensors = [tensor for pair in slots for tensor in pair]
        for rows, tensor in zip(self._rows(payload, n_tokens), tensors, strict=True):
            whole = tensor.read()  # the memory itself on the processor, else a copy
            whole[0, :, :n_tokens] = rows
            tensor.write(whole)

    def _rows(self, payload: ByteArray, n_tokens: int) -> list[Array]:
        shape = (2 * self.n_slots, self.n_head_kv, n_tokens, self.head_dim)
        return list(payload.view(self.dtype).reshape(shape))
