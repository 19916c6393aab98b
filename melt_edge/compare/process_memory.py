"""What the operating system says of this process's memory; None for what a system does not tell."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

from melt_edge.runtime.machine import rss_bytes

_SYSTEM = platform.system()


def process_memory(when: str) -> dict[str, int | None]:
    """Resident set, proportional set (Linux) and physical footprint (macOS) now.

    Units: bytes, under rss_{when}_bytes, pss_{when}_bytes and footprint_{when}_bytes.
    """
    rss, footprint = (rss_bytes(), None) if _SYSTEM == "Linux" else _darwin_sizes()
    return {
        f"rss_{when}_bytes": rss,
        f"pss_{when}_bytes": _proc_kib("smaps_rollup", "Pss:"),
        f"footprint_{when}_bytes": footprint,
    }


def peak_rss_bytes() -> int | None:
    """The highest resident set of this process so far."""
    if _SYSTEM == "Linux":
        return _proc_kib("status", "VmHWM:")
    if _SYSTEM == "Darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def _proc_kib(name: str, key: str) -> int | None:
    """A value in kB of /proc/self/NAME, as bytes."""
    try:
        lines = Path("/proc/self", name).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), None)


class _RusageInfoV0(ctypes.Structure):
    """struct rusage_info_v0 of macOS's sys/resource.h."""

    _fields_ = (
        ("uuid", ctypes.c_uint8 * 16),
        ("user_time", ctypes.c_uint64),
        ("system_time", ctypes.c_uint64),
        ("pkg_idle_wkups", ctypes.c_uint64),
        ("interrupt_wkups", ctypes.c_uint64),
        ("pageins", ctypes.c_uint64),
        ("wired_size", ctypes.c_uint64),
        ("resident_size", ctypes.c_uint64),
        ("phys_footprint", ctypes.c_uint64),
        ("proc_start_abstime", ctypes.c_uint64),
        ("proc_exit_abstime", ctypes.c_uint64),
    )


def _darwin_sizes() -> tuple[int | None, int | None]:
    """Resident size and physical footprint where the C library has macOS's call for them."""
    info = _RusageInfoV0()
    try:
        failed = ctypes.CDLL(None).proc_pid_rusage(os.getpid(), 0, ctypes.byref(info))
    except (OSError, AttributeError, TypeError):  # TypeError: Windows has no library of everything
        return None, None
    return (None, None) if failed else (int(info.resident_size), int(info.phys_footprint))
