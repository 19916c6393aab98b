"""onnxruntime: imported only here, its execution providers by short names, a session for each checked graph."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from melt_edge.errors import BackendError, BackendUnavailableError
from melt_edge.runtime.text import shown

# A user's word -> onnxruntime's name, and the device its memory is on where that is not the processor's.
PROVIDERS: dict[str, tuple[str, str | None]] = {
    "cpu": ("CPUExecutionProvider", None),
    "coreml": ("CoreMLExecutionProvider", None),
    "dml": ("DmlExecutionProvider", "dml"),
    "cuda": ("CUDAExecutionProvider", "cuda"),
    "qnn": ("QNNExecutionProvider", None),
}
DEFAULT_PROVIDER = "cpu"
# Microseconds that a thread which waits for a loop's next product spins before it sleeps. Against sleeping at once,
# which costs the time to wake, a token of six 1.6 B layers in int4 with 2 threads takes 0.9 times as long on a free
# machine, 1.08 times where another program keeps a core busy; without a limit 0.91 and 1.3 times (benchmarks/onnx.md).
_SPIN_US = 20
_FATAL = 4  # onnxruntime writes everything below to stderr; what fails comes back as an exception too


def import_onnxruntime() -> ModuleType:
    """The package. Raises: BackendUnavailableError that says how to install it."""
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as err:
        raise BackendUnavailableError(
            f'running an ONNX folder needs the package onnxruntime ({err}); run: pip install "melt-edge[onnx]"'
        ) from err


def checked_provider(name: str | None) -> str:
    """A provider the installed onnxruntime has. Raises: BackendUnavailableError naming those it has."""
    name = DEFAULT_PROVIDER if name is None else name
    installed = import_onnxruntime().get_available_providers()
    here = [short for short, (full, _) in PROVIDERS.items() if full in installed]
    if not isinstance(name, str) or name not in here:
        reason = "" if isinstance(name, str) and name in PROVIDERS else f", which is none of {', '.join(PROVIDERS)}"
        raise BackendUnavailableError(
            f"provider is {shown(name)}{reason}; the installed onnxruntime has {', '.join(here)}: "
            "use one of those, or install a build of onnxruntime with the other"
        )
    return name


def open_sessions(folder: Path, graphs: Mapping[str, bytes], *, provider: str, n_threads: int) -> dict[str, Any]:
    """An InferenceSession for each graph's bytes. Raises: BackendError with onnxruntime's reason.

    folder: of the weights. The bytes that were checked are those that run; the weights are read from the folder alone.
    """
    ort = import_onnxruntime()
    full, _ = PROVIDERS[provider]
    sessions = {}
    for name, data in graphs.items():
        options = ort.SessionOptions()
        options.log_severity_level = _FATAL
        # a look-up of rows is too short to wake a second thread for
        options.intra_op_num_threads = 1 if name == "embed" else n_threads
        options.inter_op_num_threads = 1
        spins = name == "loop" and _can_spin_briefly(ort)
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spins)))
        if spins:
            options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_US))
            options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        if provider == "dml":  # what its documentation asks for
            options.enable_mem_pattern = False
        try:
            sessions[name] = ort.InferenceSession(data, options, providers=[full])
        except Exception as err:  # the package raises a class of its own for every cause
            raise BackendError(f"{folder}: onnxruntime cannot load {name}.onnx: {first_line(err)}") from err
    return sessions


def _can_spin_briefly(ort: ModuleType) -> bool:
    """True from onnxruntime 1.26 on; an older one ignores the limit and would spin for milliseconds."""
    return tuple(int(part) for part in ort.__version__.split(".")[:2]) >= (1, 26)


def first_line(err: Exception) -> str:
    """onnxruntime's reason without its repetitions."""
    text = str(err).strip().partition("\n")[0]
    return text if len(text) <= 400 else text[:397] + "..."
