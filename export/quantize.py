"""GGUF -> smaller GGUF with llama.cpp's own quantizer, in the patched library: no external tool."""

from __future__ import annotations

import ctypes
import difflib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gguf import LlamaFileType

from melt_edge.errors import BackendError, ConfigError, FormatError
from melt_edge.files import atomic_output
from melt_edge.runtime.gguf_check import GGUFInfo, check_gguf

# done bytes, total bytes, what is being done
Progress = Callable[[int, int, str], None]

# type name -> llama.cpp's file type, and about how many bits a weight takes (for the progress bar alone)
QUANTIZE_TYPES = {
    "f32": (LlamaFileType.ALL_F32, 32.0),
    "f16": (LlamaFileType.MOSTLY_F16, 16.0),
    "bf16": (LlamaFileType.MOSTLY_BF16, 16.0),
    "q8_0": (LlamaFileType.MOSTLY_Q8_0, 8.5),
    "q6_k": (LlamaFileType.MOSTLY_Q6_K, 6.6),
    "q5_k_m": (LlamaFileType.MOSTLY_Q5_K_M, 5.8),
    "q5_k_s": (LlamaFileType.MOSTLY_Q5_K_S, 5.6),
    "q5_1": (LlamaFileType.MOSTLY_Q5_1, 6.0),
    "q5_0": (LlamaFileType.MOSTLY_Q5_0, 5.6),
    "q4_k_m": (LlamaFileType.MOSTLY_Q4_K_M, 4.9),
    "q4_k_s": (LlamaFileType.MOSTLY_Q4_K_S, 4.7),
    "q4_1": (LlamaFileType.MOSTLY_Q4_1, 5.1),
    "q4_0": (LlamaFileType.MOSTLY_Q4_0, 4.7),
    "iq4_nl": (LlamaFileType.MOSTLY_IQ4_NL, 4.7),
    "iq4_xs": (LlamaFileType.MOSTLY_IQ4_XS, 4.5),
    "q3_k_l": (LlamaFileType.MOSTLY_Q3_K_L, 4.3),
    "q3_k_m": (LlamaFileType.MOSTLY_Q3_K_M, 4.0),
    "q3_k_s": (LlamaFileType.MOSTLY_Q3_K_S, 3.7),
    "q2_k": (LlamaFileType.MOSTLY_Q2_K, 3.2),
}
# These are useless without an importance matrix, and llama.cpp refuses most of them.
_NEED_IMATRIX = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "q2_k_s")
_FLOATS = ("F32", "F16", "BF16")
# Rows kept in memory at once; llama.cpp's default of 8 GiB is more than many machines have.
_BUFFER_BYTES = 128 * 2**20
_POLL_SECONDS = 0.2


def check_type(type: str) -> str:
    """The type's name in lower case. Raises: ConfigError for a type that cannot be made."""
    name = type.lower()
    if name in _NEED_IMATRIX:
        raise ConfigError(
            f"type {type!r} needs an importance matrix, which melt-edge does not make; use iq4_xs or q2_k"
        )
    if name not in QUANTIZE_TYPES:
        near = difflib.get_close_matches(name, QUANTIZE_TYPES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"type is {type!r}, expected one of {', '.join(QUANTIZE_TYPES)}{hint}")
    return name


def quantize_gguf(
    src: str | Path,
    dst: str | Path,
    type: str,
    *,
    force: bool = False,
    n_threads: int | None = None,
    allow_requantize: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write ``src`` with its matrices in another type; returns ``dst``, which appears when it is whole.

    allow_requantize: take a file that is quantised already, whose error then adds to the new one.
    Raises: ConfigError for the type or paths; FormatError, SpecError for ``src``; BackendError if
    llama.cpp fails; BackendUnavailableError without the patched library.
    """
    src, dst = Path(src), Path(dst)
    type = check_type(type)
    if dst.exists() and src.exists() and dst.samefile(src):
        raise ConfigError(f"{dst}: is also the file to read; choose another path")
    with atomic_output(dst, force=force) as temporary:
        quantize_file(src, temporary, type, n_threads=n_threads, allow_requantize=allow_requantize, progress=progress)
    return dst


def quantize_file(
    src: Path,
    temporary: Path,
    type: str,
    *,
    n_threads: int | None = None,
    allow_requantize: bool = False,
    progress: Progress | None = None,
) -> None:
    """quantize_gguf into a temporary path, which the native writer opens and truncates."""
    info = check_gguf(src)
    quantised = sorted({tensor.type for tensor in info.tensors} - set(_FLOATS))
    if quantised and not allow_requantize:
        raise FormatError(
            f"{src}: is quantised already ({', '.join(quantised)}), and quantising twice adds both errors; "
            "start from an f32, f16 or bf16 file, or allow it (--allow-requantize)"
        )
    file_type, bits = QUANTIZE_TYPES[type]
    total = max(1, int(info.n_params * bits / 8))
    reason = _run_native(src, temporary, file_type, n_threads, allow_requantize, total, progress)
    if reason is not None:
        raise BackendError(f"{src}: llama.cpp could not write it as {type}: {reason}")
    written = check_gguf(temporary)  # a full disk can leave a short file without an error
    _check_same_tensors(info, written)
    if progress is not None:
        progress(total, total, "quantising")


def _run_native(
    src: Path,
    temporary: Path,
    file_type: LlamaFileType,
    n_threads: int | None,
    allow_requantize: bool,
    total: int,
    progress: Progress | None,
) -> str | None:
    """Run the quantizer in a thread of its own and watch the file grow; the reason if it fails."""
    from melt_edge.runtime.library import captured_log, import_llama_cpp, last_reason

    low: Any = import_llama_cpp().llama_cpp
    params = low.llama_model_quantize_default_params()
    params.ftype = int(file_type)
    params.nthread = n_threads or len(_cpus())
    params.allow_requantize = allow_requantize
    params.max_buf_size = _BUFFER_BYTES
    result: list[int] = []

    def work() -> None:
        result.append(low.llama_model_quantize(os.fsencode(src), os.fsencode(temporary), ctypes.byref(params)))

    with captured_log() as lines:
        # A daemon: after Ctrl-C the caller cleans up and the process may end without waiting for it.
        worker = threading.Thread(target=work, name="quantize", daemon=True)
        worker.start()
        while worker.is_alive():
            worker.join(_POLL_SECONDS)
            if progress is not None:
                progress(min(temporary.stat().st_size, total), total, "quantising")
    if result == [0]:
        return None
    return last_reason(lines)


def _check_same_tensors(before: GGUFInfo, after: GGUFInfo) -> None:
    def shapes(info: GGUFInfo) -> dict[str, tuple[int, ...]]:
        # ggml drops axes of length 1 at the front: the exit gate's (1, d) comes back as (d,)
        return {tensor.name: tuple(n for n in tensor.shape if n > 1) for tensor in info.tensors}

    if shapes(before) != shapes(after):
        raise BackendError(f"{before.path}: the quantised file has other tensors than its source; report this")


def _cpus() -> set[int] | range:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)
