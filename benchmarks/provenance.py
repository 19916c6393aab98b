"""What a measurement belongs to: the machine, the versions and the commit, as a JSON-ready dictionary."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from melt_edge.runtime.library import import_llama_cpp, native_dir
from melt_edge.runtime.machine import usable_cores

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("melt-edge", "llama-cpp-python", "gguf", "numpy", "onnx", "onnxruntime")
# The instruction sets that llama.cpp's CPU kernels are written for.
_CPU_FLAGS = re.compile(r"avx|fma|f16c|amx|asimd|i8mm|sve")
_COMPILER = re.compile(rb"GCC: \([^)\0]*\) [\d.]+|[Cc]lang version [\d.]+")


def provenance() -> dict[str, Any]:
    """Machine, operating system, compiler, versions and commit; None for what cannot be told."""
    return {
        "commit": commit(),
        "machine": {
            "cpu": _cpu_name(),
            "cpu_flags": _cpu_flags(),
            "cores": usable_cores(),
            "os": _os_name(),
            "compiler": _compiler(),
            "llama_cpp": _library_features(),
        },
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def commit(root: Path = ROOT) -> str | None:
    """The commit of a clone, with "-dirty" if files outside the results differ from it; None outside a clone."""
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("-dirty" if changed else "")


def _git(root: Path, *args: str) -> str:
    return subprocess.run(["git", "-C", str(root), *args], check=True, capture_output=True, text=True).stdout.strip()


def _cpu_name() -> str | None:
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return _cpuinfo("model name") or platform.processor() or None


def _cpu_flags() -> list[str]:
    flags = _cpuinfo("flags") or _cpuinfo("Features") or ""
    return sorted(flag for flag in flags.split() if _CPU_FLAGS.match(flag))


def _cpuinfo(key: str) -> str | None:
    path = Path("/proc/cpuinfo")
    found = re.search(rf"^{key}\s*: (.*)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return found.group(1).strip() if found else None


def _os_name() -> str:
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {platform.machine()}"
    except (OSError, KeyError):
        return f"{platform.system()} {platform.release()}, {platform.machine()}"


def _compiler() -> str | None:
    """The compiler that left its name in the native library; most do on Linux."""
    for path in sorted(native_dir().glob("*llama*")):
        found = _COMPILER.search(path.read_bytes())
        if found:
            return found.group().decode("ascii")
    return None


def _library_features() -> str:
    """What the loaded llama.cpp says of its own build: backends and the instruction sets it uses."""
    return str(import_llama_cpp().llama_cpp.llama_print_system_info().decode("utf-8", "replace")).strip(" |")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
