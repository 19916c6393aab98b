"""The machine's memory read bandwidth: the speed that decoding cannot pass."""

from __future__ import annotations

import ctypes

from melt_edge.errors import BackendError
from melt_edge.runtime.library import native_function

# Many times the caches of a laptop or a server's share of one; a second to read, at most.
READ_BYTES = 256 * 2**20
PASSES = 8


def read_bandwidth(n_threads: int, *, n_bytes: int = READ_BYTES, passes: int = PASSES) -> float:
    """Bytes per second that n_threads threads together read from memory: the best of some passes, as STREAM takes it.

    Raises: BackendError if the machine cannot give the memory or the threads.
    """
    read = native_function(
        "melt_edge_read_bandwidth", ctypes.c_double, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32
    )
    found = float(read(n_bytes, n_threads, passes))
    if found <= 0.0:
        raise BackendError(
            f"{n_bytes / 2**20:,.0f} MiB could not be read by {n_threads} threads to measure the memory's bandwidth; "
            "close other programs or ask for fewer threads"
        )
    return found
