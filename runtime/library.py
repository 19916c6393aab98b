"""Finds, loads and checks the patched llama.cpp, and takes over its log.

The only place that imports llama_cpp. Importing this module loads nothing.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from melt_edge.errors import AbiMismatchError, BackendUnavailableError

logger = logging.getLogger("melt_edge.llama")

_LIB_VARIABLE = "LLAMA_CPP_LIB_PATH"  # read by the bindings when they are first imported
# ggml's log levels; 5 continues the line before. llama.cpp's INFO is a page per model: DEBUG for us.
_LEVELS = {0: logging.DEBUG, 1: logging.DEBUG, 2: logging.DEBUG, 3: logging.WARNING, 4: logging.ERROR}
_CONTINUE = 5

# The patches and our C++: in a checkout the folder itself, in an installed package its copy.
_CPP = Path(__file__).resolve().parent.parent / "cpp"

_lock = threading.Lock()
_ready: ModuleType | None = None
_log_callback: Any = None  # the native side keeps a bare pointer to it


@dataclass
class _LogState:
    """The line being put together, and a list that collects lines while a native call runs."""

    level: int = logging.DEBUG
    text: str = ""
    captured: list[tuple[int, str]] | None = None


_log = _LogState()


def native_dir() -> Path:
    """The folder of libllama: $MELT_EDGE_LIB if set, else the one inside the installed package."""
    override = os.environ.get("MELT_EDGE_LIB")
    if override:
        return Path(override)
    import melt_edge

    # An editable install keeps built files in site-packages and sources elsewhere: look in each root.
    roots = [Path(root) for root in melt_edge.__path__]
    return next((root / "lib" for root in roots if (root / "lib").is_dir()), roots[0] / "lib")


def import_llama_cpp() -> ModuleType:
    """The bindings over our patched library, loaded and checked once; later calls are free.

    Raises: BackendUnavailableError if bindings or library are missing, or llama_cpp was imported before
        with another library; AbiMismatchError if library and bindings were not made for each other.
    """
    global _ready
    with _lock:
        if _ready is None:
            module = _import()
            check_build(build_info(module), _python_side(module))
            _take_over_log(module)
            _ready = module
        return _ready


def build_info(module: ModuleType) -> dict[str, Any]:
    """What the native library says about its own build.

    Raises: BackendUnavailableError if the library is not ours.
    """
    library = module.llama_cpp._lib
    try:
        function = library.melt_edge_build_info
    except AttributeError:
        raise BackendUnavailableError(
            f"llama_cpp was imported before melt-edge with another library ({library._name}), which does not know "
            "these models; import melt_edge and load a model before importing llama_cpp, or set "
            f"{_LIB_VARIABLE}={native_dir()} before Python starts"
        ) from None
    function.restype = ctypes.c_char_p
    function.argtypes = []
    try:
        info = json.loads(function().decode("utf-8"))
    except (ValueError, AttributeError) as err:
        raise AbiMismatchError(
            f"{library._name}: melt_edge_build_info gives no JSON; build the library again (make setup)"
        ) from err
    if not isinstance(info, dict):
        raise AbiMismatchError(f"{library._name}: melt_edge_build_info gives no object; build it again (make setup)")
    return info


def sources_sha256(cpp: Path) -> str:
    """The digest of the patches and of our C++ below a folder; the build writes the same into the library."""
    patterns = ("patches/series", "patches/*.patch", "src/*.cpp", "src/*.h")
    files = [path for pattern in patterns for path in cpp.glob(pattern)]
    lines = sorted(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_build(native: Mapping[str, Any], python: Mapping[str, Any]) -> None:
    """Compare what the native library was built from, and its struct sizes, with the bindings and the package.

    Both: {"llama_cpp_python": version, "sizeof": {struct name: bytes}, "sources_sha256": digest}.
    Raises: AbiMismatchError listing every difference.
    """
    gaps = []
    if native.get("llama_cpp_python") != python["llama_cpp_python"]:
        gaps.append(
            f"the library is for llama-cpp-python {native.get('llama_cpp_python')!r}, "
            f"installed is {python['llama_cpp_python']!r}"
        )
    sizes = native.get("sizeof")
    sizes = sizes if isinstance(sizes, dict) else {}
    for name, size in python["sizeof"].items():
        if sizes.get(name) != size:
            gaps.append(f"struct {name} has {sizes.get(name)} bytes in the library and {size} in the bindings")
    if gaps:
        raise AbiMismatchError(
            "the native library and the installed llama-cpp-python do not fit: "
            + "; ".join(gaps)
            + "; install the pinned version (constraints.txt) and build again (make setup)"
        )
    if native.get("sources_sha256") != python["sources_sha256"]:
        raise AbiMismatchError(
            "the native library was built from other patches or C++ sources than this melt-edge has; "
            "build it again (make setup)"
        )


@contextmanager
def captured_log() -> Iterator[list[tuple[int, str]]]:
    """Collects llama.cpp's (level, line) pairs while the block runs, and logs them when it ends.

    The bindings point stderr elsewhere while they load a model, where a log handler's lines would go too.
    """
    lines: list[tuple[int, str]] = []
    previous, _log.captured = _log.captured, lines
    try:
        yield lines
    finally:
        _log.captured = previous
        for level, line in lines:
            logger.log(level, "%s", line)


def last_reason(lines: list[tuple[int, str]]) -> str:
    """The first error among captured log lines, the one nearest to the cause, or a plain 'no reason given'."""
    errors = [line for level, line in lines if level >= logging.ERROR]
    warnings = [line for level, line in lines if level == logging.WARNING]
    return next(iter(errors + warnings[-1:]), "the library gave no reason")


def native_function(name: str, result: Any, *arguments: Any) -> Any:
    """A function of our own in the loaded libllama.

    Raises: AbiMismatchError if the library does not have it.
    """
    library = import_llama_cpp().llama_cpp._lib
    try:
        function = library[name]
    except AttributeError:
        raise AbiMismatchError(f"{library._name}: has no {name}; build the library again (make setup)") from None
    function.restype, function.argtypes = result, list(arguments)
    return function


def _import() -> ModuleType:
    if "llama_cpp" in sys.modules:
        return sys.modules["llama_cpp"]
    folder = native_dir()
    if not folder.is_dir():
        raise BackendUnavailableError(
            f"the native library is missing (expected in {folder}); build it with make setup, "
            "or set MELT_EDGE_LIB to the folder that has libllama"
        )
    before = os.environ.get(_LIB_VARIABLE)
    os.environ[_LIB_VARIABLE] = str(folder.resolve())
    try:
        return importlib.import_module("llama_cpp")
    except ImportError as err:
        raise BackendUnavailableError(
            f"llama-cpp-python cannot be imported ({err}); install it with make setup"
        ) from err
    except (RuntimeError, OSError) as err:
        raise BackendUnavailableError(
            f"the native library in {folder} cannot be loaded ({err}); build it again with make setup"
        ) from err
    finally:
        if before is None:
            del os.environ[_LIB_VARIABLE]
        else:
            os.environ[_LIB_VARIABLE] = before


def _python_side(module: ModuleType) -> dict[str, Any]:
    names = (
        "llama_model_params",
        "llama_context_params",
        "llama_batch",
        "llama_model_quantize_params",
        "llama_token_data",
        "llama_sampler_chain_params",
    )
    low = module.llama_cpp
    return {
        "llama_cpp_python": module.__version__,
        "sizeof": {name: ctypes.sizeof(getattr(low, name)) for name in names},
        "sources_sha256": sources_sha256(_CPP),
    }


def _take_over_log(module: ModuleType) -> None:
    global _log_callback
    _log_callback = module.llama_cpp.llama_log_callback(_on_log)
    module.llama_cpp.llama_log_set(_log_callback, ctypes.c_void_p(0))


def _on_log(level: int, text: bytes, user_data: object) -> None:
    # Called by native threads: an exception here could not reach anybody.
    if level != _CONTINUE:
        _flush()
        _log.level = _LEVELS.get(level, logging.DEBUG)
    _log.text += (text or b"").decode("utf-8", errors="replace")
    if _log.text.endswith("\n"):
        _flush()


def _flush() -> None:
    line, _log.text = _log.text.strip(), ""
    if not line:
        return
    if _log.captured is not None:
        _log.captured.append((_log.level, line))
    else:
        logger.log(_log.level, "%s", line)
