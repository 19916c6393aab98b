"""load: from a path to a Model; the one place that knows which backends there are."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from melt_edge.errors import BackendUnavailableError, FormatError
from melt_edge.runtime.base import Backend
from melt_edge.runtime.llama import LlamaBackend
from melt_edge.runtime.model import Model
from melt_edge.runtime.onnx_folder import is_onnx_folder
from melt_edge.runtime.options import LoadOptions
from melt_edge.runtime.ort import OrtBackend
from melt_edge.runtime.sampling import checked_seed
from melt_edge.runtime.text import checked_path, shown

BACKENDS: dict[str, Callable[[Path, LoadOptions], Backend]] = {"llama": LlamaBackend, "onnx": OrtBackend}


def load(
    path: str | os.PathLike[str],
    *,
    backend: str | None = None,
    n_ctx: int | None = None,
    chunk_size: int | None = None,
    loops: int | None = None,
    kv_type: str | None = None,
    n_threads: int | None = None,
    n_gpu_layers: int | None = None,
    seed: int | None = None,
    flash_attn: bool | None = None,
    exit_threshold: float | None = None,
    provider: str | None = None,
) -> Model:
    """Open an Ouro or MELT model: a GGUF file, or a folder that melt-edge export onnx wrote.

    backend: "llama" for a file, "onnx" for a folder; None looks. n_ctx: tokens the conversation can hold; None
    takes the file's own length up to 4096, 0 all of it. chunk_size: tokens of a prompt computed together; None
    takes the trained size for melt and 512 for ouro, where it changes speed alone. loops: passes over the layers,
    1 to 64, for ouro at most 512 divided by its layers; None takes the trained number, another one is worth a try
    but costs quality. kv_type: what the cache stores, f32, f16 (the default), q8_0 or q4_0. n_threads: None takes
    the physical cores this process may use. n_gpu_layers: the file's layers to put on the GPU, the output layer
    first and then from the last on; -1 means all, None all on a Mac with Metal and none elsewhere. seed: of every
    generation that is not given one; None draws a new one each time. flash_attn: None lets the library choose.

    For a folder: n_ctx None or 0 takes the room it was exported with, and it can have no more; kv_type,
    n_gpu_layers and flash_attn are not its to choose. provider: onnxruntime's execution provider, cpu (the
    default), coreml, dml, cuda or qnn. exit_threshold: below 1, a token's output is that of the first loop after
    which the exit gate's probabilities add up to it, and a melt runs no further loop once that holds for every
    token of a chunk (one, when decoding); its cache rows are then those of the last loop that ran. An ouro runs
    them all: its later tokens need each loop's rows.

    Raises: FormatError, SpecError or ConfigError for a file or folder that is damaged, of another architecture, or
        has values outside what can run; ConfigError for an argument out of range; MemoryBudgetError if the
        machine cannot hold it; BackendUnavailableError or AbiMismatchError for the native library;
        BackendError with llama.cpp's own reason for whatever it still refuses.
    """
    checked_seed(seed)
    path = checked_path(path, "path")
    return Model(
        BACKENDS[backend_for(path, backend)](
            path,
            LoadOptions(
                n_ctx=n_ctx,
                chunk_size=chunk_size,
                loops=loops,
                kv_type=kv_type,
                n_threads=n_threads,
                n_gpu_layers=n_gpu_layers,
                flash_attn=flash_attn,
                exit_threshold=exit_threshold,
                provider=provider,
            ),
        ),
        seed=seed,
    )


def backend_for(path: Path, backend: str | None = None) -> str:
    """The backend that opens a path: the one asked for, or the one for what is there.

    Raises: BackendUnavailableError for a name that is none; FormatError for a folder that is no ONNX folder,
        or a path that the backend asked for cannot open.
    """
    if backend is not None and (not isinstance(backend, str) or backend not in BACKENDS):
        raise BackendUnavailableError(f"backend is {shown(backend)}, expected one of {', '.join(BACKENDS)}")
    if not path.is_dir():
        if backend == "onnx":
            raise FormatError(f"{path}: is no folder, expected one that melt-edge export onnx wrote")
        return "llama"
    if backend == "llama":
        raise FormatError(f"{path}: is a folder, expected a .gguf file; leave backend out to open an ONNX folder")
    if not is_onnx_folder(path):
        what = "a checkpoint" if (path / "config.json").is_file() else "a folder without melt_edge.json"
        raise FormatError(
            f"{path}: is {what}, which does not run as it is; export it first: "
            "melt-edge export gguf CHECKPOINT OUT.gguf, or melt-edge export onnx CHECKPOINT OUT_DIR"
        )
    return "onnx"
