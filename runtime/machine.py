"""What this process may use of the machine: cores and memory, container limits included."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_CPU = Path("/sys/devices/system/cpu")


def usable_cores() -> int:
    """Physical cores this process may run on: affinity, hyper-threads and a container's quota considered."""
    if hasattr(os, "sched_getaffinity"):
        cpus = os.sched_getaffinity(0)
        cores = len({_siblings(cpu) for cpu in cpus})
    else:
        cores = os.cpu_count() or 1  # macOS: no hyper-threads on Apple silicon
    quota = _cpu_quota()
    return max(1, min(cores, quota) if quota else cores)


def available_bytes() -> int | None:
    """Memory a new allocation can get without swapping, or None where the system does not say."""
    if sys.platform == "win32":
        return None
    limits = [bytes_ for bytes_ in (_meminfo_available(), _cgroup_available()) if bytes_ is not None]
    if not limits and "SC_PHYS_PAGES" in os.sysconf_names:
        # macOS: pages are compressed and reclaimed on demand; leave a quarter to everybody else.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 3 // 4
    return min(limits, default=None)


def rss_bytes() -> int:
    """Resident memory of this process now (its highest so far where the system gives nothing better)."""
    statm = _read(Path("/proc/self/statm"))
    if statm is not None:
        return int(statm.split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _siblings(cpu: int) -> str:
    """A name shared by the hyper-threads of one core."""
    text = _read(_CPU / f"cpu{cpu}" / "topology" / "thread_siblings_list")
    return text.strip() if text else str(cpu)


def _cpu_quota() -> int | None:
    text = _read(_CGROUP / "cpu.max")
    fields = text.split() if text else []
    if len(fields) != 2 or fields[0] == "max":
        return None
    return max(1, int(fields[0]) // int(fields[1]))


def _meminfo_available() -> int | None:
    for line in (_read(Path("/proc/meminfo")) or "").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_available() -> int | None:
    """What a container's limit leaves; its reclaimable file cache counts as free."""
    for limit, usage, stat in (
        ("memory.max", "memory.current", "memory.stat"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
        ),
    ):
        limit_text, usage_text = _read(_CGROUP / limit), _read(_CGROUP / usage)
        if limit_text is None or usage_text is None or limit_text.strip() == "max":
            continue
        cache = 0
        for line in (_read(_CGROUP / stat) or "").splitlines():
            if line.startswith(("inactive_file ", "active_file ")):
                cache += int(line.split()[1])
        return max(0, int(limit_text) - max(0, int(usage_text) - cache))
    return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
