"""Tensors that onnxruntime reads and writes in place: allocated once, bound to every run.

On the processor a tensor is a numpy array that the session sees directly; elsewhere it lies on the device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from melt_edge.runtime.ort_session import PROVIDERS, import_onnxruntime

Array = npt.NDArray[Any]
HOST = "cpu"


class Tensor:
    """One tensor of fixed shape. value: the OrtValue to bind."""

    def __init__(self, value: Any, array: Array | None) -> None:
        """array: the memory of ``value`` itself, or None if that is on a device."""
        self.value = value
        self._array = array

    def read(self) -> Array:
        """The contents: the memory itself on the processor, else a copy."""
        return self._array if self._array is not None else self.value.numpy()

    def write(self, values: Array) -> None:
        """Replace the contents by values of the same shape and type."""
        if self._array is not None:
            self._array[...] = values
        else:
            self.value.update_inplace(np.ascontiguousarray(values))


class Memory:
    """Makes tensors on the device of a provider, and counts their bytes."""

    def __init__(self, provider: str) -> None:
        self._ort = import_onnxruntime().OrtValue
        self._device = PROVIDERS[provider][1] or HOST
        self.nbytes = 0

    @property
    def is_host(self) -> bool:
        """True if tensors are numpy arrays that onnxruntime sees."""
        return self._device == HOST

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Tensor:
        """A tensor of zeros, its memory taken from the system now."""
        array = self.array(shape, dtype)
        if self.is_host:
            return self.view(array)
        value = self._ort.ortvalue_from_shape_and_type(list(shape), np.dtype(dtype).type, self._device, 0)
        value.update_inplace(array)
        return Tensor(value, None)

    def array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """A numpy array of zeros that counts as this memory's."""
        array = np.empty(shape, dtype)
        array.fill(0)  # np.zeros would take the pages only as tokens come
        self.nbytes += array.nbytes
        return array

    def view(self, array: Array) -> Tensor:
        """A contiguous numpy array, always on the processor, as a tensor on the same memory."""
        assert array.flags.c_contiguous
        return Tensor(self._ort.ortvalue_from_numpy(array), array)
