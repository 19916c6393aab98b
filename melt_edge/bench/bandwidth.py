"""The machine's memory read bandwidth: the speed that decoding cannot pass."""

from __future__ import annotations

import ctypes
import time
from types import TracebackType

from melt_edge.errors import BackendError
from melt_edge.runtime.library import native_function

# Many times the caches of a laptop or a server's share of one; some 10 ms to read.
READ_BYTES = 256 * 2**20
# New threads may share a core at first.
PASSES = 5
# Threads that have just computed wait actively for more work, and would take a core from those that read.
_PAUSE_S = 0.01


class ReadBandwidth:
    """Memory that n_threads threads read together, each its own part, as often as asked.

    A context manager, which frees the memory. Raises: BackendError if the machine cannot give memory or threads.
    """

    def __init__(self, n_threads: int, *, n_bytes: int = READ_BYTES) -> None:
        new = native_function("melt_edge_bandwidth_new", ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32)
        self._read = native_function("melt_edge_bandwidth_read", ctypes.c_double, ctypes.c_void_p, ctypes.c_uint32)
        self._free = native_function("melt_edge_bandwidth_free", None, ctypes.c_void_p)
        self._what = f"{n_bytes / 2**20:,.0f} MiB could not be read by {n_threads} threads"
        self._memory = new(n_bytes, n_threads)
        if not self._memory:
            raise self._error()

    def read(self) -> float:
        """Bytes per second, the median of some passes after a pause. Raises: BackendError if it has no threads."""
        time.sleep(_PAUSE_S)
        found = float(self._read(self._memory, PASSES))
        if found <= 0.0:
            raise self._error()
        return found

    def _error(self) -> BackendError:
        return BackendError(
            f"{self._what} to measure the memory's bandwidth; close other programs or ask for fewer threads"
        )

    def __enter__(self) -> ReadBandwidth:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._free(self._memory)
