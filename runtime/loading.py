"""load: from a path to a Model; the one place that knows which backends there are."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from melt_edge.errors import BackendUnavailableError
from melt_edge.runtime.base import Backend
from melt_edge.runtime.llama import LlamaBackend
from melt_edge.runtime.model import Model
from melt_edge.runtime.options import LoadOptions
from melt_edge.runtime.sampling import checked_seed
from melt_edge.runtime.text import checked_path, shown

BACKENDS: dict[str, Callable[[Path, LoadOptions], Backend]] = {"llama": LlamaBackend}


def load(
    path: str | os.PathLike[str],
    *,
    backend: str | None = None,
    n_ctx: int | None = None,
    chunk_size: int | None = None,
    loops: int | None = None,
    kv_type: str = "f16",
    n_threads: int | None = None,
    n_gpu_layers: int | None = None,
    seed: int | None = None,
    flash_attn: bool | None = None,
) -> Model:
    """Open a GGUF file of an Ouro or MELT model.

    backend: "llama", the default. n_ctx: tokens the conversation can hold; None takes the file's own length
    up to 4096, 0 all of it. chunk_size: tokens of a prompt computed together; None takes the trained size for
    melt and 512 for ouro, where it changes speed alone. loops: passes over the layers, 1 to 64, for ouro at
    most 512 divided by its layers; None takes the trained number, another one is worth a try but costs
    quality. kv_type: what the cache stores, f32, f16, q8_0 or q4_0. n_threads: None takes the physical cores
    this process may use. n_gpu_layers: the file's layers to put on the GPU, the output layer first and then
    from the last on; -1 means all, None all on a Mac with Metal and none elsewhere. seed: of every generation
    that is not given one; None draws a new one each time. flash_attn: None lets the library choose.

    Raises: FormatError, SpecError or ConfigError for a file that is damaged, of another architecture, or
        has values outside what can run; ConfigError for an argument out of range; MemoryBudgetError if the
        machine cannot hold it; BackendUnavailableError or AbiMismatchError for the native library;
        BackendError with llama.cpp's own reason for whatever it still refuses.
    """
    opened = BACKENDS.get(backend or "llama") if isinstance(backend, str | None) else None
    if opened is None:
        raise BackendUnavailableError(f"backend is {shown(backend)}, expected one of {', '.join(BACKENDS)}")
    checked_seed(seed)
    return Model(
        opened(
            checked_path(path, "path"),
            LoadOptions(
                n_ctx=n_ctx,
                chunk_size=chunk_size,
                loops=loops,
                kv_type=kv_type,
                n_threads=n_threads,
                n_gpu_layers=n_gpu_layers,
                flash_attn=flash_attn,
            ),
        ),
        seed=seed,
    )
